"""kill -9 of the daemon of a device without recovery: what it cached is there for the next one, and nobody
waits for the dead (R1). With recovery: test_device_survives.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from errno import EIO
from pathlib import Path

from tests.vm.guest.device_rig import (
    IMPATIENT,
    MIB,
    DaemonProcess,
    WaitingReader,
    compare_whole,
    devices,
    log_of,
    moody,
    wait_for_status,
)
from tests.vm.guest.helpers import Tierblk, WebServer, wait_until

IMAGE_BYTES = 6 * MIB
CACHED_BYTES = 4 * MIB
NO_RECOVERY: dict[str, str | int] = {
    "device__recovery": False,
    "cache__commit_interval": "10m",
    "remote__readahead": False,
    "remote__max_window": "1MiB",
}


def test_after_kill_9_the_start_is_warm_nothing_is_refetched_and_the_orphan_is_deleted(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """No commit has run, so the map in memory is all that knows of the cached blocks."""
    image = make_image("killed.raw", IMAGE_BYTES, seed=31)
    cache = scratch / "cache"
    config = tierblk.config("killed", web.url_of(image), cache, "16MiB", **NO_RECOVERY)
    device = tierblk.attach(config)
    compare_whole(device, image, limit_bytes=CACHED_BYTES)
    wait_for_status(tierblk, "killed", lambda now: now["cached_bytes"] == CACHED_BYTES)
    daemon = DaemonProcess(cache)
    daemon.signal(signal.SIGKILL)
    daemon.ended(30)
    fetched = len(web.requests("/killed.raw"))

    device = tierblk.attach(config)
    assert devices() == [device.name, device.name.replace("ublkb", "ublkc")]
    assert "(warm start)" in log_of(cache)
    assert "left behind by a daemon that was killed" in log_of(cache)
    compare_whole(device, image, limit_bytes=CACHED_BYTES)
    status = tierblk.status("killed")
    assert (status["fetched_bytes"], status["miss_bytes"], status["errors"]) == (0, 0, 0)
    compare_whole(device, image)
    assert tierblk.status("killed")["fetched_bytes"] == IMAGE_BYTES - CACHED_BYTES
    assert all(entry.sent_bytes <= MIB for entry in web.requests("/killed.raw")[fetched:])


def test_readers_that_wait_when_the_daemon_is_killed_get_eio_and_the_next_daemon_serves(
    scratch: Path, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """In flight at the driver and at the web server; no process stays in D state."""
    image = make_image("inflight.raw", IMAGE_BYTES, seed=32)
    cache = scratch / "cache"
    with moody(image.read_bytes()) as server:
        config = tierblk.config("inflight", server.url, cache, "16MiB", **IMPATIENT, **NO_RECOVERY)
        device = tierblk.attach(config)
        compare_whole(device, image, limit_bytes=MIB)
        server.mood = "half"
        readers = [WaitingReader(device, at * MIB + MIB // 2 + 61440) for at in (2, 3, 4)]
        wait_until(lambda: server.held >= 3, 30, "the fetches did not begin")
        assert all(reader.waits for reader in readers)
        daemon = DaemonProcess(cache)
        daemon.signal(signal.SIGKILL)
        assert [reader.result(30) for reader in readers] == [EIO] * 3
        daemon.ended(30)
        server.mood = "right"
        compare_whole(tierblk.attach(config), image)
        assert "(warm start)" in log_of(cache)
