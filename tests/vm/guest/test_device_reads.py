"""What a device shows is the image: cold, warm and offline, by reads of every size and alignment (I1)."""

from __future__ import annotations

from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any

from tests.vm.guest.device_rig import (
    IMPATIENT,
    IMPATIENT_LIMIT_S,
    MIB,
    WaitingReader,
    compare_at_random,
    compare_whole,
    image_bytes,
    read,
    wait_for_status,
)
from tests.vm.guest.helpers import Tierblk, WebServer, on_newest, on_oldest

IMAGE_BYTES = 64 * MIB + 3 * 512  # the last page is not whole
WARM_BYTES = 4 * MIB


def test_the_device_equals_the_image_cold_and_warm_with_a_cache_a_quarter_of_it(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Random reads, then every byte, then random reads while blocks come and go (I1, I4)."""
    image = make_image("quarter.raw", IMAGE_BYTES, seed=11)
    config = tierblk.config("quarter", web.url_of(image), scratch / "cache", "16MiB")
    device = tierblk.attach(config)
    compare_at_random(device, image, count=20, seed=1)
    compare_whole(device, image)
    compare_at_random(device, image, count=20, seed=2)
    before, after = _warm_pass(tierblk, device, image)
    assert (after["errors"], after["state"]) == (0, "ok")
    assert after["size_bytes"] == IMAGE_BYTES
    assert after["hit_bytes"] - before["hit_bytes"] >= WARM_BYTES
    assert after["cached_bytes"] <= 16 * MIB
    compare_at_random(device, image, count=20, seed=3, limit_bytes=WARM_BYTES)


def _warm_pass(tierblk: Tierblk, device: Path, image: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The status before and after the first pass over the warm part in which no reader waited for the
    network.

    It may take a few: in a full cache, what comes faster than space is made passes through without being
    kept, and space is made after the last fill too. What is fetched ahead of the part's end is no miss of a
    reader.
    """
    before = tierblk.status("quarter")
    for _ in range(10):
        compare_whole(device, image, limit_bytes=WARM_BYTES)
        after = tierblk.status("quarter")
        if after["miss_bytes"] == before["miss_bytes"]:
            return before, after
        before = after
    raise AssertionError(f"{WARM_BYTES} bytes read ten times over are not kept: {after}")


@on_newest
def test_without_a_server_the_cached_part_is_right_and_the_rest_is_eio_until_it_is_back(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """An outage: hits go on, misses end after the bounded retry, `status` says why; it heals by itself."""
    image = make_image("outage.raw", IMAGE_BYTES, seed=12)
    config = tierblk.config("outage", web.url_of(image), scratch / "cache", "16MiB", **IMPATIENT)
    device = tierblk.attach(config)
    compare_whole(device, image, limit_bytes=WARM_BYTES)
    web.stop()
    compare_at_random(device, image, count=10, seed=4, limit_bytes=WARM_BYTES)
    readers = [WaitingReader(device, at * MIB) for at in (20, 40, 64)]
    assert [reader.result(IMPATIENT_LIMIT_S) for reader in readers] == [EIO] * 3
    status = tierblk.status("outage")
    assert status["state"] == "degraded"
    assert "127.0.0.1:8080" in status["reason"]
    assert status["since"] is not None
    assert status["errors"] >= 3
    compare_whole(device, image, limit_bytes=WARM_BYTES)
    web.start()
    with image_bytes(image) as wanted:
        assert read(device, 20 * MIB, MIB) == wanted[20 * MIB : 21 * MIB]
    wait_for_status(tierblk, "outage", lambda now: now["state"] == "ok" and now["reason"] is None)
    compare_at_random(device, image, count=10, seed=5)


@on_oldest
def test_a_cached_image_is_attached_without_its_server_after_a_restart_of_the_daemon(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """A clean stop, no network, and the disk is there again, whole."""
    image = make_image("offline.raw", WARM_BYTES, seed=13)
    config = tierblk.config("offline", web.url_of(image), scratch / "cache", "16MiB", **IMPATIENT)
    compare_whole(tierblk.attach(config), image)
    tierblk.run("stop")
    web.stop()
    device = tierblk.attach(config)
    compare_at_random(device, image, count=10, seed=6)
    compare_whole(device, image)
    status = tierblk.status("offline")
    assert (status["fetched_bytes"], status["errors"]) == (0, 0)
    assert status["cached_bytes"] == WARM_BYTES
