"""What a cache holds of a device, by cells: how many bytes of each are dirty, cached, zero, and so on.

A device is a volume over a base, or one of them; who answers a page is the volume where it has one (DESIGN
5). Counted in whole pages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from tierblk.cache.layers import LayerRecord
from tierblk.cache.view import LayerView, Piece, View
from tierblk.core import ENTRIES_PER_ROW, PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.core.tally import Share, Tally

WINDOW_BLOCKS = 1 << 20


class Heat(NamedTuple):
    """Bytes of a range. All but the last add up to its size.

    dirty: here and nowhere else. volume: of the volume, here, and in its store too. base: of the image,
    here. zero: reads as zeros, needs no room. stored: in the volume's store, not here. lost: of a volume, and
    neither here nor in a store, or what a store has of it may be too old. absent: of the image, would be
    fetched. used: what of it is cached and was used lately."""

    dirty: int = 0
    volume: int = 0
    base: int = 0
    zero: int = 0
    stored: int = 0
    lost: int = 0
    absent: int = 0
    used: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(self) - self.used

    @property
    def cached(self) -> int:
        """Answered without anybody's help: what is here, and zeros."""
        return self.dirty + self.volume + self.base + self.zero


def total(cells: Iterable[Heat]) -> Heat:
    """Of several ranges together."""
    return Heat(*map(sum, zip(*cells, strict=True)))


def heat(
    view: View, volume: LayerRecord | None, base: LayerRecord | None, bounds: Sequence[int]
) -> list[Heat]:
    """Of each cell i, the blocks [bounds[i], bounds[i + 1]) of the device; ascending, none is empty, none
    ends behind the device. CacheError."""
    top = volume or base
    if top is None or len(bounds) < 2:
        return []
    pages, base_pages = _pages(top.size_bytes), 0
    if volume is None:
        base_pages = pages
    elif volume.base is not None:
        base_pages = min(pages, _pages(volume.base_size_bytes))
    tally = Tally(bounds, WINDOW_BLOCKS if volume and base else 0)
    layers = [view.layer(record) if record else None for record in (volume, base)]
    for first in range(bounds[0], bounds[-1], WINDOW_BLOCKS):
        end = min(first + WINDOW_BLOCKS, bounds[-1])
        tally.window(first)
        for packed, piece, block in _within(layers[0], first, end):
            tally.add_volume(packed, piece.entry_bytes, block, pages, base_pages)
        for packed, piece, block in _within(layers[1], first, end):
            tally.add_base(packed, piece.entry_bytes, block, base_pages)
    lost = _lost(layers[0], bounds, pages) if volume and volume.is_stored else None
    return [
        _heat(share, start, end, pages, base_pages, share.elsewhere if lost is None else lost[cell])
        for cell, (share, (start, end)) in enumerate(zip(tally.shares(), pairwise(bounds), strict=True))
    ]


def knows_use(view: View, volume: LayerRecord | None, base: LayerRecord | None) -> bool:
    """Whether it is known what was used lately of what can be evicted: not of a directory whose daemon has
    ended. Of a volume that has no store nothing is ever evicted, and its use not noted."""
    noted = [record for record in (volume, base) if record and (not record.is_volume or record.is_stored)]
    return bool(noted) and all(view.layer(record).has_map for record in noted)


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES)


def _within(layer: LayerView | None, first: int, end: int) -> Iterator[tuple[memoryview, Piece, int]]:
    """(entries, their piece, the block of the first one) of what is known between two blocks."""
    if layer is None:
        return
    for piece in layer.pieces(first, end):
        start, stop = max(first, piece.first_block), min(end, piece.first_block + piece.blocks)
        if start < stop:
            at, to = ((block - piece.first_block) * piece.entry_bytes for block in (start, stop))
            yield memoryview(piece.packed)[at:to], piece, start


def _lost(layer: LayerView | None, bounds: Sequence[int], pages: int) -> list[int]:
    """Of each cell the pages of a volume in a store whose rows cannot be believed: what the store has of them
    may be older than what was acknowledged (R9)."""
    lost = [0] * (len(bounds) - 1)
    for row in layer.bad_rows if layer else ():
        for block in range(row * ENTRIES_PER_ROW, (row + 1) * ENTRIES_PER_ROW):
            if bounds[0] <= block < bounds[-1]:
                first = block * PAGES_PER_BLOCK
                cell = bisect_right(bounds, block) - 1
                lost[cell] += min(PAGES_PER_BLOCK, max(0, pages - first))
    return lost


def _heat(share: Share, start: int, end: int, pages: int, base_pages: int, lost: int) -> Heat:
    """A cell of these blocks. lost: pages of the volume that are neither here nor to be had."""
    first = start * PAGES_PER_BLOCK
    total = min(end * PAGES_PER_BLOCK, pages) - first
    below = max(0, min(end * PAGES_PER_BLOCK, base_pages) - first)
    hidden = share.dirty + share.volume + share.zero + share.elsewhere
    absent = below - share.over_base - share.base - share.base_zero
    beyond = total - below - (hidden - share.over_base)  # of no image and never written: zeros
    counts = Heat(
        dirty=share.dirty,
        volume=share.volume,
        base=share.base,
        zero=share.zero + share.base_zero + beyond,
        stored=share.elsewhere - lost,
        lost=lost,
        absent=absent,
        used=share.used,
    )
    return Heat(*(count * PAGE_BYTES for count in counts))
