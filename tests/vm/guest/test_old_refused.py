"""What cannot work ends in one clear sentence and a documented exit code, and changes nothing."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.guest.device_rig import MIB, compare_whole, devices, moody
from tests.vm.guest.helpers import Answer, Tierblk, WebServer, tierblk_processes, wait_until, write_image

IMAGE_BYTES = MIB
VERSION_AT = 8
CRC_AT = 508
COPY_BYTES = 4096
NOBODY = "65534"


def refused(answer: Answer, exit_code: int, *words: str) -> None:
    """One sentence, perhaps a hint, with these words on stderr; nothing on stdout, no device, no daemon."""
    assert answer.returncode == exit_code, answer.stderr
    assert answer.stdout == ""
    lines = answer.stderr.splitlines()
    assert lines[0].startswith("tierblk: "), answer.stderr
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), answer.stderr
    for word in words:
        assert word in answer.stderr
    assert "Traceback" not in answer.stderr
    assert devices() == []
    wait_until(lambda: not tierblk_processes(), 10, lambda: f"still there: {tierblk_processes()}")


def test_a_bad_config_names_all_its_faults_and_a_missing_one_itself(scratch: Path, tierblk: Tierblk) -> None:
    """Nothing is started for it."""
    cache = scratch / "cache"
    config = tierblk.config("Bad Name", "gopher://x/", cache, "16MiB", cache__sise="1GiB")
    answer = tierblk.run("attach", config, check=False)
    assert answer.returncode == 3
    assert answer.stdout == ""
    assert "has 3 errors" in answer.stderr
    for key in ("device.name: ", "base.url: ", "cache.sise: unknown key"):
        assert key in answer.stderr
    refused(tierblk.run("attach", scratch / "none.toml", check=False), 3, f"{scratch}/none.toml")
    assert list(scratch.iterdir()) == []


def test_a_remote_that_cannot_be_used_leaves_no_cache_directory(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Nobody listens; no ranges; a size that no disk has."""
    cache = scratch / "cache"

    def attach(url: str) -> Answer:
        return tierblk.run("attach", tierblk.config("remote", url, cache, "16MiB"), check=False)

    refused(attach("http://127.0.0.1:9/x.raw"), 4, "http://127.0.0.1:9/x.raw", "refused")
    odd = make_image("odd.raw", IMAGE_BYTES + 100)
    refused(attach(web.url_of(odd)), 5, f"{IMAGE_BYTES + 100} bytes", "512")
    with moody(bytes(IMAGE_BYTES)) as server:
        server.mood = "whole"
        refused(attach(server.url), 5, server.url, "range")
    assert not cache.exists()


def test_without_the_module_the_sentence_says_how_to_load_it(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """And `doctor` says it too; with the module back, the same config works."""
    image = make_image("module.raw", IMAGE_BYTES)
    config = tierblk.config("module", web.url_of(image), scratch / "cache", "16MiB")
    subprocess.run(["rmmod", "ublk_drv"], check=True)
    try:
        wait_until(lambda: not Path("/dev/ublk-control").exists(), 10, "/dev/ublk-control stays")
        refused(tierblk.run("attach", config, check=False), 7, "/dev/ublk-control", "modprobe ublk_drv")
        assert not (scratch / "cache").exists()
        doctor = tierblk.run("doctor", check=False)
        assert doctor.returncode == 7
        assert "ublk" in doctor.stdout
    finally:
        subprocess.run(["modprobe", "ublk_drv"], check=True)
        wait_until(Path("/dev/ublk-control").exists, 10, "no /dev/ublk-control")
    compare_whole(tierblk.attach(config), image)


def test_without_permission_the_sentence_says_to_run_it_as_root(
    scratch: Path, web: WebServer, make_image: Callable[..., Path]
) -> None:
    """As user nobody, with a config that nobody may read and a run directory of its own."""
    image = make_image("nobody.raw", IMAGE_BYTES)
    shared = Path("/var/tmp/nobody")
    config = Tierblk(shared).config("nobody", web.url_of(image), scratch / "cache", "16MiB")
    try:
        for run_dir, exit_code in ((None, 8), (shared / "run", 7)):
            environment = dict(os.environ)
            if run_dir is not None:
                run_dir.mkdir()
                os.chown(run_dir, int(NOBODY), int(NOBODY))
                environment["TIERBLK_RUN_DIR"] = str(run_dir)
            as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            done = subprocess.run(
                [*as_nobody, sys.executable, "-m", "tierblk", "attach", str(config)],
                capture_output=True, text=True, check=False, timeout=120, env=environment, cwd="/",
            )  # fmt: skip
            answer = Answer(done.returncode, done.stdout, done.stderr)
            refused(answer, exit_code, "as root")
            assert not (scratch / "cache").exists()
    finally:
        subprocess.run(["rm", "-r", str(shared)], check=True)


@pytest.fixture
def small_disk(scratch: Path) -> Iterator[Path]:
    """A tmpfs of 28 MiB."""
    folder = scratch / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_too_full_for_the_cache_is_refused_and_one_that_fills_up_later_does_no_harm(
    small_disk: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """The cache's space is reserved when it is made: whoever fills the disk afterwards takes none of it."""
    image = make_image("full.raw", 4 * MIB)
    too_large = tierblk.config("full", web.url_of(image), small_disk / "cache", "32MiB")
    refused(tierblk.run("attach", too_large, check=False), 6, str(small_disk / "cache"), "MiB are free")
    assert list(small_disk.iterdir()) == []

    device = tierblk.attach(tierblk.config("full", web.url_of(image), small_disk / "cache", "16MiB"))
    with pytest.raises(OSError, match="No space"):
        write_image(small_disk / "junk", 32 * MIB, seed=1)
    compare_whole(device, image)
    compare_whole(device, image)
    status = tierblk.status("full")
    assert status["errors"] == 0
    assert status["state"] in ("ok", "degraded")
    tierblk.run("stop")


def test_a_cache_directory_of_a_newer_version_or_with_garbage_for_a_superblock_is_left_alone(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Each is refused by name, and every file in it is as it was before."""
    image = make_image("version.raw", IMAGE_BYTES)
    cache = scratch / "cache"
    config = tierblk.config("version", web.url_of(image), cache, "16MiB")
    compare_whole(tierblk.attach(config), image)
    tierblk.run("stop")
    slots = cache / "slots"
    original = _head(slots)

    _overwrite(slots, _newer(original[:COPY_BYTES]) + _newer(original[COPY_BYTES:]))
    _refused_untouched(tierblk, config, cache, "newer tierblk")
    _overwrite(slots, bytes(range(256)) * (2 * COPY_BYTES // 256))
    _refused_untouched(tierblk, config, cache, "not a slots file of tierblk")


def _newer(superblock: bytes) -> bytes:
    """The same superblock as a later version of the format would write it, checksum included."""
    from tierblk.core import crc32c

    (version,) = struct.unpack_from("<I", superblock, VERSION_AT)
    head = superblock[:VERSION_AT] + struct.pack("<I", version + 1) + superblock[VERSION_AT + 4 : CRC_AT]
    return head + struct.pack("<I", crc32c(head)) + superblock[CRC_AT + 4 :]


def _overwrite(path: Path, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(data)
        os.fsync(file.fileno())


def _refused_untouched(tierblk: Tierblk, config: Path, folder: Path, *words: str) -> None:
    before = _content(folder)
    refused(tierblk.run("attach", config, check=False), 6, str(folder), *words)
    assert _content(folder) == before


def _content(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Of each file: how it begins, its length, and when it was last written to."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (_head(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2 * COPY_BYTES)
