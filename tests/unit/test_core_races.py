"""The engine where threads meet: doors that come and go, reads under way at the end, and what is left behind
when something cannot be had. What needs an unlucky moment is tried often, not proved."""

from __future__ import annotations

import itertools
import os
import random
import resource
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine_rig import Rig
from tierblk.core import (
    BLOCK_BYTES,
    EVICT,
    FAIL,
    FILL,
    FILLED,
    MISS,
    PAGE_BYTES,
    Engine,
    LocalDoor,
    Record,
    local_door,
)

BLOCKS = 24
IMAGE = random.Random(21).randbytes(BLOCKS * BLOCK_BYTES - 3 * 512)
SECTORS = len(IMAGE) // 512


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 40)
    yield rig
    rig.close()


def test_reads_under_way_at_a_quit_are_finished(rig: Rig) -> None:
    rig.finish(rig.read(0, len(IMAGE)))
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            door = LocalDoor(rig.engine, rig.layer, queue_depth=1)
            begun = threading.Barrier(4)

            def read(door: LocalDoor = door, begun: threading.Barrier = begun) -> bytes:
                begun.wait(10)
                return door.read(0, len(IMAGE))

            reads = [pool.submit(read) for _ in range(3)]
            begun.wait(10)
            while door.stats()["requests"] < 4:  # all on their way, most of it still to do
                os.sched_yield()
            door.quit()
            assert all(read.result(10) == IMAGE for read in reads)
            door.close()


def test_a_door_without_descriptors_left_is_an_error_and_leaves_nothing(rig: Rig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(3):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
        try:
            with pytest.raises(OSError, match="cannot open a local door"):
                LocalDoor(rig.engine, rig.layer)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    door = LocalDoor(rig.engine, rig.layer)  # and the engine goes on
    door.quit()
    door.close()


@pytest.mark.parametrize("size_bytes", [2**64 - 512, 2**63])
def test_i12_a_size_that_no_file_has_is_refused(rig: Rig, size_bytes: int) -> None:
    with pytest.raises(OSError, match="File too large"):
        rig.engine.open_layer(2, rig._fds[2], size_bytes)


def test_r6_a_row_that_changes_while_it_is_taken_is_taken_again(tmp_path: Path) -> None:
    """Blocks of a row are filled, two right behind one another, while another thread takes what has changed
    without a pause: the last copy of the row is always what the map says."""
    rig = Rig(tmp_path, bytes(64 * 64 * BLOCK_BYTES), 8)
    copies: dict[int, bytes] = {}
    taking, over = threading.Lock(), threading.Event()

    def take() -> None:
        while not over.is_set():
            with taking:
                copies.update(rig.layer.take_changed(1))

    with ThreadPoolExecutor(1) as pool:
        taker = pool.submit(take)
        try:
            for block in range(0, rig.layer.blocks, 2):
                rig.finish(rig.read(block * BLOCK_BYTES, 2 * BLOCK_BYTES))
                with taking:
                    copies.update(rig.layer.take_changed(1))
                    assert copies[block // 64] == rig.layer.peek_row(block // 64)
        finally:
            over.set()
        taker.result(10)
    rig.close()


def test_events_after_one_that_raised_still_wake(rig: Rig) -> None:
    """More misses than one call of the core brings; the handler dies of the first of them."""
    rig.close()
    big = Rig(rig.slots_path.parent, bytes(600 * BLOCK_BYTES), 8)
    with ThreadPoolExecutor(1) as pool, local_door(big.engine, big.layer, queue_depth=400) as door:
        read = pool.submit(door.read, 0, 400 * BLOCK_BYTES)
        deadline = time.monotonic() + 10
        while door.stats()["waiting"] < 400:
            assert time.monotonic() < deadline
            os.sched_yield()
        for event in big.engine.poll():
            assert event.kind == MISS
            break
        other = big.read(500 * BLOCK_BYTES, 512)
        assert select.select([big.engine.event_fd], [], [], 10)[0]
        big.until(lambda: 500 in big.asked)
        big.fill(500)
        assert other.result(10) == bytes(512)
        door.drain()
        assert isinstance(read.exception(10), OSError)
    big.close()


class Answers:
    """Answers every miss, in pieces and out of order, and evicts and commits meanwhile."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.open: dict[int, tuple[Record, int, int]] = {}
        self.places = list(range(64))
        self.failed = 0
        self.evicting = False

    def step(self) -> None:
        engine: Engine = self.rig.engine
        for event in engine.poll():
            if event.kind == MISS:
                assert event.block not in self.open  # I7
                self.open[event.block] = (event, self.places.pop(), 0)
            elif event.kind == FILLED:
                record, place, _ = self.open.pop(event.block)
                assert record.token == event.token
                engine.staging[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES] = b"\xa5" * BLOCK_BYTES
                self.places.append(place)
            else:
                self.evicting = False
        for block in self.random.sample(sorted(self.open), min(3, len(self.open))):
            self.answer(block)
        if not self.evicting and self.random.random() < 0.05:
            self.evicting = True
            engine.push([Record(EVICT, value=self.random.randint(1, BLOCKS))])
        if self.random.random() < 0.05:
            self.rig.commit(ok=self.random.random() < 0.8)

    def answer(self, block: int) -> None:
        record, place, sent = self.open[block]
        data = IMAGE[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        total = -(-len(data) // PAGE_BYTES)
        if sent == total:
            return
        if self.random.random() < 0.03:
            self.failed += 1
            self.open[block] = (record, place, total)
            self.rig.engine.push([Record(FAIL, token=record.token, result=-5)])
            return
        pages = self.random.randint(sent + 1, total)
        at, start, end = place * BLOCK_BYTES, sent * PAGE_BYTES, min(pages * PAGE_BYTES, len(data))
        self.rig.engine.staging[at + start : at + end] = data[start:end]
        self.open[block] = (record, place, pages)
        mask = (1 << pages) - 1
        self.rig.engine.push(
            [Record(FILL, 1, record.token, block, at, result=int(pages == total), pages=mask)]
        )


def read_through_many_doors(rig: Rig, seed: int, over: threading.Event) -> int:
    """Opens doors, reads through them, closes them, some with drained misses; returns how many reads were
    right."""
    chance = random.Random(seed)
    right = 0
    while not over.is_set():
        door = LocalDoor(rig.engine, rig.layer, queue_depth=chance.randint(1, 8))
        drains_at = chance.randint(0, 60)
        for i in range(30):
            if i == drains_at:
                door.drain()
            sector = chance.randrange(SECTORS)
            count = min(chance.choice([1, 8, 128, 300]), SECTORS - sector)
            try:
                got = door.read(sector * 512, count * 512)
            except OSError:  # drained, or its fill was failed
                continue
            assert got == IMAGE[sector * 512 : (sector + count) * 512], (sector, count)
            right += 1
        door.quit()
        door.close()
    return right


@pytest.mark.parametrize("slots", [4, 40])
def test_doors_that_come_and_go_under_load(tmp_path: Path, slots: int) -> None:
    rig = Rig(tmp_path, IMAGE, slots)
    answers, over = Answers(rig, slots), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        doors = [pool.submit(read_through_many_doors, rig, seed, over) for seed in range(4)]
        rounds = itertools.count()
        while next(rounds) < 3000 and not any(door.done() for door in doors):
            answers.step()
        over.set()
        while not all(door.done() for door in doors) or answers.open:
            answers.step()
    assert sum(door.result() for door in doors) > 100
    stats, used = rig.engine.stats(), {slot for slot, *_ in rig.entries().values() if slot}
    assert stats["fills"] == 0
    assert stats["free"] + stats["quarantined"] + len(used) == slots - 1
    rig.close()  # EBUSY if a tag of those doors had got lost
