"""Rows of the index: 64 neighbouring entries of a block map, packed. Pure.

A row is 64 x {slot u32, present u16, cached u16, zero u16, dirty u16}, little endian, then the crc32c (u32)
of these 768 bytes (R9). The C core packs and loads rows; this is the same format, for the invariants, tools
and tests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tierblk.core import ENTRIES_PER_ROW, ROW_BYTES, crc32c

ENTRIES_BYTES = ROW_BYTES - 4
ROW_ENTRY_BYTES = ENTRIES_BYTES // ENTRIES_PER_ROW

_ENTRY = struct.Struct("<IHHHH")
_CRC = struct.Struct("<I")
# One bit set for every bit that a `cached` mask can have, in the whole row read as one little-endian number.
_CACHED_BITS = int.from_bytes(struct.pack("<IHHHH", 0, 0, 0xFFFF, 0, 0) * ENTRIES_PER_ROW, "little")


class Entry(NamedTuple):
    """What a row keeps of one block: its slot (0: none) and four masks of 16 pages; and, which it does not,
    those dirty pages that have their sums nevertheless (summed.py, core/sums.c)."""

    slot: int = 0
    present: int = 0
    cached: int = 0
    zero: int = 0
    dirty: int = 0
    summed: int = 0

    @property
    def checkable(self) -> int:
        """The mask of pages in the slot that have a sum (R9)."""
        return self.cached & ~self.dirty | self.summed


NO_ENTRY = Entry()


def pack_row(entries: Sequence[Entry]) -> bytes:
    """ROW_BYTES for at most 64 entries; missing ones are empty. ValueError when there are more."""
    if len(entries) > ENTRIES_PER_ROW:
        raise ValueError(f"a row has {ENTRIES_PER_ROW} entries, not {len(entries)}")
    padding = ENTRIES_PER_ROW - len(entries)
    packed = pack_entries([*entries, *[NO_ENTRY] * padding])
    return packed + _CRC.pack(crc32c(packed))


def unpack_row(packed: bytes) -> list[Entry]:
    """The 64 entries of a row. ValueError says what is wrong with it: its length or its checksum."""
    check_row(packed)
    return entries_of(packed)


def check_row(packed: bytes) -> None:
    """ValueError says what is wrong with a row: its length or its checksum."""
    if len(packed) != ROW_BYTES:
        raise ValueError(f"a row has {ROW_BYTES} bytes, not {len(packed)}")
    (expected,) = _CRC.unpack_from(packed, ENTRIES_BYTES)
    actual = crc32c(packed[:ENTRIES_BYTES])
    if actual != expected:
        raise ValueError(f"the row's checksum is {actual:08x}, it says {expected:08x}")


def entries_of(packed: bytes) -> list[Entry]:
    """The entries of a row that is known to be good: its checksum is not looked at. b"" is an empty row."""
    return entries_in_rows(packed[:ENTRIES_BYTES]) if packed else [NO_ENTRY] * ENTRIES_PER_ROW


def entries_in_rows(packed: bytes) -> list[Entry]:
    """Of any number of neighbouring entries, as a row has them."""
    return [Entry(*fields) for fields in _ENTRY.iter_unpack(packed)]


def pack_entries(entries: Sequence[Entry]) -> bytes:
    """As a row has them, without its checksum."""
    return b"".join(_ENTRY.pack(*entry[:5]) for entry in entries)


def cached_pages(packed: bytes) -> int:
    """How many pages the row's blocks have in their slots; 0 for b"" (no row)."""
    return (int.from_bytes(packed[:ENTRIES_BYTES], "little") & _CACHED_BITS).bit_count()
