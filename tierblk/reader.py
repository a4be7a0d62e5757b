"""Reads a device out of its cache directory, beside a daemon or without one: what is cached from the slots,
everything else from where it comes from.

A clean page counts only with its checksum; one that is bad is fetched instead. One that nobody else has is
given as it is, and told when it does not fit. Beside a daemon a slot can be
given to another block between looking and reading: an entry that is another one behind the bytes makes them
worthless, and the block is read again.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from tierblk.cache import Entry, LayerView, State, View
from tierblk.core import ENTRIES_PER_ROW, PAGE_BYTES, PAGES_PER_BLOCK, crc32c
from tierblk.errors import CacheError
from tierblk.extent import BLOCK_BYTES, block_count, valid_pages
from tierblk.origin import Origin
from tierblk.outlast import to_the_end

WINDOW_BYTES = 8 << 20
_GAP_PAGES = 16
"""Between two fetches: fetching over it costs less than another request."""
_TRIES = 50

Ranges = list[tuple[int, int]]


@dataclass
class Tally:
    """Where bytes came from so far. bad_pages: cached ones with another checksum than they should have, which
    were fetched. damaged: pages of the device that are not what was written, and that nobody else has: they
    are given as they are here. holes: (offset, length) in bytes of what could not be had."""

    cached_bytes: int = 0
    fetched_bytes: int = 0
    bad_pages: int = 0
    damaged: list[int] = field(default_factory=list)
    holes: Ranges = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """A layer of a device. origin: has what is not here; None: nobody has. size_bytes: how far it is seen."""

    layer: LayerView | None
    origin: Origin | None
    size_bytes: int


def windows(size_bytes: int, volume: LayerView | None, base_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the windows of a device, ascending, without those behind its base of which its
    volume knows nothing: a large volume is mostly such. volume: None: of a device without one. CacheError."""
    at, known_block = 0, 0
    while at < size_bytes:
        block = at // BLOCK_BYTES
        if volume is not None and at >= base_bytes and block >= known_block:
            if (piece := next(volume.pieces(block), None)) is None:
                return
            known_block = max(piece.first_block + piece.blocks, block + 1)
            at = max(piece.first_block, block) * BLOCK_BYTES // WINDOW_BYTES * WINDOW_BYTES
        yield at, min(WINDOW_BYTES, size_bytes - at)
        at += WINDOW_BYTES


class _Wants:
    """Pages of a window that are to come from each origin, or from nowhere."""

    def __init__(self) -> None:
        self.volume: list[int] = []
        self.base: list[int] = []
        self.lost: list[int] = []


class DeviceReader:
    """A volume over a base, or one of them alone."""

    def __init__(
        self,
        view: View,
        volume: Part | None,
        base: Part | None,
        size_bytes: int,
        *,
        offline: bool = False,
        holes: bool = False,
    ) -> None:
        """offline: nothing is fetched. holes: what cannot be had reads as zeros and is in the tally; else it
        is a CacheError."""
        self.size_bytes = size_bytes
        self.tally = Tally()
        self._view = view
        self._volume = volume
        self._base = base
        self._offline = offline
        self._holes = holes

    def windows(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of the pieces that `read` takes, ascending; between them are zeros."""
        base_bytes = self._base.size_bytes if self._base else 0
        return windows(self.size_bytes, self._volume.layer if self._volume else None, base_bytes)

    async def read(self, offset_bytes: int, length_bytes: int, buffer: mmap.mmap) -> None:
        """A window into page-aligned memory of at least that length. CacheError: it cannot be had, or changes
        all the time; RemoteUnavailable, RemoteRefused. Cancelled, nothing writes there any more."""
        blocks = range(offset_bytes // BLOCK_BYTES, block_count(offset_bytes + length_bytes))
        wants = await to_the_end(asyncio.to_thread(self._cached, blocks, buffer))
        with memoryview(buffer) as view, view[:length_bytes] as window:
            for part, pages in ((self._volume, wants.volume), (self._base, wants.base)):
                if pages:
                    assert part is not None
                    await self._fetch(part, pages, offset_bytes, window, wants.lost)
        self._lose(wants.lost, offset_bytes, buffer)

    # -- what is here ---

    def _cached(self, blocks: range, buffer: mmap.mmap) -> _Wants:
        """Put what is cached, and zeros, into the buffer; what is left to fetch."""
        wants, left = _Wants(), list(blocks)
        for _ in range(_TRIES):
            entries = self._entries(blocks)
            tried = [(block, self._read_block(block, blocks.start, entries, buffer)) for block in left]
            again = self._entries(blocks) if self._view.state is State.SERVED else entries
            left = []
            for block, block_wants in tried:
                if entries.get(block) != again.get(block):
                    left.append(block)
                    continue
                wants.volume += block_wants.volume
                wants.base += block_wants.base
                wants.lost += block_wants.lost
                self.tally.cached_bytes += block_wants.cached_bytes
                self.tally.bad_pages += block_wants.bad_pages
                self.tally.damaged += block_wants.damaged
            if not left:
                return wants
        raise CacheError(
            f"block {left[0]} changes faster than it can be read", "detach the device, or let it rest"
        )

    def _entries(self, blocks: range) -> dict[int, tuple[Entry, Entry]]:
        """Of the volume and of the base."""
        nothing = Entry()
        volume, base = (
            dict(part.layer.entries(blocks.start, blocks.stop)) if part and part.layer else {}
            for part in (self._volume, self._base)
        )
        return {
            block: (volume.get(block, nothing), base.get(block, nothing))
            for block in volume.keys() | base.keys()
        }

    def _read_block(
        self, block: int, first: int, entries: dict[int, tuple[Entry, Entry]], buffer: mmap.mmap
    ) -> _BlockWants:
        volume, base = entries.get(block, (Entry(), Entry()))
        wants = _BlockWants(block)
        there = valid_pages(block, self.size_bytes)
        shown = there & volume.present if self._volume else 0
        nobody_has = self._volume is None or self._volume.origin is None or self._is_lost(block)
        at = (block - first) * BLOCK_BYTES
        with memoryview(buffer) as view, view[at : at + BLOCK_BYTES] as target:
            good = self._read_slot(volume, shown & volume.cached, target, wants)
            missing = shown & ~good & ~(volume.zero & ~volume.cached)
            wants.take(missing, wants.lost if nobody_has else wants.volume)
            zeros = shown & ~good & ~missing
            seen = there & ~shown & (valid_pages(block, self._base.size_bytes) if self._base else 0)
            good = self._read_slot(base, seen & base.cached, target, wants)
            zeros |= seen & base.zero & ~base.cached | (there & ~shown & ~seen)
            wants.take(seen & ~good & ~(base.zero & ~base.cached), wants.base)
            _clear(target, zeros)
        return wants

    def _is_lost(self, block: int) -> bool:
        """Whether what the store has of it may be older than what was acknowledged (R9)."""
        layer = self._volume.layer if self._volume else None
        return layer is not None and block // ENTRIES_PER_ROW in layer.row_faults

    def _read_slot(self, entry: Entry, pages: int, target: memoryview, wants: _BlockWants) -> int:
        """Pages of a slot to their places; those that are good. CacheError: the SSD cannot be read, where
        nobody else has the bytes."""
        if not pages:
            return 0
        first, end = (pages & -pages).bit_length() - 1, pages.bit_length()
        with ExitStack() as undo:
            if pages.bit_count() == end - first:
                memory = undo.enter_context(target[first * PAGE_BYTES : end * PAGE_BYTES])
            else:  # what lies between is not to be written to
                space = undo.enter_context(mmap.mmap(-1, (end - first) * PAGE_BYTES))
                memory = undo.enter_context(memoryview(space))
            try:
                self._view.read_slot(entry.slot, first, memory)
                sums = self._view.sums(entry.slot)
            except CacheError:
                if entry.dirty & pages:
                    raise
                wants.bad_pages += pages.bit_count()
                return 0
            good = 0
            for page in range(first, end):
                if not pages >> page & 1:
                    continue
                data = memory[(page - first) * PAGE_BYTES : (page - first + 1) * PAGE_BYTES]
                undo.enter_context(data)
                if entry.checkable >> page & 1 and crc32c(data) != sums[page]:
                    if not entry.dirty >> page & 1:
                        wants.bad_pages += 1
                        continue
                    wants.take(1 << page, wants.damaged)
                if pages.bit_count() != end - first:
                    target[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = data
                good |= 1 << page
        wants.cached_bytes += good.bit_count() * PAGE_BYTES
        return good

    # -- what is not ---

    async def _fetch(
        self, part: Part, pages: list[int], offset_bytes: int, window: memoryview, lost: list[int]
    ) -> None:
        if self._offline or part.origin is None:
            lost += pages
            return
        for first, end in _runs(sorted(pages), _GAP_PAGES):
            begin = first * PAGE_BYTES
            length = min(end * PAGE_BYTES, part.size_bytes) - begin
            mine = [page for page in pages if first <= page < end]
            place = begin - offset_bytes
            if len(mine) == end - first:
                await part.origin.read_into(begin, window[place : place + length])
                _clear_rest(window, place + length, end * PAGE_BYTES - offset_bytes)
            else:
                whole = bytearray(end * PAGE_BYTES - begin)
                with memoryview(whole) as view:
                    await part.origin.read_into(begin, view[:length])
                for page in mine:
                    at, to = page * PAGE_BYTES - begin, page * PAGE_BYTES - offset_bytes
                    piece = whole[at : at + min(PAGE_BYTES, len(window) - to)]
                    window[to : to + len(piece)] = piece
            self.tally.fetched_bytes += length

    def _lose(self, pages: list[int], offset_bytes: int, buffer: mmap.mmap) -> None:
        if not pages:
            return
        ranges = [(first * PAGE_BYTES, (end - first) * PAGE_BYTES) for first, end in _runs(sorted(pages), 0)]
        if not self._holes:
            offset, length = ranges[0]
            why = "are not in the cache" if self._offline else "are lost: nobody has them"
            raise CacheError(
                f"{length} bytes at {offset} {why}", "with --holes what cannot be had is left out"
            )
        for offset, length in ranges:
            buffer[offset - offset_bytes : offset - offset_bytes + length] = bytes(length)
        self.tally.holes += ranges


@dataclass
class _BlockWants:
    """What is left to do of a block, in pages of the device."""

    block: int
    volume: list[int] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    cached_bytes: int = 0
    bad_pages: int = 0

    def take(self, mask: int, into: list[int]) -> None:
        """Pages of a mask."""
        first = self.block * PAGES_PER_BLOCK
        into += [first + page for page in range(PAGES_PER_BLOCK) if mask >> page & 1]


def _clear(target: memoryview, pages: int) -> None:
    for page in range(PAGES_PER_BLOCK):
        if pages >> page & 1:
            target[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)


def _clear_rest(window: memoryview, at: int, end: int) -> None:
    """Behind the last byte that a part has."""
    if (length := min(end, len(window)) - at) > 0:
        window[at : at + length] = bytes(length)


def _runs(pages: list[int], gap: int) -> Ranges:
    """(first, end) of ascending pages that follow each other, with at most so many others between two."""
    runs: Ranges = []
    for page in pages:
        if runs and page <= runs[-1][1] + gap:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
