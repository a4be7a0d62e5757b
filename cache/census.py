"""How much a cache has of each layer: pages by what they are, and slots. A piece of the map is looked at as
one large number, so that a layer of a terabyte takes seconds and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tierblk.cache.view import LayerView, Piece

_MASK = 0xFFFF
_CACHED_AT, _ZERO_AT, _DIRTY_AT = 48, 64, 80  # bits of the masks in an entry


@dataclass(slots=True)
class Census:
    """Of one layer. dirty_pages: those that take slots; zero_dirty_pages: those that are known to be zeros,
    which do not."""

    slots: int = 0
    cached_pages: int = 0
    zero_pages: int = 0
    dirty_pages: int = 0
    zero_dirty_pages: int = 0

    def __iadd__(self, other: Census) -> Census:
        self.slots += other.slots
        self.cached_pages += other.cached_pages
        self.zero_pages += other.zero_pages
        self.dirty_pages += other.dirty_pages
        self.zero_dirty_pages += other.zero_dirty_pages
        return self


def count(layer: LayerView) -> Census:
    """All of a layer, as it is now. CacheError."""
    census = Census()
    for piece in layer.pieces():
        _add(census, piece)
    return census


def _add(census: Census, piece: Piece) -> None:
    entries = int.from_bytes(piece.packed, "little")
    every = _every(piece.entry_bytes, piece.blocks)
    cached, zero, dirty = (entries >> at & every for at in (_CACHED_AT, _ZERO_AT, _DIRTY_AT))
    census.cached_pages += cached.bit_count()
    census.zero_pages += zero.bit_count()
    census.dirty_pages += (cached & dirty).bit_count()
    census.zero_dirty_pages += (zero & dirty).bit_count()
    slots = memoryview(piece.packed).cast("I")[:: piece.entry_bytes // 4].tolist()
    census.slots += len(slots) - slots.count(0)


@lru_cache(maxsize=8)
def _every(entry_bytes: int, blocks: int) -> int:
    """A mask of 16 bits at the begin of each entry."""
    return int.from_bytes(_MASK.to_bytes(entry_bytes, "little") * blocks, "little")
