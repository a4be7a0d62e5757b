"""Bad clean pages of a directory that nobody serves are fetched anew and written into their slots.

A page counts as right when it fits the sum that was kept, or when the cache and its origin agree about it and
only the sum does not. When all three differ nobody can say which is right, and nothing is touched; nor when
the page cannot be fetched."""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tierblk.cache import LayerRecord, View, look
from tierblk.cache.mend import Mender
from tierblk.config import Config
from tierblk.core import PAGE_BYTES, PAGES_PER_BLOCK, crc32c
from tierblk.errors import CacheError, TierblkError
from tierblk.extent import BLOCK_BYTES, block_extent
from tierblk.origin import Origin, origin_of
from tierblk.rundir import run_root

log = logging.getLogger(__name__)

Todo = tuple[int, int, int]
"""Layer, block, mask of its bad pages."""


@dataclass
class Repaired:
    """In pages. left: (layer, block, mask) of those that are as bad as before; reasons: why, each once."""

    pages: int = 0
    left: list[Todo] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def left_pages(self) -> int:
        return sum(mask.bit_count() for _, _, mask in self.left)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return {"pages": self.pages, "left_pages": self.left_pages, "reasons": self.reasons}

    def leave(self, todo: Todo, reason: str) -> None:
        """Not repaired."""
        self.left.append(todo)
        if reason not in self.reasons:
            self.reasons.append(reason)


async def repair(
    path: Path,
    bad: Iterable[Todo],
    config: Config | None,
    progress: Callable[[int], None] = lambda pages: None,
) -> Repaired:
    """Durable when it returns, also in part when it is cancelled. config: of one of the directory's devices;
    says how its origin is reached. progress: told how many pages were looked at since the last time.
    CacheError: somebody uses the directory, or it cannot be written."""
    done, origins = Repaired(), dict[int, Origin | TierblkError | None]()
    with look(path, run_root(), lenient=True) as view, Mender(view) as mender:
        records = {record.layer_id: record for record in view.records}
        try:
            for todo in bad:
                record = records.get(todo[0])
                if record is None:
                    continue
                if record.layer_id not in origins:
                    origins[record.layer_id] = await _origin(view, record, config)
                origin = origins[record.layer_id]
                if not isinstance(origin, Origin):
                    done.leave(todo, str(origin or f"nobody else has {record.shown}"))
                else:
                    try:
                        done.pages += await _mend(view, record, origin, mender, todo, done)
                    except TierblkError as error:
                        done.leave(todo, error.message)
                progress(todo[2].bit_count())
        finally:
            for origin in origins.values():
                if isinstance(origin, Origin):
                    await origin.aclose()
    return done


async def _origin(view: View, record: LayerRecord, config: Config | None) -> Origin | TierblkError | None:
    try:
        return await origin_of(view, record, config)
    except TierblkError as error:
        return error


async def _mend(
    view: View, record: LayerRecord, origin: Origin, mender: Mender, todo: Todo, done: Repaired
) -> int:
    """How many pages of a block were written."""
    _, block, pages = todo
    entry = await asyncio.to_thread(view.layer(record).entry, block)
    pages &= entry.cached & ~entry.dirty
    if not pages or not 0 < entry.slot < view.whole_slots:
        return 0
    where = block_extent(block, record.size_bytes)
    data = bytearray(BLOCK_BYTES)
    first, end = (pages & -pages).bit_length() - 1, pages.bit_length()
    begin, stop = first * PAGE_BYTES, min(end * PAGE_BYTES, where.length)
    await origin.read_into(where.offset + begin, memoryview(data)[begin:stop])
    kept = await asyncio.to_thread(view.sums, entry.slot)
    strange = 0
    for page in range(PAGES_PER_BLOCK):
        if not pages >> page & 1:
            continue
        theirs = bytes(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        if crc32c(theirs) == kept[page] or theirs == await asyncio.to_thread(_ours, view, entry.slot, page):
            mender.put(entry.slot, page, theirs)
        else:
            strange |= 1 << page
    if strange:
        reason = f"{record.shown} has other bytes now than were cached: `tierblk cache evict` drops them"
        done.leave((record.layer_id, block, strange), reason)
    return (pages & ~strange).bit_count()


def _ours(view: View, slot: int, page: int) -> bytes:
    """A page as the slot has it; b"" when it cannot be read."""
    with mmap.mmap(-1, PAGE_BYTES) as buffer:
        try:
            view.read_slot(slot, page, buffer)
        except CacheError:
            return b""
        return buffer[:]
