"""Half-open byte ranges and the sizes that everything is cut into. Pure."""

from __future__ import annotations

from dataclasses import dataclass

SECTOR_BYTES = 512
PAGE_BYTES = 4096
BLOCK_BYTES = 65536
PAGES_PER_BLOCK = BLOCK_BYTES // PAGE_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes [offset, offset + length). Neither is negative (ValueError); an empty extent touches nothing."""

    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"an extent has no negative offset or length: {self.offset}+{self.length}")

    @property
    def end(self) -> int:
        """First byte behind the extent."""
        return self.offset + self.length

    def __bool__(self) -> bool:
        return self.length > 0

    def clamp(self, size_bytes: int) -> Extent:
        """The part that lies below size_bytes; empty (at size_bytes) when none does."""
        offset = min(self.offset, size_bytes)
        return Extent(offset, min(self.end, size_bytes) - offset)

    def overlap(self, other: Extent) -> Extent:
        """The bytes that both have; empty when they share none."""
        offset = max(self.offset, other.offset)
        return Extent(offset, max(0, min(self.end, other.end) - offset))

    def touches(self, other: Extent) -> bool:
        """Whether they share at least one byte."""
        return bool(self.overlap(other))

    def blocks(self) -> range:
        """Numbers of the blocks that hold any of these bytes."""
        return self._units(BLOCK_BYTES)

    def pages(self) -> range:
        """Numbers of the pages that hold any of these bytes."""
        return self._units(PAGE_BYTES)

    def _units(self, unit_bytes: int) -> range:
        if not self.length:
            return range(self.offset // unit_bytes, self.offset // unit_bytes)
        return range(self.offset // unit_bytes, (self.end - 1) // unit_bytes + 1)

    def split(self, unit_bytes: int = BLOCK_BYTES) -> list[Extent]:
        """The same bytes, cut at multiples of unit_bytes, in order."""
        return [self.overlap(Extent(n * unit_bytes, unit_bytes)) for n in self._units(unit_bytes)]


def block_extent(block: int, size_bytes: int) -> Extent:
    """Where a block lies in an address space of size_bytes: the last one may be short."""
    return Extent(block * BLOCK_BYTES, BLOCK_BYTES).clamp(size_bytes)


def block_count(size_bytes: int) -> int:
    """Blocks that an address space of size_bytes has, the short last one included."""
    return -(-size_bytes // BLOCK_BYTES)


def valid_pages(block: int, size_bytes: int) -> int:
    """Mask of the pages that a block has, its first one lowest: the last block of an address space may have
    fewer than others."""
    pages = -(-block_extent(block, size_bytes).length // PAGE_BYTES)
    return (1 << pages) - 1
