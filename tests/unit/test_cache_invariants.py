"""Each invariant is broken once, and found."""

from __future__ import annotations

from uuid import UUID

import pytest

from tierblk.cache.invariants import (
    LayerRows,
    SlotCounts,
    Violation,
    check,
    check_bytes,
    check_committed,
    check_index,
    check_session,
)
from tierblk.cache.rows import Entry, pack_row
from tierblk.cache.superblock import Superblock
from tierblk.core import crc32c
from tierblk.extent import BLOCK_BYTES, PAGE_BYTES

SIZE_BYTES = 100 * BLOCK_BYTES + 5 * PAGE_BYTES
ALL = 0xFFFF


def layer(entries: dict[int, Entry], layer_id: int = 1, kind: str = "base") -> LayerRows:
    """A layer of 101 blocks, the last one short, with these blocks."""
    rows = {
        row: pack_row([entries.get(row * 64 + i, Entry()) for i in range(64)])
        for row in {block // 64 for block in entries}
    }
    return LayerRows(layer_id, kind, SIZE_BYTES, rows)


GOOD = {
    0: Entry(slot=1, cached=ALL),
    63: Entry(slot=2, cached=1, zero=2),
    64: Entry(zero=ALL),
    100: Entry(slot=3, cached=0x1F),
}


def test_a_good_cache_violates_nothing() -> None:
    volume = layer({5: Entry(slot=4, present=7, cached=3, zero=4, dirty=5)}, layer_id=2, kind="volume")
    assert check([layer(GOOD), volume], slot_count=10, counts=SlotCounts(free=3, quarantined=1, bad=1)) == []


@pytest.mark.parametrize(
    "entry",
    [
        Entry(slot=4, present=ALL, cached=7, zero=8),  # clean, and the rest is in the store only
        Entry(present=ALL),
        Entry(slot=4, present=7, cached=3, zero=4, dirty=5),
    ],
)
def test_pages_of_a_volume_in_object_storage_may_be_clean_or_only_there(entry: Entry) -> None:
    assert check([layer({5: entry}, kind="write-back")], slot_count=10) == []


def test_no_row_and_an_empty_one_are_good() -> None:
    assert check([LayerRows(1, "base", SIZE_BYTES, {0: b"", 1: pack_row([])})], slot_count=2) == []


@pytest.mark.parametrize(
    ("block", "entry", "kind", "invariant", "text"),
    [
        (7, Entry(slot=5, cached=3, zero=2), "base", "R2", "pages are both cached and zero: 0x0002"),
        (7, Entry(cached=3), "base", "R2", "pages are cached without a slot: 0x0003"),
        (
            7,
            Entry(slot=5, cached=3, present=1, dirty=3),
            "volume",
            "I3",
            "dirty pages are not present: 0x0002",
        ),
        (7, Entry(slot=5, cached=1, present=3, dirty=3), "volume", "I3", "dirty pages are nowhere: 0x0002"),
        (7, Entry(slot=5, cached=3, present=1), "volume", "I3", "pages are here and not present: 0x0002"),
        (7, Entry(slot=5, cached=3, present=1), "write-back", "I3", "pages are here and not present: 0x0002"),
        (7, Entry(present=3, dirty=3), "write-back", "I3", "dirty pages are nowhere: 0x0003"),
        (7, Entry(slot=5, cached=1, present=1, dirty=1), "base", "I3", "pages of a base"),
        (7, Entry(slot=5, cached=1, present=1), "base", "R9", "are present: 0x0001"),
        (7, Entry(slot=5, zero=1), "base", "R2", "slot 5 is held by a block of which nothing is cached"),
        (100, Entry(slot=5, cached=0x20), "base", "R9", "beyond the end"),
        (101, Entry(zero=1), "base", "R9", "beyond the end"),
        (7, Entry(slot=10, cached=1), "base", "I4", "slot 10 does not exist: there are 10"),
        (7, Entry(slot=2, cached=1), "base", "I4", "slot 2 is also that of block 7 of layer 1"),
    ],
)
def test_each_violation_is_found(block: int, entry: Entry, kind: str, invariant: str, text: str) -> None:
    around = GOOD if kind == "base" else {}
    found = check([layer({**around, block: entry}, kind=kind)], slot_count=10)
    assert [violation.invariant for violation in found] == [invariant]
    assert text in str(found[0])


def test_i4_is_checked_across_layers() -> None:
    found = check([layer(GOOD), layer({9: Entry(slot=1, cached=1)}, layer_id=2)], slot_count=10)
    assert found == [Violation("I4", 2, 9, "slot 1 is also that of block 0 of layer 1")]
    assert str(found[0]) == "I4 layer 2 block 9: slot 1 is also that of block 0 of layer 1"


def test_i4_no_slot_is_lost_or_counted_twice() -> None:
    for free in (5, 7):
        (found,) = check([layer(GOOD)], slot_count=10, counts=SlotCounts(free, quarantined=0))
        assert (
            str(found)
            == f"I4: 3 slots are owned, {free} free, 0 in quarantine, 0 bad: not the 9 that there are"
        )


def test_r9_a_damaged_row_is_named() -> None:
    damaged = bytearray(pack_row([Entry(slot=1, cached=1)]))
    damaged[0] ^= 1
    (found,) = check([LayerRows(1, "base", SIZE_BYTES, {1: bytes(damaged)})], slot_count=10)
    assert (found.invariant, found.layer, found.block) == ("R9", 1, 64)


def test_i4_a_slot_that_the_index_names_has_had_no_other_owner() -> None:
    index = layer({0: Entry(slot=1, cached=1), 1: Entry(slot=2, cached=1)})
    assert check_index([index], [layer({0: Entry(slot=1, cached=1)})]) == []  # slot 2 is in quarantine
    (found,) = check_index([index], [layer({0: Entry(slot=1, cached=1), 5: Entry(slot=2, cached=1)})])
    assert str(found) == "I4 layer 1 block 1: the index names slot 2, which block 5 of layer 1 has now"


def test_r8_a_slot_that_only_the_index_names_is_not_free() -> None:
    index = layer({0: Entry(slot=1, cached=1), 1: Entry(slot=2, cached=1)})
    maps = [layer({0: Entry(slot=1, cached=1)})]
    assert check_index([index], maps, SlotCounts(7, quarantined=1)) == []
    assert check_index([index], maps, SlotCounts(7, quarantined=0, bad=1)) == []
    (found,) = check_index([index], maps, SlotCounts(8, quarantined=0))
    assert str(found).startswith("R8: only the index names 1 slots, 0 are in quarantine")


@pytest.mark.parametrize(
    ("index", "current"),
    [
        ({64: Entry(slot=2, cached=1)}, {}),
        ({}, {64: Entry(slot=2, cached=1)}),
        ({64: Entry(slot=2, cached=1)}, {64: Entry(slot=2, cached=3)}),
        ({64: Entry(slot=2, cached=1)}, {64: Entry(slot=3, cached=1)}),
        ({64: Entry(zero=1)}, {64: Entry(zero=3)}),
    ],
)
def test_r6_a_row_that_differs_is_changed(index: dict[int, Entry], current: dict[int, Entry]) -> None:
    same = {0: Entry(slot=1, cached=1)}
    (found,) = check_committed([layer({**same, **index})], [layer({**same, **current})])
    assert (found.invariant, found.block) == ("R6", 64)
    for side in (index, current):
        assert check_committed([layer({**same, **side})], [layer({**same, **side})]) == []


def test_r8_index_and_slots_are_of_one_time() -> None:
    def texts(session: int, confirmed: int, index: int, clean: bool, running: bool) -> list[str]:
        superblock = Superblock(UUID(int=1), 256, 0, 0, session, confirmed)
        return list(map(str, check_session(superblock, index, clean, running=running)))

    assert texts(5, 5, 5, clean=False, running=True) == []
    assert texts(6, 5, 5, clean=True, running=False) == []
    assert texts(5, 5, 4, clean=True, running=False) == [
        "R8: the index is of session 4, the slots of 5 to 5: what it names cannot be trusted"
    ]
    assert texts(6, 5, 6, False, True) == ["R8: session 6 is served and the slots do not say so"]
    assert len(texts(5, 5, 5, clean=True, running=True)) == 1


def test_i5_bytes_are_compared_with_their_sums() -> None:
    slots = bytearray(4 * BLOCK_BYTES)
    sums = bytearray(4 * 64)
    for page in range(16):
        at = BLOCK_BYTES + page * PAGE_BYTES
        slots[at : at + PAGE_BYTES] = bytes([page + 1]) * PAGE_BYTES
        sums[64 + 4 * page : 68 + 4 * page] = crc32c(slots[at : at + PAGE_BYTES]).to_bytes(4, "little")

    def read(offset_bytes: int, length_bytes: int) -> bytes:
        return bytes(slots[offset_bytes : offset_bytes + length_bytes])

    rows = [layer({8: Entry(slot=1, present=ALL, cached=ALL, dirty=2)}, kind="volume")]
    assert check_bytes(rows, read, bytes(sums)) == []
    slots[BLOCK_BYTES + PAGE_BYTES] ^= 1  # page 1 is dirty: its sum does not count
    assert check_bytes(rows, read, bytes(sums)) == []
    slots[BLOCK_BYTES + 3 * PAGE_BYTES + 99] ^= 1
    assert check_bytes(rows, read, bytes(sums)) == [
        Violation("I5", 1, 8, "page 3 in slot 1 is not what was written there")
    ]
    (found,) = check_bytes([layer({8: Entry(slot=4, cached=1)})], read, bytes(sums))
    assert str(found) == "I5 layer 1 block 8: slot 4 lies beyond the end of the slots file or of its sums"
