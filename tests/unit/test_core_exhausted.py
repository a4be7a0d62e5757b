"""When fills run out, because readers left theirs behind."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tierblk.core import (
    BLOCK_BYTES,
    FAIL,
    FILL,
    FILL_WHOLE,
    FILLED,
    LEFT,
    MAX_TAGS,
    MISS,
    WAITED,
    Engine,
    LocalDoor,
    Record,
    map_bytes,
)

FILLS_MAX = 2 * MAX_TAGS
DEPTH = 4000
LAYER_BYTES = 3 * FILLS_MAX * BLOCK_BYTES
TIMEOUT_S = 30.0


class Bare:
    """An engine over a layer of many blocks, whose misses nobody answers unless a test does."""

    def __init__(self, directory: Path) -> None:
        self.fds = []
        for name in ("slots", "sums"):
            path = directory / name
            path.write_bytes(bytes(64 * BLOCK_BYTES if name == "slots" else 64 * 64))
            self.fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self.fds.append(os.memfd_create("map"))
        os.truncate(self.fds[2], map_bytes(LAYER_BYTES))
        self.engine = Engine(
            slots_fd=self.fds[0], slot_count=64, sums_fd=self.fds[1], staging_bytes=16 * BLOCK_BYTES
        )
        self.layer = self.engine.open_layer(1, self.fds[2], LAYER_BYTES)
        self.engine.finish_load()
        self.asked: dict[int, Record] = {}  # by token
        self.left: set[int] = set()  # tokens

    def poll(self) -> None:
        for event in self.engine.poll():
            if event.kind == MISS:
                self.asked[event.token] = event
            elif event.kind == FILLED:
                self.asked.pop(event.token, None)  # a FAIL may have come too late
                self.left.discard(event.token)
            elif event.kind == LEFT:
                self.left.add(event.token)
            elif event.kind == WAITED:
                self.left.remove(event.token)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, (len(self.asked), len(self.left))
            self.poll()

    def fail_all(self) -> None:
        self.engine.push([Record(FAIL, token=token, result=-5) for token in self.asked])
        self.until(lambda: not self.asked)

    def close(self) -> None:
        self.fail_all()
        self.engine.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Bare]:
    bare = Bare(tmp_path)
    yield bare
    bare.close()


def test_who_finds_no_fill_waits_for_one(bare: Bare) -> None:
    """Readers whose patience is over leave their fills running. When all are in use nobody gets an error for
    it: whoever comes waits, as long as his patience says, and goes on when one of them ends."""
    hasty = LocalDoor(bare.engine, bare.layer, queue_depth=DEPTH)
    patient = LocalDoor(bare.engine, bare.layer, queue_depth=1)
    short = LocalDoor(bare.engine, bare.layer, queue_depth=1)
    hasty.set_patience(0.05)
    short.set_patience(0.3)
    length = DEPTH * BLOCK_BYTES
    with ThreadPoolExecutor(3) as pool:
        for turn in range(-(-FILLS_MAX // DEPTH)):
            read = pool.submit(hasty.read, turn * length, length)
            bare.until(read.done)
            assert isinstance(read.exception(), OSError)
        bare.until(lambda: bare.engine.stats()["fills"] == FILLS_MAX == len(bare.left))

        last = LAYER_BYTES - BLOCK_BYTES
        ended = pool.submit(short.read, last, BLOCK_BYTES)
        waits: Future[bytes] = pool.submit(patient.read, last, BLOCK_BYTES)
        bare.until(ended.done)
        error = ended.exception()
        assert isinstance(error, OSError)
        assert error.errno == 5
        assert not waits.done()
        assert patient.stats()["waiting"] == 1

        gone = next(iter(bare.asked))
        bare.engine.push([Record(FAIL, token=gone, result=-5)])
        block = last // BLOCK_BYTES
        bare.until(lambda: any(record.block == block for record in bare.asked.values()))
        token = next(token for token, record in bare.asked.items() if record.block == block)
        bare.engine.staging[:BLOCK_BYTES] = b"\1" * BLOCK_BYTES
        bare.engine.push([Record(FILL, 1, token, block, 0, FILL_WHOLE, 0xFFFF)])
        bare.until(waits.done)
        assert waits.result() == b"\1" * BLOCK_BYTES
    for door in (hasty, patient, short):
        door.drain()
        door.quit()
        door.close()


def test_who_waits_for_a_fill_is_freed_by_a_drain(bare: Bare) -> None:
    door = LocalDoor(bare.engine, bare.layer, queue_depth=DEPTH)
    other = LocalDoor(bare.engine, bare.layer, queue_depth=1)
    door.set_patience(0.05)
    length = DEPTH * BLOCK_BYTES
    with ThreadPoolExecutor(2) as pool:
        for turn in range(-(-FILLS_MAX // DEPTH)):
            read = pool.submit(door.read, turn * length, length)
            bare.until(read.done)
        waits = pool.submit(other.read, LAYER_BYTES - BLOCK_BYTES, BLOCK_BYTES)
        bare.until(lambda: other.stats()["waiting"] == 1)
        other.drain()
        bare.until(waits.done)
        assert isinstance(waits.exception(), OSError)
    for each in (door, other):
        each.drain()
        each.quit()
        each.close()


def test_a_reader_who_leaves_and_one_who_comes_again_are_told_of(bare: Bare) -> None:
    """LEFT when the last one has gone; a MISS that nobody waits for any more says so from the beginning."""
    door = LocalDoor(bare.engine, bare.layer, queue_depth=4)
    door.set_patience(0.05)
    with ThreadPoolExecutor(2) as pool:
        with suppress(OSError):
            door.read(0, 512)
        bare.until(lambda: len(bare.left) == 1)
        (token,) = bare.left
        door.set_patience(math.inf)
        again = pool.submit(door.read, 512, 512)
        bare.until(lambda: not bare.left)
        bare.engine.push([Record(FILL, 1, token, 0, 0, FILL_WHOLE, 0xFFFF)])
        bare.until(again.done)
        assert again.result() == bytes(512)
    door.drain()
    door.quit()
    door.close()
