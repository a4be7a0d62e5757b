"""A volume whose truth is object storage: what it has and has not here is a miss of its own; what is written
or discarded meanwhile overtakes the fill (R5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_far_rig import ALL, FarRig, page_of
from tests.engine_rig import TIMEOUT_S
from tierblk.core import BLOCK_BYTES, FAIL, PAGE_BYTES, PREFETCH, LocalDoor, Record, Sealed, crc32c

A, B, NEW, ZEROS = page_of("a"), page_of("b"), page_of("n"), bytes(PAGE_BYTES)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FarRig]:
    rig = FarRig(tmp_path)
    yield rig
    rig.close()


def test_stored_pages_are_read_once_and_hit_afterwards(rig: FarRig) -> None:
    rig.stored({1: A, 2: B, 3: ZEROS, 9: A})
    assert rig.masks(0) == (0b1000001110, 0, 0b1000, 0)
    read = rig.read(0, 4)
    event = rig.miss(0)
    assert (event.pages, event.value) == (0b110, 0b1000000110)
    rig.fill(0, 0b110)
    assert read.result(TIMEOUT_S) == ZEROS + A + B + ZEROS
    rig.finish(read)
    assert rig.masks(0) == (0b1000001110, 0b110, 0b1000, 0)
    rig.consistent()
    assert rig.read(1, 3).result(TIMEOUT_S) == A + B + ZEROS
    assert rig.misses == 1
    assert rig.door.stats()["hit_requests"] == 1


def test_what_was_not_learned_is_zeros_and_no_miss(rig: FarRig) -> None:
    rig.stored({16: A})
    assert rig.door.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    assert rig.door.read(BLOCK_BYTES + PAGE_BYTES, PAGE_BYTES) == ZEROS
    rig.poll()
    assert rig.misses == 0


def test_clean_blocks_are_evicted_and_come_back(rig: FarRig) -> None:
    rig.door.write(0, A + B)
    rig.door.write(BLOCK_BYTES, NEW)
    rig.epoch()
    assert rig.volume.dirty_pages() == 0
    mask, sums = rig.volume.page_sums(0)
    assert (mask, sums[:2]) == (0b11, (crc32c(A), crc32c(B)))
    rig.door.write(BLOCK_BYTES, A)
    rig.evict(10)
    assert rig.masks(0) == (0b11, 0, 0, 0)
    assert rig.masks(1) == (1, 1, 0, 1), "a dirty one stays (I3)"
    rig.consistent()
    read = rig.read(0, 2)
    rig.finish(read)
    assert read.result() == A + B
    mask, sums = rig.volume.page_sums(0)
    assert (mask, sums[:2]) == (0b11, (crc32c(A), crc32c(B)))


@pytest.mark.parametrize("discarded", [False, True])
def test_a_write_or_discard_overtakes_a_fill(rig: FarRig, discarded: bool) -> None:
    rig.stored(dict.fromkeys(range(16), A))
    reads = [rig.read(5), rig.read(6), rig.read(4, 3)]
    rig.miss(0)
    rig.waits(3)
    if discarded:
        rig.discard(5).result(TIMEOUT_S)
    else:
        rig.write(5, NEW).result(TIMEOUT_S)
    now = ZEROS if discarded else NEW
    assert rig.read(5).result(TIMEOUT_S) == now
    rig.fill(0)
    rig.finish(*reads)
    assert [read.result() for read in reads] == [now, A, A + now + A]
    assert rig.misses == 1
    assert rig.masks(0) == (ALL, ALL & ~(32 * discarded), 32 * discarded, 32)
    assert rig.door.read(0, BLOCK_BYTES) == A * 5 + now + A * 10
    rig.consistent()


def test_a_page_that_was_overtaken_and_is_lost_again_is_not_the_old_fills(rig: FarRig) -> None:
    """Written, uploaded, lost by the SSD: it looks as when the fill began, and its bytes there are others
    (safety.md 13)."""
    rig.stored({5: A, 6: A})
    early = rig.read(6)
    rig.miss(0)
    rig.door.write(5 * PAGE_BYTES, NEW)
    rig.epoch()
    os.truncate(rig.slots_path, rig.entry(0)[0] * BLOCK_BYTES)
    late = rig.read(5)
    rig.waits(2)
    assert rig.masks(0)[1] == 0
    rig.store[5] = A
    rig.fill(0, 0b1100000)
    assert early.result(TIMEOUT_S) == A
    rig.store[5] = NEW
    rig.until(lambda: rig.misses == 2)
    rig.finish(late)
    assert late.result() == NEW
    rig.consistent()


def test_a_fill_that_fails_leaves_the_writes_that_overtook_it(rig: FarRig) -> None:
    rig.stored({5: A, 6: A})
    read = rig.read(6)
    event = rig.miss(0)
    rig.door.write(5 * PAGE_BYTES, NEW)
    rig.engine.push([Record(FAIL, token=event.token, result=-5)])
    with pytest.raises(OSError, match="read of"):
        read.result(TIMEOUT_S)
    assert rig.door.read(5 * PAGE_BYTES, PAGE_BYTES) == NEW
    assert rig.masks(0) == (0b1100000, 32, 0, 32)
    rig.consistent()


def test_a_fill_in_pieces_gives_each_reader_its_page(rig: FarRig) -> None:
    rig.stored({0: A, 1: B, 2: A})
    first, second = rig.read(0), rig.read(1, 2)
    rig.miss(0)
    rig.waits(2)
    rig.fill(0, 0b1, final=False)
    assert first.result(TIMEOUT_S) == A
    rig.door.write(2 * PAGE_BYTES, NEW)
    rig.fill(0, 0b10, final=False)
    rig.fill(0, 0b100)
    rig.finish(second)
    assert second.result() == B + NEW
    assert rig.masks(0) == (0b111, 0b111, 0, 0b100)
    rig.consistent()


def test_zeros_of_the_store_need_no_slot(rig: FarRig) -> None:
    rig.stored(dict.fromkeys(range(16), A))
    rig.store.clear()  # all of the block came as zeros
    free = rig.engine.free_slots()
    read = rig.read(0, 16)
    rig.finish(read)
    assert read.result() == bytes(BLOCK_BYTES)
    assert rig.masks(0) == (ALL, 0, ALL, 0)
    assert rig.engine.free_slots() == free
    rig.consistent()


def test_readahead_asks_for_what_the_store_has(rig: FarRig) -> None:
    rig.stored({16: A, 20: A})
    rig.engine.push([Record(PREFETCH, layer=2, block=0, value=8, pages=64)])
    event = rig.miss(1)
    assert (event.pages, event.result) == (0b10001, 1)
    rig.finish()
    assert rig.misses == 1
    assert rig.masks(1) == (0b10001, 0b10001, 0, 0)


# -- parts of a page (R4) ---


def test_part_of_a_page_that_only_the_store_has_is_merged(rig: FarRig) -> None:
    rig.stored({5: A})
    write = rig.write(5, b"n" * 512, skew=1024)
    assert rig.miss(0).pages == 32
    rig.finish(write)
    expected = A[:1024] + b"n" * 512 + A[1536:]
    assert rig.door.read(5 * PAGE_BYTES, PAGE_BYTES) == expected
    assert rig.masks(0) == (32, 32, 0, 32)
    rig.consistent()


def test_part_of_a_page_beside_a_fill_of_others(rig: FarRig) -> None:
    """The fill does not bring all of its pages: it looks again, and has a fill of its own. Whole pages of the
    block are written meanwhile, those in the midst of its own as well."""
    rig.stored({4: A, 5: A, 6: B, 7: A})
    read = rig.read(6)
    rig.miss(0)
    write = rig.write(4, b"n" * 2 * PAGE_BYTES, skew=2048)
    rig.waits(2)
    rig.write(5, NEW).result(TIMEOUT_S)
    rig.write(7, NEW).result(TIMEOUT_S)
    rig.fill(0, 1 << 6)
    assert read.result(TIMEOUT_S) == B
    rig.until(lambda: rig.misses == 2)
    rig.finish(write)
    expected = A[:2048] + b"n" * 2 * PAGE_BYTES + B[2048:] + NEW
    assert rig.door.read(4 * PAGE_BYTES, 4 * PAGE_BYTES) == expected
    rig.consistent()


def test_who_changes_a_page_that_is_written_in_part_waits_for_it(rig: FarRig) -> None:
    rig.stored({5: A})
    write = rig.write(5, b"n" * 512)
    rig.miss(0)
    calls = [rig.write(5, B), rig.discard(5)]
    rig.waits(3)
    rig.finish(write, *calls)
    assert rig.door.read(5 * PAGE_BYTES, PAGE_BYTES) in (B, ZEROS)
    rig.consistent()


# -- discards ---


def test_a_discard_keeps_what_the_store_has_as_zeros(rig: FarRig) -> None:
    rig.stored({1: A, 2: ZEROS, 17: A})
    rig.door.write(3 * PAGE_BYTES, NEW)
    rig.door.discard(0, BLOCK_BYTES)
    assert rig.masks(0) == (0b1110, 0, 0b1110, 0b1110), "page 0 and those above 3 are nobody's"
    rig.door.discard(2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert rig.entry(2) == (0, 0, 0, 0, 0)
    assert rig.door.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    assert rig.masks(1) == (2, 0, 0, 0)
    rig.consistent()
    rig.epoch()
    assert rig.masks(0) == (0b1110, 0, 0b1110, 0)
    rig.consistent()


def test_a_discard_over_a_base_keeps_zeros(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, base=b"i" * (BLOCK_BYTES + 3 * PAGE_BYTES))
    rig.stored({1: A})
    rig.door.discard(0, 2 * BLOCK_BYTES)
    assert rig.masks(0) == (ALL, 0, ALL, ALL)
    assert rig.masks(1) == (0b111, 0, 0b111, 0b111), "behind the base's end nobody has anything"
    assert rig.door.read(0, 2 * BLOCK_BYTES) == bytes(2 * BLOCK_BYTES)
    rig.consistent()
    rig.close()


def test_pages_of_volume_and_base_in_one_read(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, base=b"i" * 2 * BLOCK_BYTES)
    rig.stored({1: A})
    rig.door.write(2 * PAGE_BYTES, NEW)
    read = rig.read(0, 4)
    rig.miss(0)
    assert set(rig.asked) == {(2, 0)}
    rig.fill(0)
    rig.miss(0, layer=1)
    rig.finish(read)
    assert read.result() == b"i" * PAGE_BYTES + A + NEW + b"i" * PAGE_BYTES
    rig.consistent()
    rig.close()


# -- learning, cleaning ---


def test_learning_drops_what_is_clean_and_keeps_what_is_dirty(rig: FarRig) -> None:
    rig.stored({0: A, 1: A, 2: A, 3: A})
    rig.finish(rig.read(0, 4))
    rig.door.write(PAGE_BYTES, NEW)
    assert rig.masks(0) == (0b1111, 0b1111, 0, 0b10)
    rig.stored({0: B, 1: B, 2: ZEROS})
    assert rig.masks(0) == (0b1111, 0b1010, 0b100, 0b10)
    rig.consistent()
    read = rig.read(0, 4)
    rig.finish(read)
    assert read.result() == B + NEW + ZEROS + A
    rig.stored({3: B, 0: B})
    rig.epoch()
    rig.stored({1: B})
    assert rig.entry(0) == (0, 0b1111, 0, 0b100, 0), "the slot goes with its last page"
    rig.consistent()
    with pytest.raises(OSError, match="layer 2"):
        rig.volume.learn([Sealed(8, 0, 1, 0)])


def test_what_is_learned_while_a_fill_runs_is_not_the_fills(rig: FarRig) -> None:
    rig.stored({0: A, 1: A})
    read = rig.read(0, 2)
    rig.miss(0)
    rig.volume.learn([Sealed(0, 0, 0b10, 0b10)])
    rig.fill(0, 0b11)
    rig.finish(read)
    assert read.result() == A + ZEROS
    assert rig.masks(0) == (0b11, 0b1, 0b10, 0)
    rig.consistent()


def test_a_volume_is_not_cleared_while_a_fill_runs(rig: FarRig, tmp_path: Path) -> None:
    """It outlasts the door that began it; here it never had one."""
    with (tmp_path / "other").open("w+b") as file:
        file.truncate(1 << 20)
        other = rig.engine.open_layer(3, file.fileno(), BLOCK_BYTES, kind="write-back")
        other.learn([Sealed(0, 0, 0b11, 0)])
        rig.engine.push([Record(PREFETCH, layer=3, block=0, value=1, pages=64)])
        event = rig.miss(0, layer=3)
        with pytest.raises(OSError, match="busy"):
            other.clear(0, 16)
        rig.engine.push([Record(FAIL, token=event.token, result=-5)])
        rig.until(lambda: not rig.asked)
        assert other.clear(0, 16) is None
        assert not other.peek_row(0)
        rig.close()


def test_only_what_did_not_change_since_is_cleaned(rig: FarRig) -> None:
    door, counts = rig.door, []

    def count() -> None:
        rig.consistent()
        counts.append(rig.volume.dirty_pages())

    rig.stored({40: A})
    door.write(0, A * 16)
    count()
    door.write(BLOCK_BYTES, A * 2)
    count()
    door.discard(PAGE_BYTES, PAGE_BYTES)
    count()
    rig.volume.seal()
    blocks = rig.collect()
    door.write(2 * PAGE_BYTES, NEW)
    count()
    door.discard(3 * PAGE_BYTES, PAGE_BYTES)
    count()
    door.write(40 * PAGE_BYTES, NEW)
    count()
    sums = rig.upload(blocks)
    rig.volume.clean(blocks, sums)
    count()
    assert counts == [16, 18, 18, 18, 18, 19, 3]
    assert rig.masks(0) == (ALL, ALL & ~0b1010, 0b1010, 0b1100)
    rig.volume.end_epoch()
    rig.commit()
    rig.epoch()
    count()
    assert counts[-1] == 0
    rig.evict(10)
    count()
    read = rig.read(0, 48)
    rig.finish(read)
    expected = A + ZEROS + NEW + ZEROS + A * 12 + A * 2 + ZEROS * 14 + ZEROS * 8 + NEW + ZEROS * 7
    assert read.result() == expected


def test_sums_go_to_the_slot_that_the_block_has_now(rig: FarRig) -> None:
    rig.door.write(0, A + B)
    rig.volume.seal()
    blocks = rig.collect()
    sums = rig.upload(blocks)
    rig.door.write(0, NEW)
    rig.volume.clean(blocks, sums)
    rig.volume.end_epoch()
    mask, kept = rig.volume.page_sums(0)
    assert (mask, kept[1]) == (0b11, crc32c(B)), "page 1 is clean, wherever it is now"
    assert rig.masks(0)[3] == 1


def test_sums_of_clean_pages_move_with_them(rig: FarRig) -> None:
    rig.stored({5: B})
    rig.finish(rig.read(5))
    rig.door.write(0, A)
    rig.volume.seal()
    rig.door.write(PAGE_BYTES, NEW)
    assert rig.door.stats()["moved"] == 1
    mask, sums = rig.volume.page_sums(0)
    assert (mask, sums[5]) == (0b100011, crc32c(B))
    assert rig.masks(0)[3] == 0b11
    rig.volume.end_epoch()


def test_every_row_is_said_again_after_mark_all(rig: FarRig) -> None:
    rig.door.write(0, A)
    rig.epoch()
    rig.commit()
    assert not rig.volume.changed()
    rig.volume.mark_all()
    assert [row for row, _ in rig.volume.take_changed(64)] == [0]


# -- bad slots (DESIGN 9) ---


def test_a_clean_block_that_the_ssd_lost_is_fetched_anew(rig: FarRig) -> None:
    rig.door.write(0, A + B)
    rig.epoch()
    os.truncate(rig.slots_path, rig.entry(0)[0] * BLOCK_BYTES)
    read = rig.read(0, 2)
    rig.finish(read)
    assert read.result() == A + B
    assert rig.door.stats()["slot_errors"] == 1
    rig.consistent()


def test_a_dirty_block_that_the_ssd_lost_is_an_error(rig: FarRig) -> None:
    rig.stored({0: A})
    rig.door.write(PAGE_BYTES, B)
    os.truncate(rig.slots_path, rig.entry(0)[0] * BLOCK_BYTES)
    with pytest.raises(OSError, match="read of"):
        rig.read(1).result(TIMEOUT_S)
    assert rig.masks(0) == (0b11, 0b10, 0, 0b10), "kept for whoever looks into it"
    rig.poll()
    assert rig.misses == 0
    rig.consistent()


def test_a_slot_that_fails_beside_the_bases_which_does_not(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, base=b"i" * BLOCK_BYTES)
    rig.finish(rig.read(1, 2))
    door = LocalDoor(rig.engine, rig.base, queue_depth=4)
    rig.door.write(0, A)
    rig.epoch()
    os.truncate(rig.slots_path, rig.entry(0)[0] * BLOCK_BYTES)
    read = rig.read(0, 3)
    rig.finish(read)
    assert read.result() == A + b"i" * 2 * PAGE_BYTES
    assert rig.misses == 2, "the base's block has not failed"
    assert rig.engine.stats()["bad"] == 0
    door.drain()
    door.quit()
    door.close()
    rig.close()


def test_both_slots_of_a_read_fail(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, base=b"i" * BLOCK_BYTES)
    rig.finish(rig.read(1, 2))
    rig.door.write(0, A)
    rig.epoch()
    os.truncate(rig.slots_path, BLOCK_BYTES)
    read = rig.read(0, 3)
    rig.finish(read)
    assert read.result() == A + b"i" * 2 * PAGE_BYTES
    rig.consistent()
    rig.close()
