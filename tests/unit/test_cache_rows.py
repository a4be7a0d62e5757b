"""Packed rows, judged apart from the C core that makes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.cache.rows import ENTRIES_BYTES, Entry, cached_pages, entries_of, pack_row, unpack_row
from tierblk.core import ENTRIES_PER_ROW, ROW_BYTES

MASK = st.integers(0, 0xFFFF)
ENTRY = st.builds(Entry, st.integers(0, 2**32 - 1), MASK, MASK, MASK, MASK, st.just(0))


@given(st.lists(ENTRY, max_size=ENTRIES_PER_ROW))
def test_what_is_packed_is_unpacked(entries: list[Entry]) -> None:
    packed = pack_row(entries)
    assert len(packed) == ROW_BYTES
    assert unpack_row(packed) == entries + [Entry()] * (ENTRIES_PER_ROW - len(entries))
    assert cached_pages(packed) == sum(entry.cached.bit_count() for entry in entries)


@given(st.lists(ENTRY, min_size=1, max_size=3), st.integers(0, ROW_BYTES - 1), st.integers(1, 255))
def test_one_changed_byte_is_noticed(entries: list[Entry], at: int, change: int) -> None:
    packed = bytearray(pack_row(entries))
    packed[at] ^= change
    with pytest.raises(ValueError, match=r"^the row's checksum is [0-9a-f]{8}, it says [0-9a-f]{8}$"):
        unpack_row(bytes(packed))


@pytest.mark.parametrize("packed", [b"", b"x", bytes(ENTRIES_BYTES), bytes(ROW_BYTES + 1)])
def test_a_row_of_another_length(packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"^a row has 772 bytes, not "):
        unpack_row(packed)


def test_more_entries_than_a_row_has() -> None:
    with pytest.raises(ValueError, match=r"^a row has 64 entries, not 65$"):
        pack_row([Entry()] * 65)


def test_no_row_is_an_empty_one() -> None:
    assert entries_of(b"") == [Entry()] * ENTRIES_PER_ROW
    assert cached_pages(b"") == 0


def test_the_bytes_are_those_of_the_documentation() -> None:
    packed = pack_row([Entry(), Entry(slot=0x01020304, present=1, cached=2, zero=4, dirty=8)])
    assert packed[12:24].hex() == "04030201" + "0100" + "0200" + "0400" + "0800"
