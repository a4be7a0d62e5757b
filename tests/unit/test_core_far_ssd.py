"""Fills of a volume, writes and moves on their way to the same slot (R2, R4, R5). A FIFO is in the place of
the slots: a full one lets no write land, an empty one no read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_far_rig import FarRig, page_of, wait_for
from tests.engine_rig import TIMEOUT_S
from tierblk.core import Sealed

A, B, NEW, OLD = page_of("a"), page_of("b"), page_of("n"), page_of("o")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FarRig]:
    rig = FarRig(tmp_path, fifo=True)
    yield rig
    rig.close()


def dirty_page(rig: FarRig, page: int) -> None:
    """Its block has a slot then."""
    rig.write(page, OLD).result(TIMEOUT_S)
    assert rig.take() == OLD


def begin_ssd_write(rig: FarRig) -> None:
    """A fill of page 5 of block 0 has answered its reader, and its write to the slot is held."""
    read = rig.read(5)
    rig.miss(0)
    rig.stuff()
    rig.fill(0, 1 << 5)
    rig.obeyed()
    assert read.result(TIMEOUT_S) == A


def test_a_write_in_flight_when_the_fill_begins_is_not_overwritten(rig: FarRig) -> None:
    rig.stored({5: A, 6: B})
    rig.stuff()
    write = rig.write(5, NEW)
    rig.looked_up()
    reads = [rig.read(6), rig.read(5)]
    rig.miss(0)
    rig.fill(0, 0b1100000)
    rig.obeyed()
    assert reads[0].result(TIMEOUT_S) == B, "not behind the SSD"
    rig.waits(1)  # the other one, which would be a miss of its own behind this fill
    assert sorted(rig.land(write)) == [B, NEW]
    rig.until(lambda: bool(rig.results))
    assert rig.results[0].pages == 1 << 6
    assert rig.masks(0) == (0b1100000, 0b1100000, 0, 1 << 5)
    rig.consistent()
    rig.give()  # what the slot has
    rig.finish(reads[1])  # it looked again behind the fill, and missed the page if the write had not landed


def test_a_write_waits_for_the_fills_ssd_write_of_its_page(rig: FarRig) -> None:
    dirty_page(rig, 0)
    rig.stored({5: A})
    begin_ssd_write(rig)
    same, discard = rig.write(5, NEW), rig.discard(5)
    rig.waits(2)
    other = rig.write(7, B)
    rig.waits(2)  # it does not
    landed = rig.land(other, same, discard)
    assert sorted(landed) == [A, B, NEW]
    assert landed.index(A) < landed.index(NEW)
    assert rig.masks(0)[3] == 0b10100001
    rig.consistent()


def test_a_write_whose_block_has_no_slot_waits_for_the_one_of_the_fill(rig: FarRig) -> None:
    free = rig.engine.free_slots()
    rig.stored({5: A})
    begin_ssd_write(rig)
    write = rig.write(7, NEW)
    rig.waits(1)
    assert rig.land(write) == [A, NEW]
    assert rig.masks(0) == (0b10100000, 0b10100000, 0, 1 << 7)
    assert rig.engine.free_slots() == free - 1
    rig.consistent()


def test_part_of_a_page_meets_the_fill_that_writes_it(rig: FarRig) -> None:
    rig.stored({5: A})
    begin_ssd_write(rig)
    write = rig.write(5, b"n" * 512)
    rig.waits(1)
    assert rig.land(write) == [A, b"n" * 512 + A[512:]]
    assert rig.masks(0) == (32, 32, 0, 32)


def test_a_move_waits_for_no_get(rig: FarRig) -> None:
    dirty_page(rig, 0)
    rig.stored({5: A})
    read = rig.read(5)
    rig.miss(0)
    rig.volume.seal()
    rig.give()
    rig.write(1, NEW).result(TIMEOUT_S)
    assert rig.door.stats()["moved"] == 1
    assert (2, 0) in rig.asked
    rig.fill(0, 1 << 5)
    assert read.result(TIMEOUT_S) == A
    rig.volume.end_epoch()


def test_a_move_waits_for_the_fills_ssd_write(rig: FarRig) -> None:
    dirty_page(rig, 0)
    rig.stored({5: A})
    begin_ssd_write(rig)
    rig.volume.seal()
    write = rig.write(1, NEW)
    rig.waits(1)
    slot = rig.entry(0)[0]
    landed = rig.land(write)
    assert landed[0] == A, "before the block is read for its move"
    assert landed[-1] == NEW
    assert rig.entry(0)[0] != slot
    assert rig.masks(0) == (0b100011, 0b100011, 0, 0b11)
    rig.consistent()
    rig.volume.end_epoch()


def test_a_fill_that_is_complete_while_its_block_moves_is_passed_through(rig: FarRig) -> None:
    dirty_page(rig, 0)
    rig.stored({5: A})
    read = rig.read(5)
    rig.miss(0)
    rig.volume.seal()
    write = rig.write(1, NEW)
    wait_for(lambda: rig.door.stats()["active"] == 2)
    rig.looked_up()
    rig.fill(0, 1 << 5)
    assert read.result(TIMEOUT_S) == A
    end = rig.ended(0)
    assert (end.result, end.pages) == (0, 0)
    rig.give()
    write.result(TIMEOUT_S)
    assert rig.masks(0) == (0b100011, 0b11, 0, 0b11)
    rig.consistent()
    rig.volume.end_epoch()


def test_a_sealed_block_that_lost_all_its_pages_while_a_get_runs_is_not_moved(rig: FarRig) -> None:
    """A discard has taken all that there was to move."""
    dirty_page(rig, 0)
    rig.stored({5: A})
    read = rig.read(5)
    rig.miss(0)
    rig.volume.seal()
    slot = rig.entry(0)[0]
    rig.discard(0).result(TIMEOUT_S)
    rig.write(1, NEW).result(TIMEOUT_S)
    assert rig.take() == NEW
    assert rig.door.stats()["moved"] == 0
    assert rig.entry(0)[0] not in (0, slot)
    assert rig.engine.stats()["pinned"] == 1, "the epoch's"
    rig.fill(0, 1 << 5)
    assert read.result(TIMEOUT_S) == A
    rig.ended(0)
    assert rig.masks(0) == (0b100011, 0b100010, 1, 0b11)
    assert [(each.slot, each.dirty, each.zero) for each in rig.collect()] == [(slot, 1, 0)]
    rig.volume.end_epoch()
    assert rig.engine.stats()["pinned"] == 0
    rig.consistent()


def test_a_write_to_the_slot_that_fails_and_a_fill(rig: FarRig) -> None:
    """Of two pages only one fits the FIFO: that is a short write, as of a disk that fails. The pages stay the
    store's, and who waits for the SSD goes on."""
    rig.stored({5: A, 6: B})
    read = rig.read(5, 2)
    rig.miss(0)
    rig.stuff()
    rig.fill(0, 0b1100000)
    rig.obeyed()
    assert read.result(TIMEOUT_S) == A + B
    write = rig.write(5, NEW)
    rig.waits(1)
    rig.land(write)
    rig.ended(0)
    assert rig.results[0].pages in (0, 0b1100000)
    assert rig.masks(0)[3] == 1 << 5
    rig.consistent()


def test_what_is_learned_while_a_block_moves_takes_no_slot_from_the_move(rig: FarRig) -> None:
    dirty_page(rig, 0)
    free = rig.engine.free_slots()
    rig.volume.seal()
    rig.volume.clean(rig.collect())
    write = rig.write(1, NEW)
    wait_for(lambda: rig.door.stats()["active"] == 1)
    rig.looked_up()
    rig.volume.learn([Sealed(0, 0, 1, 0)])
    assert rig.entry(0)[1:] == (1, 0, 0, 0)
    rig.give()
    write.result(TIMEOUT_S)
    assert rig.masks(0) == (0b11, 0b10, 0, 0b10)
    rig.volume.end_epoch()
    rig.commit()
    assert rig.engine.free_slots() == free, "and none that was never a block's"
    rig.consistent()


def test_what_is_learned_while_a_fill_is_written_is_not_the_fills(rig: FarRig) -> None:
    rig.stored({5: A})
    begin_ssd_write(rig)
    free = rig.engine.free_slots()
    rig.volume.learn([Sealed(0, 0, 1 << 5, 1 << 5)])
    assert rig.land() == [A]
    rig.ended(0)
    assert rig.entry(0) == (0, 32, 0, 32, 0)
    rig.consistent()
    rig.commit()
    assert rig.engine.free_slots() == free + 1
