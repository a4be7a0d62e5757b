"""The memory tier: what is asked for often comes from it, and right (I1); what is asked for once does not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_rig import Rig
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, LocalDoor

IMAGE = random.Random(11).randbytes(48 * BLOCK_BYTES + 3 * 512)
SET_BYTES = 8 * BLOCK_BYTES
"""One set of frames, in which all blocks of the image compete."""


@pytest.fixture(params=[512, 4096], ids=["512e", "4kn"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 64, dio_align_bytes=request.param, hot_bytes=SET_BYTES)
    rig.finish(rig.read(0, len(IMAGE)))
    yield rig
    rig.close()


def _read(rig: Rig, block: int, times: int = 1) -> None:
    for _ in range(times):
        at = block * BLOCK_BYTES
        assert rig.read(at, BLOCK_BYTES).result(10) == rig.expect(at, BLOCK_BYTES)


def _from_memory(rig: Rig) -> int:
    return rig.door.stats()["memory_requests"]


def _spoil_slots(rig: Rig) -> None:
    """What comes from the disk from here on is wrong: right bytes were in memory."""
    rig.slots_path.write_bytes(b"\xa5" * rig.slots * BLOCK_BYTES)


def test_what_is_asked_for_often_comes_from_memory(rig: Rig) -> None:
    _read(rig, 5, times=2)
    assert _from_memory(rig) == 0
    _spoil_slots(rig)
    _read(rig, 5, times=3)
    stats = rig.door.stats()
    assert stats["memory_requests"] == 3
    assert stats["hit_requests"] == 5  # they are hits like any other
    assert sum(rig.door.latencies()[3][0]) == 3


def test_every_part_of_a_hot_block_is_right(rig: Rig) -> None:
    """Sectors, pages, and what crosses pages of which some are in memory and some are not."""
    chance = random.Random(5)
    for _ in range(600):
        block, sector = chance.choice((3, 4)), chance.randrange(128)
        at = block * BLOCK_BYTES + sector * 512
        length = chance.randint(1, 128 - sector) * 512
        assert rig.read(at, length).result(10) == rig.expect(at, length)
    assert _from_memory(rig) > 300


def test_only_whole_pages_are_kept(rig: Rig) -> None:
    for _ in range(5):
        assert rig.read(512, PAGE_BYTES).result(10) == rig.expect(512, PAGE_BYTES)
    assert _from_memory(rig) == 0  # seven sectors of one page and one of the next: it gets no frame
    for _ in range(5):
        assert rig.read(512, 2 * PAGE_BYTES).result(10) == rig.expect(512, 2 * PAGE_BYTES)
    _spoil_slots(rig)
    assert rig.read(PAGE_BYTES, PAGE_BYTES).result(10) == rig.expect(PAGE_BYTES, PAGE_BYTES)
    assert _from_memory(rig) == 1


def test_the_ragged_end_is_right(rig: Rig) -> None:
    at = len(IMAGE) - 3 * 512
    for _ in range(6):
        assert rig.read(at, 3 * 512).result(10) == rig.expect(at, 3 * 512)


def test_a_scan_drives_nobody_out(rig: Rig) -> None:
    for block in range(8):
        _read(rig, block, times=6)
    before = _from_memory(rig)
    for block in range(8, 48):
        _read(rig, block)
    _spoil_slots(rig)
    for block in range(8):
        _read(rig, block)
    assert _from_memory(rig) == before + 8


def test_what_cooled_down_gives_way(rig: Rig) -> None:
    for block in range(8):
        _read(rig, block, times=100)
    for _ in range(200):
        for block in range(20, 24):
            _read(rig, block)
    before = _from_memory(rig)
    for block in range(20, 24):
        _read(rig, block)
    assert _from_memory(rig) == before + 4


def test_memory_outlives_the_slot(rig: Rig) -> None:
    """A base's bytes never change, so a block that was evicted from the disk may still be here."""
    _read(rig, 2, times=4)
    evicted = rig.evict(64)
    assert evicted > 40
    before = rig.door.stats()
    _read(rig, 2)
    after = rig.door.stats()
    assert after["miss_requests"] == before["miss_requests"]
    assert after["memory_requests"] == before["memory_requests"] + 1


def test_what_is_hot_in_memory_stays_on_the_disk(rig: Rig) -> None:
    """SIEVE hears of hits in memory as well: a daemon that starts anew finds the block on the disk."""
    _read(rig, 2, times=3)
    rig.evict(20)  # the hand has passed everything once; what is asked for now is hot
    slots = len(rig.entries())
    _read(rig, 2, times=3)
    rig.evict(slots - 3)
    assert 2 in rig.entries()


def test_bytes_that_a_failing_disk_did_not_bring_are_not_kept(rig: Rig) -> None:
    _read(rig, 6)
    slot = rig.entries()[6][0]
    with rig.slots_path.open("r+b") as slots:
        slots.truncate(slot * BLOCK_BYTES)  # a short read, as of a slots file that lost its end
    read = rig.read(6 * BLOCK_BYTES, BLOCK_BYTES)  # it would go into memory now
    rig.finish(read)
    assert read.result() == rig.expect(6 * BLOCK_BYTES, BLOCK_BYTES)
    _read(rig, 6, times=5)


@pytest.mark.parametrize("hot_bytes", [0, SET_BYTES - BLOCK_BYTES])
def test_less_than_a_set_is_no_tier(tmp_path: Path, hot_bytes: int) -> None:
    rig = Rig(tmp_path, IMAGE, 64, hot_bytes=hot_bytes)
    rig.finish(rig.read(0, len(IMAGE)))
    _read(rig, 1, times=5)
    assert _from_memory(rig) == 0
    rig.close()


def test_more_than_there_is_room_for_is_refused(rig: Rig) -> None:
    with pytest.raises(OSError, match="cannot open a local door"):
        LocalDoor(rig.engine, rig.layer, hot_bytes=1 << 60)
