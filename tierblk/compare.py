"""Clean pages of a cache beside the bytes of where they came from: is the cache what it says?"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from tierblk.cache import Entry, LayerView, State, View
from tierblk.core import PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.errors import CacheError
from tierblk.extent import BLOCK_BYTES, Extent, block_extent
from tierblk.origin import Origin

BLOCKS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Compared:
    """Of one batch of blocks. pages: how many were compared; different: those that are not the origin's, in
    bytes of the layer; skipped: pages that changed meanwhile, beside a daemon, or could not be read."""

    pages: int
    different: list[Extent]
    skipped: int


async def compare(view: View, layer: LayerView, origin: Origin, where: Extent) -> AsyncIterator[Compared]:
    """All clean cached pages of a range, ascending. RemoteUnavailable, RemoteRefused: the origin's."""
    blocks = where.clamp(layer.record.size_bytes).blocks()
    batch: list[tuple[int, Entry]] = []
    for block, entry in _clean(layer, blocks):
        if batch and (block != batch[-1][0] + 1 or len(batch) == BLOCKS_AT_ONCE):
            yield await _compare(view, layer, origin, batch)
            batch = []
        batch.append((block, entry))
    if batch:
        yield await _compare(view, layer, origin, batch)


def _clean(layer: LayerView, blocks: range) -> Iterator[tuple[int, Entry]]:
    for block, entry in layer.entries(blocks.start, blocks.stop):
        if entry.cached & ~entry.dirty:
            yield block, entry


async def _compare(view: View, layer: LayerView, origin: Origin, batch: list[tuple[int, Entry]]) -> Compared:
    """Neighbouring blocks: one read of the origin."""
    size_bytes = layer.record.size_bytes
    first, last = batch[0][0], batch[-1][0]
    begin = block_extent(first, size_bytes).offset
    end = block_extent(last, size_bytes).end
    theirs = bytearray((last - first + 1) * BLOCK_BYTES)  # zeros behind the image's end, as in the slot
    await origin.read_into(begin, memoryview(theirs)[: end - begin])
    pages, skipped, different = 0, 0, list[Extent]()
    for block, entry in batch:
        mask = entry.cached & ~entry.dirty
        ours = await asyncio.to_thread(_stable, view, layer, block, entry)
        if ours is None:
            skipped += mask.bit_count()
            continue
        for page in range(PAGES_PER_BLOCK):
            if not mask >> page & 1:
                continue
            at = page * PAGE_BYTES
            there = (block - first) * BLOCK_BYTES + at
            pages += 1
            if ours[at : at + PAGE_BYTES] != theirs[there : there + PAGE_BYTES]:
                different.append(Extent(block * BLOCK_BYTES + at, PAGE_BYTES).clamp(size_bytes))
    return Compared(pages, different, skipped)


def _stable(view: View, layer: LayerView, block: int, entry: Entry) -> bytes | None:
    """The slot's bytes, if they were this block's while they were read."""
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        try:
            view.read_slot(entry.slot, 0, buffer)
        except CacheError:
            return None
        found = buffer[:]
    is_still = view.state is not State.SERVED or layer.entry(block) == entry
    return found if is_still else None
