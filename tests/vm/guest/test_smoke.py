"""The VM itself: its kernel has ublk, its web server serves ranges, its scratch disk does O_DIRECT."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.vm.guest.helpers import WebServer

PAGE_BYTES = 4096


def test_the_control_node_of_ublk_is_there(ublk_module: Path) -> None:
    """The module is in, and udev is not needed for its node."""
    assert stat.S_ISCHR(ublk_module.stat().st_mode)
    assert "ublk_drv" in Path("/proc/modules").read_text()


def test_the_web_server_serves_ranges(web: WebServer, make_image: Callable[..., Path]) -> None:
    """Bytes of a seeded image, asked for as tierblk asks."""
    image = make_image("smoke.raw", 1 << 20, seed=7)
    command = ["curl", "-s", "-f", "-r", "65536-131071", web.url_of(image)]
    body = subprocess.run(command, capture_output=True, check=True).stdout
    assert body == image.read_bytes()[65536:131072]
    assert [(entry.status, entry.range_) for entry in web.requests("/smoke")] == [(206, "bytes=65536-131071")]


def test_the_scratch_disk_does_direct_io(scratch: Path) -> None:
    """The cache directory needs it."""
    file = os.open(scratch / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(file, 0, 16 * PAGE_BYTES)
    finally:
        os.close(file)


def test_the_project_is_there() -> None:
    """The package that was built outside, its C core included, loads in here."""
    import tierblk

    assert Path(tierblk.__file__).is_relative_to("/opt/tierblk/lib")
