"""What a device reads as, out of what is cached of its layers: a volume over a base. Nothing is fetched.

Beside a daemon a slot may be given to another block between the look at its entry and the read of its
bytes. So entries are looked at again behind the bytes, and when they have changed it is tried again.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from tierblk.cache.layers import LayerRecord
from tierblk.cache.pagecheck import bad_pages
from tierblk.cache.rows import Entry
from tierblk.cache.superblock import SLOT_BYTES
from tierblk.cache.view import View
from tierblk.core import PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.errors import CacheError
from tierblk.extent import BLOCK_BYTES, Extent, block_extent, valid_pages

_TRIES = 16
_ALL = (1 << PAGES_PER_BLOCK) - 1


class Missing(Exception):
    """Pages of a block that are not cached, as a mask."""

    def __init__(self, pages: int) -> None:
        super().__init__(f"pages {pages:#06x} are not cached")
        self.pages = pages


class Doubtful(CacheError):
    """What is cached of a block cannot be believed: bytes do not fit their sums, or never stand still."""


class Reader:
    """Reads a stack of layers, from the top down, that a view has; size_bytes: of the device. Blocks."""

    def __init__(self, view: View, records: list[LayerRecord], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._view = view
        self._layers = [view.layer(record) for record in records]
        self._memory = [memoryview(mmap.mmap(-1, SLOT_BYTES)) for _ in records]

    def missing(self, wanted: Extent) -> Iterator[Extent]:
        """Which of these bytes, in whole pages, are not cached; ranges that touch are one. CacheError."""
        open_: Extent | None = None
        for page in self._missing_pages(wanted):
            if open_ is not None and open_.end == page * PAGE_BYTES:
                open_ = Extent(open_.offset, open_.length + PAGE_BYTES)
                continue
            if open_ is not None:
                yield open_
            open_ = Extent(page * PAGE_BYTES, PAGE_BYTES)
        if open_ is not None:
            yield open_.clamp(self.size_bytes)

    def _missing_pages(self, wanted: Extent) -> Iterator[int]:
        for block in wanted.blocks():
            missing = self._plan(block, self._entries(block))[1] & _pages_of(block, wanted)
            yield from (
                block * PAGES_PER_BLOCK + page for page in range(PAGES_PER_BLOCK) if missing >> page & 1
            )

    def read(self, wanted: Extent) -> Iterator[bytes]:
        """The bytes, a block or a part of one at a time. Missing: some are not cached. CacheError: they
        cannot be read, or are not what was written."""
        for block in wanted.blocks():
            part = wanted.overlap(Extent(block * BLOCK_BYTES, BLOCK_BYTES))
            at = part.offset - block * BLOCK_BYTES
            yield self._block(block, _pages_of(block, part))[at : at + part.length]

    def peek(self, offset_bytes: int, length_bytes: int) -> bytes | None:
        """Those bytes, fewer behind the device's end; None: not all of them are here, or not such that they
        can be believed. CacheError: they cannot be read."""
        try:
            return b"".join(self.read(Extent(offset_bytes, length_bytes).clamp(self.size_bytes)))
        except (Missing, Doubtful):
            return None

    def _entries(self, block: int) -> list[Entry]:
        return [layer.entry(block) if block < layer.blocks else Entry() for layer in self._layers]

    def _plan(self, block: int, entries: list[Entry]) -> tuple[list[int], int]:
        """Of each layer the pages that are read from its slot, and which pages are nowhere. The others are
        zeros."""
        open_, plan, missing = _ALL, [], 0
        for layer, entry in zip(self._layers, entries, strict=True):
            plan.append(open_ & entry.cached & ~entry.zero)
            if layer.record.is_volume:
                missing |= open_ & entry.present & ~(entry.cached | entry.zero)
                open_ &= ~(entry.present | entry.cached | entry.zero)
            else:
                missing |= open_ & valid_pages(block, layer.record.size_bytes) & ~(entry.cached | entry.zero)
                open_ = 0
        return plan, missing | self._below(block, open_)

    def _below(self, block: int, open_: int) -> int:
        """What nobody has of a volume whose base is not here at all."""
        record = self._layers[-1].record
        if not record.is_volume or not record.url:
            return 0
        return open_ & valid_pages(block, record.base_size_bytes)

    def _block(self, block: int, pages: int) -> bytes:
        """A block, of which only these pages count."""
        for _ in range(_TRIES):
            entries = self._entries(block)
            plan, missing = self._plan(block, entries)
            if missing & pages:
                raise Missing(missing & pages)
            content = bytearray(BLOCK_BYTES)
            bad = 0
            for number, (entry, wanted) in enumerate(zip(entries, plan, strict=True)):
                if wanted & pages:
                    bad |= self._take(number, block, entry, wanted & pages, content)
            if self._entries(block) == entries:
                if bad:
                    self._refuse(block, bad)
                return bytes(content)
        raise Doubtful(f"block {block} changes faster than it can be read", "try again")

    def _take(self, number: int, block: int, entry: Entry, wanted: int, content: bytearray) -> int:
        """Pages of a layer's slot; which of them are not what their sums say."""
        memory, size_bytes = self._memory[number], self._layers[number].record.size_bytes
        self._view.read_slot(entry.slot, 0, memory)
        end = block_extent(block, size_bytes).length  # what is behind it reads as zeros
        for page in range(PAGES_PER_BLOCK):
            if wanted >> page & 1:
                at, stop = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, end)
                content[at:stop] = memory[at:stop]
        if checked := entry.checkable & wanted:
            return bad_pages(memory, self._view.packed_sums(entry.slot), checked)
        return 0

    def _refuse(self, block: int, bad: int) -> None:
        page = next(page for page in range(PAGES_PER_BLOCK) if bad >> page & 1)
        at = block * BLOCK_BYTES + page * PAGE_BYTES
        raise Doubtful(
            f"the cached page at {at:#x} is not what was written there: its checksum does not fit",
            f"`tierblk cache verify {self._view.path}` names all of them",
        )


def _pages_of(block: int, wanted: Extent) -> int:
    """The mask of a block's pages that hold any of these bytes."""
    part = wanted.overlap(Extent(block * BLOCK_BYTES, BLOCK_BYTES))
    return sum(1 << page - block * PAGES_PER_BLOCK for page in part.pages())
