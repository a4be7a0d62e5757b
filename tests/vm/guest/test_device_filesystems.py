"""What people put on writable devices: filesystems that are made, filled, unmounted and checked; and the
verify of fio, with a cache that is smaller than the image below."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.device_rig import MIB
from tests.vm.guest.helpers import Tierblk, WebServer, mounted, run
from tests.vm.guest.test_device_planes import HAS_ZERO_COPY, PLANES

FIO_LIMIT_S = 240
FILESYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F"], ["e2fsck", "-f", "-n"]),
    "xfs": (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"]),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], ["btrfs", "check"]),
}


def is_known(filesystem: str) -> bool:
    """Whether this kernel has it, built in or as a module."""
    subprocess.run(["modprobe", filesystem], capture_output=True, timeout=60)
    return any(line.split()[-1] == filesystem for line in Path("/proc/filesystems").read_text().splitlines())


def fill(folder: Path, seed: int, files: int) -> dict[str, str]:
    """Files of all sizes, some of them written anew, shortened or deleted again; their sums by name."""
    chance = random.Random(seed)
    for number in range(files):
        path = folder / f"{number % 7}" / f"file-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([1, 100, 5000, 70_000, 900_000])))
        if chance.random() < 0.3:
            victim = chance.choice(sorted(folder.glob("*/file-*")))
            if chance.random() < 0.5:
                victim.unlink()
            else:
                with open(victim, "r+b") as file:
                    file.seek(chance.randrange(0, 60_000))
                    file.write(chance.randbytes(3000))
    return sums(folder)


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/file-*"))
    }


@pytest.mark.parametrize("filesystem", ["ext4", "btrfs"] if HAS_ZERO_COPY else ["ext4", "xfs"])
def test_a_filesystem_is_made_filled_and_found_well(filesystem: str, scratch: Path, tierblk: Tierblk) -> None:
    assert is_known(filesystem), f"this kernel has no {filesystem}"
    make, check = FILESYSTEMS[filesystem]
    config = tierblk.config(
        "files", None, scratch / "cache", "320MiB", volume__mode="local", volume__size="400MiB"
    )
    device, folder = tierblk.attach(config), scratch / "mounted"
    run(*make, device)
    with mounted(device, folder):
        written = fill(folder, seed=111, files=60)
        run("fstrim", folder)
    run(*check, device)
    tierblk.run("detach", "files")
    device = tierblk.attach(config)
    with mounted(device, folder):
        assert sums(folder) == written
        written = fill(folder, seed=112, files=20)
    run(*check, device)
    with mounted(device, folder):
        assert sums(folder) == written
    assert tierblk.status("files")["errors"] == 0
    tierblk.run("stop")
    shutil.rmtree(scratch / "cache")


@pytest.mark.parametrize(("plane", "pattern"), list(zip(PLANES, ("randrw", "rw"), strict=False)))
def test_fio_verifies_what_it_wrote(
    plane: str, pattern: str, scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Over an image of which the cache holds a tenth beside what is written."""
    image = make_image("fio.raw", 160 * MIB, seed=113)
    keys: dict[str, Any] = {"device__plane": plane, "volume__mode": "scratch"}
    device = tierblk.attach(tierblk.config("fio", web.url_of(image), scratch / "cache", "40MiB", **keys))
    job = [
        "fio", "--name=verify", f"--filename={device}", f"--rw={pattern}", "--direct=1", "--ioengine=libaio",
        "--iodepth=16", "--bssplit=512/10:4k/50:7k/10:64k/30", "--size=20m", "--io_size=24m",
        "--verify=crc32c", "--verify_backlog=64", "--fsync=200", "--randseed=114", "--offset=30m",
    ]  # fmt: skip
    done = subprocess.run(job, capture_output=True, text=True, timeout=FIO_LIMIT_S, cwd=scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    status = tierblk.status("fio")
    assert status["errors"] == 0
    assert status["write_bytes"] > 8 * MIB
    tierblk.run("stop")
