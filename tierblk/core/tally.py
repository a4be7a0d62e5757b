"""Counts pages of packed entries by what answers them, a sum for each range of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tierblk.core._core import ffi, lib

_MASK_BYTES = 2


class Share(NamedTuple):
    """Pages of a cell. dirty: only here. volume: of the volume, clean and cached. zero: the volume knows that
    they read as zeros. elsewhere: the volume has them, but not here. over_base: those that the volume answers
    and the base has too. base, base_zero: of the base where nothing hides it. used: cached, used lately."""

    dirty: int = 0
    volume: int = 0
    zero: int = 0
    elsewhere: int = 0
    over_base: int = 0
    base: int = 0
    base_zero: int = 0
    used: int = 0


class Tally:
    """Cells and a window of blocks in which a volume hides its base: of each window the volume's entries come
    first. Nothing blocks; belongs to one thread."""

    def __init__(self, bounds: Sequence[int], window_blocks: int) -> None:
        """Cell i is the blocks [bounds[i], bounds[i + 1]), never none; window_blocks: 0 when there is no
        volume over a base."""
        self._cells = len(bounds) - 1
        self._bounds = ffi.new("uint64_t[]", list(bounds))
        self._shares: Any = ffi.new("tb_share[]", self._cells)
        self._hidden = ffi.new("uint16_t[]", window_blocks) if window_blocks else ffi.NULL
        self._hidden_bytes = window_blocks * _MASK_BYTES
        tally: Any = ffi.new("tb_tally *")
        self._tally = tally
        self._tally.shares, self._tally.bounds = self._shares, self._bounds
        self._tally.cells, self._tally.hidden = self._cells, self._hidden
        self._hides = False

    def window(self, first_block: int) -> None:
        """What follows is of blocks from this one on."""
        self._tally.hidden_first = first_block
        if self._hides:
            ffi.memmove(self._hidden, bytes(self._hidden_bytes), self._hidden_bytes)
            self._hides = False

    def add_volume(
        self, packed: memoryview, entry_bytes: int, first_block: int, pages: int, base_pages: int
    ) -> None:
        """Entries of a volume of so many pages, over a base of so many, from a block on; all are in cells and
        in the window."""
        count = len(packed) // entry_bytes
        data = ffi.from_buffer(packed)
        lib.tb_tally_volume(self._tally, data, entry_bytes, first_block, count, pages, base_pages)
        self._hides = self._hidden != ffi.NULL

    def add_base(self, packed: memoryview, entry_bytes: int, first_block: int, pages: int) -> None:
        """The same of a base of so many pages."""
        count = len(packed) // entry_bytes
        lib.tb_tally_base(self._tally, ffi.from_buffer(packed), entry_bytes, first_block, count, pages)

    def shares(self) -> list[Share]:
        """Of each cell."""
        fields = ffi.unpack(ffi.cast("uint64_t *", self._shares), self._cells * len(Share._fields))
        return [
            Share(*fields[at : at + len(Share._fields)]) for at in range(0, len(fields), len(Share._fields))
        ]
