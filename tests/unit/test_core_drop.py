"""Blocks that leave because somebody says so, and blocks that stay (forget.c): `tierblk cache evict` and
`pin`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import EINVAL
from pathlib import Path

import pytest

from tests.core_far_rig import FarRig, page_of
from tests.engine_rig import TIMEOUT_S, Rig
from tierblk.core import BLOCK_BYTES, NEED_SPACE, PAGE_BYTES

IMAGE = os.urandom(40 * BLOCK_BYTES)
ALL = 0xFFFF
A, B = page_of("a"), page_of("b")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 33, hot_bytes=8 * BLOCK_BYTES)
    yield rig
    rig.close()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarRig]:
    rig = FarRig(tmp_path)
    yield rig
    rig.close()


def fill(rig: Rig, *blocks: int) -> None:
    rig.finish(*[rig.read(block * BLOCK_BYTES, BLOCK_BYTES) for block in blocks])


def test_a_block_that_was_dropped_is_a_miss_again(rig: Rig) -> None:
    fill(rig, 0, 1, 2)
    free = rig.engine.free_slots()
    assert rig.layer.drop(1) == 16
    assert rig.layer.drop(1) == 0
    assert rig.layer.drop(30) == 0
    assert set(rig.entries()) == {0, 2}
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free, 1)  # I4
    rig.commit()
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free + 1, 0)
    read = rig.read(BLOCK_BYTES, BLOCK_BYTES)
    rig.finish(read)
    assert read.result() == rig.expect(BLOCK_BYTES, BLOCK_BYTES)
    with pytest.raises(OSError, match=r".") as refused:
        rig.layer.drop(40)
    assert refused.value.errno == EINVAL


def test_single_pages_go_and_the_others_stay_in_their_slot(rig: Rig) -> None:
    fill(rig, 3)
    (entry,) = rig.entries().values()
    assert rig.layer.drop(3, 0b1010) == 2
    (now,) = rig.entries().values()
    assert now[0] == entry[0]
    assert now[2] == ALL & ~0b1010
    read = rig.read(3 * BLOCK_BYTES, 4 * PAGE_BYTES)
    rig.settle()
    assert rig.asked[3].value == 0b1010  # what is missing
    rig.finish(read)
    assert read.result() == rig.expect(3 * BLOCK_BYTES, 4 * PAGE_BYTES)


def test_a_block_in_use_is_left_alone(rig: Rig) -> None:
    fill(rig, 5)
    rig.layer.drop(5, 1)
    read = rig.read(5 * BLOCK_BYTES, PAGE_BYTES)
    rig.settle()
    assert rig.layer.drop(5) is None
    rig.finish(read)
    assert read.result() == rig.expect(5 * BLOCK_BYTES, PAGE_BYTES)
    assert rig.layer.drop(5) == 16


def test_what_is_dirty_stays(far: FarRig) -> None:
    """I3."""
    far.door.write(0, A + B)
    far.epoch()
    far.door.write(PAGE_BYTES, A)
    assert far.volume.drop(0) == 1
    assert far.masks(0) == (0b11, 0b10, 0, 0b10)
    read = far.read(0, 2)
    far.finish(read)
    assert read.result(TIMEOUT_S) == A + A
    far.consistent()


def test_a_pinned_block_outlives_every_eviction(rig: Rig) -> None:
    rig.layer.pin(7, True)  # before it is cached
    fill(rig, *range(10))
    rig.layer.pin(2, True)
    assert rig.evict(33) == 8
    assert set(rig.entries()) == {2, 7}
    rig.layer.pin(7, False)
    rig.layer.pin(39, False)
    assert rig.evict(33) == 1
    assert rig.layer.drop(2) == 16  # by hand it goes, and is as pinned as before
    rig.commit()
    fill(rig, 2)
    assert rig.evict(33) == 0
    rig.commit()
    fill(rig, *range(8, 30))  # probation's count has not gone wrong
    assert rig.evict(33) == 22


def test_what_is_no_longer_pinned_makes_eviction_worth_a_try(rig: Rig) -> None:
    for block in range(32):
        rig.layer.pin(block, True)
    fill(rig, *range(32))
    rig.commit()
    rig.engine.set_low(8)
    assert rig.evict(1) == 0
    rig.told.clear()
    fill(rig, 33)  # passes through, and nobody is asked for room: it would be in vain
    assert rig.told == []
    rig.layer.pin(3, False)
    fill(rig, 34)
    assert [event.kind for event in rig.told] == [NEED_SPACE]


def test_copies_in_memory_go_with_what_is_dropped(rig: Rig) -> None:
    """The slot had gone bad, and so has what was read from it."""
    fill(rig, 0, 1)
    slot = rig.entries()[0][0]
    with rig.slots_path.open("r+b") as file:
        file.seek(slot * BLOCK_BYTES)
        file.write(b"rot" * 100)
    before = rig.door.stats()["memory_requests"]
    for _ in range(6):
        read = rig.read(0, PAGE_BYTES)
        rig.finish(read)
        assert read.result().startswith(b"rot")
    assert rig.door.stats()["memory_requests"] > before
    assert rig.layer.drop(0) == 16
    for _ in range(6):
        read = rig.read(0, PAGE_BYTES)
        rig.finish(read)
        assert read.result() == rig.expect(0, PAGE_BYTES)
