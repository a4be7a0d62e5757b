"""Whether pages are what their sums say: neighbouring slots in one read, several reads at a time.

Beside a daemon a block may have another slot, or other bytes, between the look at its entry and the read.
So what does not fit is looked at again, entry and bytes, until two looks that saw the same entry before and
after agree.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import local
from typing import NamedTuple

from tierblk.cache.rows import Entry
from tierblk.cache.superblock import SLOT_BYTES
from tierblk.cache.view import LayerView, State, View
from tierblk.core import PAGES_PER_BLOCK, page_sums
from tierblk.errors import CacheError

SUM_BYTES = 4
READ_SLOTS = 16  # neighbours that one read of 1 MiB takes
READERS = 4
_BATCH_BLOCKS = 1 << 14  # are sorted by slot together
_LOOKS_MAX = 16


class Place(NamedTuple):
    """A block and what its map said."""

    layer: LayerView
    block: int
    entry: Entry


class Bad(NamedTuple):
    """A block that cannot be right. pages: a mask of those whose bytes do not fit their sums; trouble: why
    nothing is known of any of its bytes, else "". clean and dirty: which of its pages that is about somebody
    else has, and which nobody."""

    layer: LayerView
    block: int
    slot: int
    pages: int
    clean: int
    dirty: int
    trouble: str = ""


class Checked(NamedTuple):
    """How many places one read was for, what was bad, and how many blocks changed too fast to be judged."""

    places: int
    bad: list[Bad]
    unsettled: int


def bad_pages(block: memoryview, kept: bytes, pages: int) -> int:
    """Of a slot's bytes the pages, of those in the mask, that are not what its 64 bytes of sums say."""
    made = page_sums(block, pages)
    if pages == (1 << PAGES_PER_BLOCK) - 1 and made == kept:
        return 0
    pairs = zip(memoryview(made).cast("I"), memoryview(kept).cast("I"), strict=True)
    return sum(1 << page for page, (one, other) in enumerate(pairs) if one != other) & pages


class PageCheck:
    """Checks places of one view in threads of its own."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._live = view.state is State.SERVED
        self._memory = local()

    def check(self, places: Iterable[Place]) -> Generator[Checked, None, None]:
        """Of all places, which have pages with sums, in an order that suits the disk."""
        runs = _runs(places)
        pool = ThreadPoolExecutor(READERS, "check")
        pending: deque[Future[Checked]] = deque()
        try:
            for run in runs:
                pending.append(pool.submit(self._check_run, run))
                if len(pending) > 2 * READERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _buffer(self) -> memoryview:
        """Of this thread; page-aligned, as O_DIRECT wants it."""
        if not hasattr(self._memory, "buffer"):
            self._memory.buffer = memoryview(mmap.mmap(-1, READ_SLOTS * SLOT_BYTES))
        buffer: memoryview = self._memory.buffer
        return buffer

    def _check_run(self, run: list[Place]) -> Checked:
        first = run[0].entry.slot
        buffer = self._buffer()[: len(run) * SLOT_BYTES]
        try:
            kept = self._view.packed_sums(first, len(run))
            self._view.read_slot(first, 0, buffer)
        except CacheError as error:
            if len(run) > 1:  # which of them it is
                parts = [self._check_run([place]) for place in run]
                bad = [each for part in parts for each in part.bad]
                return Checked(len(run), bad, sum(part.unsettled for part in parts))
            place = run[0]
            return Checked(1, [_unreadable(place, place.entry, error)], 0)
        sum_bytes = SUM_BYTES * PAGES_PER_BLOCK
        found, unsettled = list[Bad](), 0
        for i, place in enumerate(run):
            sums = kept[i * sum_bytes : (i + 1) * sum_bytes]
            pages = bad_pages(buffer[i * SLOT_BYTES : (i + 1) * SLOT_BYTES], sums, place.entry.checkable)
            if pages and not self._live:
                found.append(_bad(place, place.entry, pages))
            elif pages:
                again = self._again(place)
                unsettled += again is None
                found += [again] if again else []
        return Checked(len(run), [bad for bad in found if bad.pages or bad.trouble], unsettled)

    def _again(self, place: Place) -> Bad | None:
        """One with no pages: all is well. None: it never stood still."""
        try:
            found = settled(self._view, place.layer, place.block)
        except CacheError as error:
            return _unreadable(place, place.entry, error)
        return _bad(place, found.entry, found.bad) if found else None


def _unreadable(place: Place, entry: Entry, error: CacheError) -> Bad:
    clean, dirty = entry.cached & ~entry.dirty, entry.cached & entry.dirty
    return Bad(place.layer, place.block, entry.slot, 0, clean, dirty, error.message)


def _bad(place: Place, entry: Entry, pages: int) -> Bad:
    return Bad(place.layer, place.block, entry.slot, pages, pages & ~entry.dirty, pages & entry.dirty)


class Sums(NamedTuple):
    """A block, the kept sums of its slot's pages, and the mask of the pages that they do not fit."""

    entry: Entry
    kept: tuple[int, ...]
    bad: int


def settled(view: View, layer: LayerView, block: int) -> Sums | None:
    """A block and its sums as they are at one time; beside a daemon a page is bad when two looks say so.
    None: it changes all the time. CacheError: it cannot be read."""
    before: Sums | None = None
    with mmap.mmap(-1, SLOT_BYTES) as memory, memoryview(memory) as bytes_:
        for _ in range(_LOOKS_MAX):
            entry = layer.entry(block)
            if not entry.checkable:
                return Sums(entry, (0,) * PAGES_PER_BLOCK, 0)
            packed = view.packed_sums(entry.slot)
            view.read_slot(entry.slot, 0, bytes_)
            found = Sums(
                entry, tuple(memoryview(packed).cast("I")), bad_pages(bytes_, packed, entry.checkable)
            )
            if view.state is not State.SERVED or found == before:
                return found
            if layer.entry(block) == entry:
                if not found.bad:
                    return found
                before = found
    return None


def _runs(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Places whose slots are neighbours, by slot, of some thousands at a time."""
    left = iter(places)
    while batch := sorted(islice(left, _BATCH_BLOCKS), key=lambda place: place.entry.slot):
        run: list[Place] = []
        for place in batch:
            if run and (place.entry.slot != run[-1].entry.slot + 1 or len(run) == READ_SLOTS):
                yield run
                run = []
            run.append(place)
        yield run
