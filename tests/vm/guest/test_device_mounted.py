"""What users do with a device: partitions, mounts, the sizes that tools ask for, and letting go of it."""

from __future__ import annotations

import filecmp
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.guest.device_rig import IMPATIENT, IMPATIENT_LIMIT_S, MIB, compare_whole, devices, moody
from tests.vm.guest.helpers import Tierblk, WebServer, on_newest, on_oldest, write_image

IMAGE_BYTES = 24 * MIB
PARTITION_BYTES = 20 * MIB
SFDISK_SCRIPT = f"label: gpt\nstart={MIB // 512}, size={PARTITION_BYTES // 512}, type=L, name=root\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with files of many sizes."""
    folder = tmp_path / "files"
    (folder / "etc").mkdir(parents=True)
    for number, size in enumerate((0, 1, 511, 4096, 65537, 3 * MIB)):
        write_image(folder / "etc" / f"file{number}", size, seed=number)
    (folder / "link").symlink_to("etc/file3")
    return folder


@pytest.fixture
def disk(make_image: Callable[..., Path], files: Path) -> Path:
    """A disk image with a GPT and one ext4 partition that holds `files`."""
    image = make_image("disk.raw", 0)
    os.truncate(image, IMAGE_BYTES)
    subprocess.run(
        ["sfdisk", "-q", str(image)], input=SFDISK_SCRIPT, text=True, check=True, capture_output=True
    )
    ext4 = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={MIB}", "-d", str(files), str(image)]
    subprocess.run([*ext4, f"{PARTITION_BYTES // 1024}k"], check=True, capture_output=True)
    return image


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """A folder with a space in its name; whatever is mounted there is unmounted after the test."""
    point = tmp_path / "mounted here"
    point.mkdir()
    yield point
    if point.is_mount():
        subprocess.run(["umount", str(point)], check=True)


def test_a_partition_is_there_when_attach_returns_its_files_are_right_and_detach_waits_for_umount(
    scratch: Path, web: WebServer, tierblk: Tierblk, disk: Path, files: Path, mount_point: Path
) -> None:
    """GPT, ext4, mount -o ro, compare, a refused detach, umount, detach."""
    device = tierblk.attach(tierblk.config("disk", web.url_of(disk), scratch / "cache", "16MiB"))
    partition = Path(f"{device}p1")
    assert partition.is_block_device()
    _sizes_and_read_only(device)

    subprocess.run(["mount", "-o", "ro", str(partition), str(mount_point)], check=True)
    names = [f"etc/file{number}" for number in range(6)]
    assert filecmp.cmpfiles(files, mount_point, names, shallow=False) == (names, [], [])
    assert os.readlink(mount_point / "link") == "etc/file3"

    for words in (("detach", "disk"), ("stop",)):
        refused = tierblk.run(*words, check=False)
        assert refused.returncode == 7
        assert f"{device} is in use: mounted at {mount_point}" in refused.stderr
        assert f"hint: umount {mount_point}" in refused.stderr
    assert tierblk.status("disk")["state"] == "ok"
    assert (mount_point / "etc/file4").stat().st_size == 65537

    subprocess.run(["umount", str(mount_point)], check=True)
    tierblk.run("detach", "disk")
    assert devices() == []


def _sizes_and_read_only(device: Path) -> None:
    asked = ["blockdev", "--getss", "--getpbsz", "--getro", "--getsize64", str(device)]
    shown = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    assert shown == ["512", "4096", "1", str(IMAGE_BYTES)]
    with pytest.raises(OSError, match=r"not permitted|denied|Read-only"):
        _write(device)


def _write(device: Path) -> None:
    fd = os.open(device, os.O_RDWR)
    try:
        os.write(fd, b"x")  # kernels that let it be opened refuse here
    finally:
        os.close(fd)


@on_newest
def test_an_image_that_was_cut_off_is_attached_with_a_warning(
    scratch: Path, web: WebServer, tierblk: Tierblk, disk: Path
) -> None:
    """Its table speaks of more than there is: said once on stderr, and in `status`; the bytes are right."""
    os.truncate(disk, IMAGE_BYTES // 2)
    config = tierblk.config("cut", web.url_of(disk), scratch / "cache", "16MiB")
    attached = tierblk.run("attach", config)
    device = Path(attached.stdout.strip())
    assert attached.stdout == f"{device}\n"
    assert attached.stderr.startswith("tierblk: warning: ")
    assert attached.stderr.count("\n") == 1
    assert "partition" in attached.stderr
    assert tierblk.status("cut")["warnings"]
    compare_whole(device, disk)


@on_oldest
def test_a_server_that_breaks_after_the_first_sectors_ends_the_attach(
    scratch: Path, tierblk: Tierblk, disk: Path
) -> None:
    """The kernel's look for the table's backup would wait for ever, and nobody could end the attach."""
    patient = {**IMPATIENT, "device__on_outage": "wait"}
    with moody(disk.read_bytes()) as server:
        server.broken_from = IMAGE_BYTES - MIB
        config = tierblk.config("broken", server.url, scratch / "cache", "16MiB", **patient)
        began_s = time.monotonic()
        answer = tierblk.run("attach", config, check=False)
        assert answer.returncode == 4, answer.stderr
        assert time.monotonic() - began_s < IMPATIENT_LIMIT_S
        assert devices() == []
