"""How fast writes may take new slots: what the pace is, and that the core keeps to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine_rig import TIMEOUT_S, Rig
from tierblk.cache import Throttle, Watermarks
from tierblk.cache.throttle import LEAST_PER_S, LOOK_MAX_S, LOOK_MIN_S
from tierblk.core import BLOCK_BYTES, LocalDoor, map_bytes

WORDS = b"w" * 4096
MARKS = Watermarks(low_slots=100, high_slots=200)


def test_nothing_is_paced_while_enough_is_free_or_nothing_is_known() -> None:
    throttle = Throttle(MARKS)
    assert throttle.blocks_per_s(free=1, coming=50) is None
    throttle.committed(0.1)
    assert throttle.blocks_per_s(free=100, coming=50) is None
    assert throttle.blocks_per_s(free=99, coming=0) is None, (
        "nothing will ever come: the rest is the writers'"
    )
    assert throttle.blocks_per_s(free=99, coming=1) is not None


def test_the_pace_falls_with_what_is_free_and_with_slow_commits() -> None:
    throttle = Throttle(MARKS)
    throttle.committed(0.1)
    paces = [throttle.blocks_per_s(free=free, coming=1) or 0 for free in (99, 50, 10, 0)]
    assert paces == [pytest.approx(1980), pytest.approx(1000), pytest.approx(200), LEAST_PER_S]
    for _ in range(20):
        throttle.committed(1.0)
    assert throttle.blocks_per_s(free=50, coming=1) == pytest.approx(100, rel=0.05)


def test_what_is_free_lasts_for_a_commit() -> None:
    """Writers as fast as they may, looked at as often as is asked for: a seventh is left at the end of it."""
    throttle = Throttle(MARKS)
    throttle.committed(0.2)
    free, now_s = 99.0, 0.0
    while now_s < 0.2:
        free -= (throttle.blocks_per_s(free=int(free), coming=1) or 1e9) * throttle.look_s
        now_s += throttle.look_s
    assert free > 99 / 15


@pytest.mark.parametrize(("commit_s", "look_s"), [(0.001, LOOK_MIN_S), (0.2, 0.02), (30, LOOK_MAX_S)])
def test_how_often_it_looks(commit_s: float, look_s: float) -> None:
    throttle = Throttle(MARKS)
    throttle.committed(commit_s)
    assert throttle.look_s == pytest.approx(look_s)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, bytes(BLOCK_BYTES), 200)
    yield rig
    rig.close()


@contextmanager
def volume_door(rig: Rig, folder: Path, blocks: int) -> Iterator[LocalDoor]:
    size_bytes = blocks * BLOCK_BYTES
    with (folder / "volume.map").open("w+b") as file:
        file.truncate(map_bytes(size_bytes))
        layer = rig.engine.open_layer(2, file.fileno(), size_bytes, kind="local")
        door = LocalDoor(rig.engine, None, volume=layer, queue_depth=8)
        try:
            yield door
        finally:
            door.drain()
            door.quit()
            door.close()


def test_new_blocks_keep_the_pace_and_written_ones_do_not(rig: Rig, tmp_path: Path) -> None:
    """Twenty tickets of 10 ms last 190 ms at least, whoever takes them."""
    with volume_door(rig, tmp_path, 100) as door, ThreadPoolExecutor(5) as pool:

        def write(block: int) -> None:
            door.write(block * BLOCK_BYTES, WORDS)

        rig.engine.set_pace(100)
        began_s = time.monotonic()
        list(pool.map(write, range(20), timeout=TIMEOUT_S))
        assert time.monotonic() - began_s >= 0.19
        paced = door.stats()["paced"]
        assert 0 < paced <= 20
        for block in range(20):
            door.write(block * BLOCK_BYTES + len(WORDS), WORDS)
        assert door.stats()["paced"] == paced
        rig.engine.set_pace(None)
        list(pool.map(write, range(20, 90), timeout=TIMEOUT_S))
        assert door.stats()["paced"] == paced
        assert door.stats()["waiting"] == 0
        for block in range(90):
            assert door.read(block * BLOCK_BYTES, len(WORDS)) == WORDS


def test_nobody_waits_behind_tickets_of_a_slower_pace(rig: Rig, tmp_path: Path) -> None:
    with volume_door(rig, tmp_path, 100) as door, ThreadPoolExecutor(3) as pool:
        rig.engine.set_pace(0.5)
        calls = [pool.submit(door.write, block * BLOCK_BYTES, WORDS) for block in range(3)]
        wait_for(lambda: door.stats()["paced"] == 2)
        rig.engine.set_pace(None)
        door.write(50 * BLOCK_BYTES, WORDS)
        for call in calls:
            call.result(TIMEOUT_S)
        rig.engine.set_pace(1000)
        door.write(60 * BLOCK_BYTES, WORDS)
        assert door.stats()["paced"] == 2


def test_a_door_that_drains_waits_for_no_ticket(rig: Rig, tmp_path: Path) -> None:
    """Tickets of two seconds, of which four calls would wait for seconds."""
    rig.engine.set_pace(0.5)
    with ThreadPoolExecutor(5) as pool:
        with volume_door(rig, tmp_path, 100) as door:
            calls = [pool.submit(door.write, block * BLOCK_BYTES, WORDS) for block in range(5)]
            wait_for(lambda: door.stats()["paced"] == 4)
        for call in calls:
            call.result(TIMEOUT_S)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)
