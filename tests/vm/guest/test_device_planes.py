"""How bytes get into requests, by every plane that the kernel grants and through several queues (I1)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.device_rig import MIB, compare_at_random, compare_whole
from tests.vm.guest.helpers import Tierblk, WebServer
from tierblk.core import ublk

IMAGE_BYTES = 8 * MIB + 3 * 512
ZERO_COPY_SINCE = (6, 16)
HAS_ZERO_COPY = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= ZERO_COPY_SINCE
PLANES = ["copy", "zero-copy"] if HAS_ZERO_COPY else ["copy"]
CPUS = len(os.sched_getaffinity(0))


def _with_holes(path: Path, seed: int) -> None:
    """Zeroes a third of the pages: alone, in runs, and at both ends of blocks."""
    chance = random.Random(seed)
    with open(path, "r+b") as file:
        for page in range(IMAGE_BYTES // 4096):
            if chance.random() < 0.33:
                file.seek(page * 4096)
                file.write(bytes(4096))


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("plane", PLANES)
def test_every_plane_reads_right_cold_warm_and_evicted(
    plane: str,
    queues: int,
    scratch: Path,
    web: WebServer,
    tierblk: Tierblk,
    make_image: Callable[..., Path],
) -> None:
    """Pages out of slots, out of staging memory and of zeros, in one request; a cache that is too small."""
    image = make_image(f"{plane}.raw", IMAGE_BYTES, seed=61)
    _with_holes(image, seed=62)
    keys: dict[str, Any] = {"device__plane": plane, "device__queues": queues}
    roomy = tierblk.attach(tierblk.config("roomy", web.url_of(image), scratch / "roomy", "16MiB", **keys))
    for seed in (63, 64):
        compare_at_random(roomy, image, count=30, seed=seed)
        compare_whole(roomy, image)
    status = tierblk.status("roomy")
    assert (status["plane"], status["queues"], status["errors"]) == (plane, min(queues, CPUS), 0)
    assert status["bounced"] == 0
    assert status["fetched_bytes"] == IMAGE_BYTES
    tierblk.run("stop")

    big = make_image(f"{plane}-big.raw", 4 * IMAGE_BYTES, seed=65)
    small = tierblk.attach(tierblk.config("small", web.url_of(big), scratch / "small", "16MiB", **keys))
    compare_whole(small, big)
    compare_at_random(small, big, count=40, seed=66)
    status = tierblk.status("small")
    assert status["errors"] == 0
    assert status["latencies"]["hit"]["requests"] == status["hit_requests"] > 0
    assert status["latencies"]["miss"]["requests"] == status["miss_requests"] > 0


def test_the_best_plane_is_taken_and_one_that_is_not_there_is_refused(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """6.12 has plane copy only; what it was asked for in vain is said, and no device is left."""
    image = make_image("plane.raw", MIB, seed=67)
    tierblk.attach(tierblk.config("auto", web.url_of(image), scratch / "cache", "16MiB"))
    assert tierblk.status("auto")["plane"] == ("zero-copy" if HAS_ZERO_COPY else "copy")
    wished = tierblk.config(
        "wished", web.url_of(image), scratch / "cache", "16MiB", device__plane="zero-copy"
    )
    if HAS_ZERO_COPY:
        compare_whole(tierblk.attach(wished), image)
        return
    done = tierblk.run("attach", wished, check=False)
    assert done.returncode == 7
    assert "no plane zero-copy" in done.stderr
    assert [device["name"] for device in tierblk.json("list")["devices"]] == ["auto"]


def test_each_queue_serves_the_processors_that_the_kernel_gives_it(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Threads stay where their requests come from, and both of them work."""
    image = make_image("cpus.raw", 4 * MIB, seed=68)
    config = tierblk.config("cpus", web.url_of(image), scratch / "cache", "16MiB", device__queues=2)
    device = tierblk.attach(config)
    pid = tierblk.json("status")["daemons"][0]["pid"]
    dev_id = int(device.name.removeprefix("ublkb"))
    threads = {
        (task / "comm").read_text().strip(): os.sched_getaffinity(int(task.name))
        for task in Path(f"/proc/{pid}/task").iterdir()
    }
    if CPUS > 1:
        for q_id, name in enumerate((f"tb-queue-{dev_id}", f"tb-queue-{dev_id}.1")):
            wished = int.from_bytes(ublk.queue_cpus(dev_id, q_id), "little")
            assert sum(1 << cpu for cpu in threads[name]) == wished
    ours = os.sched_getaffinity(0)
    try:
        for cpu in sorted(ours):
            os.sched_setaffinity(0, {cpu})
            before = tierblk.status("cpus")["requests"]
            compare_at_random(device, image, count=5, seed=69 + cpu)
            assert tierblk.status("cpus")["requests"] > before
    finally:
        os.sched_setaffinity(0, ours)


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("plane", PLANES)
def test_the_memory_tier_serves_what_is_hot(
    plane: str,
    queues: int,
    scratch: Path,
    web: WebServer,
    tierblk: Tierblk,
    make_image: Callable[..., Path],
) -> None:
    """Right bytes out of memory, in requests of every size, at once and by turns with those from slots; and a
    device that can be handed over and taken away while frames are held."""
    image = make_image(f"hot-{plane}.raw", IMAGE_BYTES, seed=71)
    _with_holes(image, seed=72)
    keys: dict[str, Any] = {"device__plane": plane, "device__queues": queues, "device__hot_memory": "2MiB"}
    hot = tierblk.attach(tierblk.config("hot", web.url_of(image), scratch / "hot", "16MiB", **keys))
    compare_whole(hot, image)
    for seed in range(73, 81):
        compare_at_random(hot, image, count=60, seed=seed, limit_bytes=MIB)
        compare_at_random(hot, image, count=10, seed=seed)
    status = tierblk.status("hot")
    assert status["errors"] == 0
    assert status["memory_requests"] > 100
    assert status["latencies"]["memory"]["requests"] == status["memory_requests"]
    assert status["hit_requests"] > status["memory_requests"]  # the holes, and what is not hot
    assert (status["bounced"] > 0) is (plane == "zero-copy")  # what brings its bytes into a frame
    tierblk.run("stop", "--cache-dir", scratch / "hot")
