"""The ends of what can be set, other sources and disks, and a daemon that has done much."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.guest.device_rig import MIB, DaemonProcess, compare_at_random, compare_whole, devices, read
from tests.vm.guest.helpers import Tierblk, WebServer, on_newest, on_oldest

IMAGE_BYTES = 4 * MIB
CYCLES = 20
SETTLED_CYCLES = 4  # by then the daemon has the threads that it makes when they are first needed
DISK_BYTES = 96 * MIB


@on_newest
def test_a_queue_of_one_a_queue_of_1024_and_a_file_url_read_right(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Three devices of one daemon; the file has its own bytes, cached beside the others."""
    image, file = make_image("depth.raw", IMAGE_BYTES, seed=51), make_image("file.raw", IMAGE_BYTES, seed=52)
    cache = scratch / "cache"
    narrow = tierblk.attach(
        tierblk.config("narrow", web.url_of(image), cache, "16MiB", device__queue_depth=1)
    )
    wide = tierblk.attach(tierblk.config("wide", web.url_of(image), cache, "16MiB", device__queue_depth=1024))
    local = tierblk.attach(tierblk.config("local", f"file://{file}", cache, "16MiB"))
    for device, content in ((narrow, image), (wide, image), (local, file)):
        compare_at_random(device, content, count=8, seed=53)
        compare_whole(device, content)
    status = {device["name"]: device for device in tierblk.json("list")["devices"]}
    assert [status[name]["queue_depth"] for name in ("narrow", "wide")] == [1, 1024]
    assert [device["errors"] for device in status.values()] == [0, 0, 0]
    assert status["local"]["fetched_bytes"] == IMAGE_BYTES


@on_oldest
def test_twenty_attaches_and_detaches_leak_no_file_no_thread_and_no_device(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Asked of the daemon as the commands ask it, without a process for each."""
    from tierblk import config as configs
    from tierblk.cli.client import find_daemon

    image = make_image("cycles.raw", MIB, seed=54)
    cache = scratch / "cache"
    tierblk.attach(tierblk.config("stays", web.url_of(image), cache, "16MiB"))
    loaded = configs.load(tierblk.config("comes-and-goes", web.url_of(image), cache, "16MiB"))
    body = {"config_path": str(loaded.path), "config": loaded.to_document()}
    process, daemon = DaemonProcess(cache), find_daemon(cache)
    assert daemon is not None
    before = process.fds(), process.threads(), devices()
    for cycle in range(CYCLES):
        device = Path(str(daemon.request("POST", "/v1/devices", body)["path"]))
        assert len(read(device, cycle * 4096, 4096)) == 4096
        daemon.request("DELETE", "/v1/devices/comes-and-goes")
        if cycle == SETTLED_CYCLES:
            before = process.fds(), process.threads(), devices()
    after = process.fds(), process.threads(), devices()
    assert after[2] == before[2]
    # A connection or a helper thread more or fewer is chance; what every cycle left would be fifteen.
    assert len(after[0]) < len(before[0]) + (CYCLES - SETTLED_CYCLES) // 2, f"{before[0]}\n{after[0]}"
    assert len(after[1]) < len(before[1]) + (CYCLES - SETTLED_CYCLES) // 2, f"{before[1]}\n{after[1]}"
    stays = tierblk.status("stays")
    first = f"tb-queue-{str(stays['path']).removeprefix('/dev/ublkb')}"
    queues = [first, *(f"{first}.{n}" for n in range(1, stays["queues"]))]
    assert [name for name in after[1] if name.startswith("tb-")] == ["tb-filler", *queues]


@pytest.fixture
def disk_of_4096(scratch: Path) -> Iterator[Path]:
    """An ext4 on a disk whose sectors have 4096 bytes."""
    file, folder = scratch / "disk.img", scratch / "disk"
    with open(file, "wb") as disk:
        disk.truncate(DISK_BYTES)
    folder.mkdir()
    subprocess.run(["modprobe", "loop"], check=True)
    losetup = ["losetup", "--sector-size", "4096", "--find", "--show", str(file)]
    loop = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", loop], check=True, capture_output=True)
        subprocess.run(["mount", loop, str(folder)], check=True)
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@on_oldest
def test_a_cache_on_a_disk_with_sectors_of_4096_bytes_serves_reads_of_512(
    disk_of_4096: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """O_DIRECT on such a disk takes whole sectors only, whatever the device's users ask for."""
    image = make_image("sectors.raw", IMAGE_BYTES, seed=55)
    device = tierblk.attach(tierblk.config("sectors", web.url_of(image), disk_of_4096 / "cache", "16MiB"))
    compare_at_random(device, image, count=20, seed=56)
    compare_whole(device, image)
    before = tierblk.status("sectors")
    compare_at_random(device, image, count=20, seed=57)
    with open(image, "rb") as content:
        for sector in (1, 7, 8, 127, 128, 8191):
            content.seek(sector * 512)
            assert read(device, sector * 512, 512) == content.read(512)
    after = tierblk.status("sectors")
    assert after["fetched_bytes"] == before["fetched_bytes"] == IMAGE_BYTES
    assert after["errors"] == 0
    assert after["hit_bytes"] > before["hit_bytes"]
    # What such a disk cannot read into the request's own pages goes through the tag's buffer.
    assert (after["bounced"] > 0) == (after["plane"] == "zero-copy")
    tierblk.run("stop")
