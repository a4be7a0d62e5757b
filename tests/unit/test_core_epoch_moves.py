"""A move has its block to itself (R2): it waits for reads under way, and reads that come wait for it. A FIFO
is in the place of the slots, so that a test says when a read of them ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.core_far_rig import FarRig
from tests.engine_rig import TIMEOUT_S
from tests.pipe_rig import wait_for
from tierblk.core import BLOCK_BYTES, EVICTED, PAGE_BYTES, Engine, LocalDoor, map_bytes

SIZE_BYTES = 8 * BLOCK_BYTES
OLD, NEW = b"o" * PAGE_BYTES, b"n" * PAGE_BYTES


class FifoRig:
    """A volume: what is written to its slots is what the next read of them brings, or `take`."""

    def __init__(self, folder: Path) -> None:
        os.mkfifo(folder / "slots")
        self._slots = os.open(folder / "slots", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._files = [(folder / name).open("w+b") for name in ("sums", "map")]
        sums, map_file = self._files
        sums.truncate(32 * 64)
        map_file.truncate(map_bytes(SIZE_BYTES))
        self.engine = Engine(
            slots_fd=self._slots, slot_count=32, sums_fd=sums.fileno(), staging_bytes=64 * BLOCK_BYTES
        )
        self.volume = self.engine.open_layer(1, map_file.fileno(), SIZE_BYTES, kind="local")
        self.engine.finish_load()
        self.door = LocalDoor(self.engine, None, volume=self.volume, queue_depth=8)
        self.pool = ThreadPoolExecutor(8)

    def take(self) -> bytes:
        return os.read(self._slots, PAGE_BYTES)

    def give(self) -> None:
        os.write(self._slots, OLD)

    def waits(self, count: int) -> None:
        wait_for(lambda: self.door.stats()["waiting"] == count)

    def close(self) -> None:
        while self.door.stats()["active"]:
            self.give()
        self.pool.shutdown()
        self.door.drain()
        self.door.quit()
        self.door.close()
        self.engine.close()
        os.close(self._slots)
        for file in self._files:
            file.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FifoRig]:
    rig = FifoRig(tmp_path)
    yield rig
    rig.close()


def test_a_move_waits_for_reads_under_way_and_reads_wait_for_it(rig: FifoRig) -> None:
    rig.door.write(0, OLD)
    assert rig.take() == OLD
    early = rig.pool.submit(rig.door.read, 0, PAGE_BYTES)
    wait_for(lambda: rig.door.stats()["active"] == 1)
    rig.volume.seal()
    write = rig.pool.submit(rig.door.write, PAGE_BYTES, NEW)
    rig.waits(1)
    late = rig.pool.submit(rig.door.read, 0, PAGE_BYTES)
    rig.waits(2)
    rig.give()
    assert early.result(TIMEOUT_S) == OLD
    rig.waits(1)  # the move reads by now
    rig.give()
    write.result(TIMEOUT_S)
    assert late.result(TIMEOUT_S) == OLD, "what the move wrote to the new slot"
    assert rig.take() == NEW
    assert rig.door.stats()["moved"] == 1
    assert rig.door.stats()["waiting"] == 0
    rig.volume.end_epoch()


def test_a_block_that_is_being_moved_is_not_evicted(tmp_path: Path) -> None:
    """The move outlasts its epoch, behind which the block is clean (R2)."""
    far = FarRig(tmp_path, fifo=True)
    try:
        write = far.write(0, OLD)
        assert far.land(write) == [OLD]
        far.volume.seal()
        blocks = far.collect()
        late = far.write(1, NEW)
        far.looked_up()  # the move reads, from a slot that gives nothing
        far.volume.clean(blocks)
        far.volume.end_epoch()
        far.evict(1)
        assert [event.value for event in far.told if event.kind == EVICTED] == [0]
        far.give()
        far.until(lambda: far.door.stats()["moved"] == 1)  # else `land` could take what the move is to read
        far.land(late)
        assert far.masks(0) == (0b11, 0b11, 0, 0b10)
        far.consistent()
        far.counted()
    finally:
        far.close()
