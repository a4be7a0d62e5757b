"""A volume whose truth is object storage, as a running daemon has it: its block map, its extent map, the
store behind both, and where all that stands (R13, R18, R19).

What is kept of it in the index is written by the commit cycle together with the rows, so that no row is ever
newer than the extents beside it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from errno import EROFS
from typing import TYPE_CHECKING

from tierblk import standing as standings
from tierblk.cache import VolumeChange
from tierblk.core import PAGES_PER_BLOCK, Layer, Sealed, crc32c
from tierblk.layer import Filled
from tierblk.remote import Changes, ExtentMap, Fetcher, Identity, Lineage, Progress, Record, StoredPages
from tierblk.standing import Standing, shown_writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tierblk.config import RemoteSettings

log = logging.getLogger(__name__)

_SLICE_S = 0.002
"""How long the loop is held by what can be done in pieces."""
_LEARN_BLOCKS = 1024


class LateSource:
    """The pages in the store, once it is known where they are: reads wait for that. See Source."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._inner: StoredPages | None = None
        self._open = asyncio.Event()

    def open(self, pages: StoredPages) -> None:
        """From here on reads go on."""
        self._inner = pages
        self._open.set()

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """See Source.read_into."""
        await self._open.wait()
        assert self._inner is not None
        await self._inner.read_into(offset_bytes, buffer, progress)

    async def aclose(self) -> None:
        """The stores are the lineage's."""


class FarVolume(Filled):
    """All of it belongs to the event loop. It is the committer's source of what changed, see
    Cache.set_volume_source."""

    def __init__(
        self,
        name: str,
        layer: Layer,
        extents: ExtentMap,
        standing: Standing,
        remote: RemoteSettings,
        *,
        kept: Standing | None = None,
    ) -> None:
        """kept: where it stands as the index says it; None: the index has nothing. Reads of what is not
        cached wait until `open`."""
        self.name = name
        self.extents = extents
        self.lineage: Lineage | None = None
        self.epoch_unix_s: float | None = None  # when the last record was made, here
        self.standing = standing
        self._kept: Standing | None = kept
        self._taken: tuple[Changes | None, Standing | None] = (None, kept)
        validator = f"volume:{standing.uuid}"
        self._source = LateSource(Identity(standing.url, layer.size_bytes, validator))
        super().__init__(layer, Fetcher(self._source, remote))

    @property
    def shown(self) -> str:
        """Its prefix for messages."""
        return self._source.identity.shown

    def open(self, lineage: Lineage) -> None:
        """The extent map is at the head: pages can be read."""
        self.lineage = lineage
        self._source.open(StoredPages(lineage, self.extents, crc32c))

    def fence(self, reason: str) -> None:
        """Nothing that is written is acknowledged from here on; the next commit keeps that (R19)."""
        self.layer.refuse(EROFS)
        if not self.standing.fenced:
            log.error("%s (%s): %s; it can be read, and not written", self.name, self.shown, reason)
            self.standing = self.standing.fence(reason)

    def fence_by(self, record: Record) -> None:
        """Fenced by whoever made that record."""
        who = shown_writer(record.writer)
        self.fence(f"epoch {record.epoch} was made by {who}: another host has taken it over")

    async def apply(self, record: Record, record_hash: bytes, *, learn: bool) -> None:
        """The next record is part of the extent map. learn: what it names is newer than what is cached and
        clean; not so for what was uploaded from here. RemoteRefused: it does not follow."""
        if learn:  # first: clean pages are never older than the extents that a commit keeps (R18)
            await learn_blocks(self.layer, blocks_of(record))
        await self._slices(self.extents.applying(record, record_hash))
        self.standing = self.standing.at(self.extents.head.epoch)
        self.epoch_unix_s = time.time()

    async def learn_all(self) -> None:
        """The block map, which knows nothing yet, learns what the store has."""
        await learn_blocks(self.layer, _sealed(_map_pages(self.extents)))

    async def _slices(self, steps: Iterator[None]) -> None:
        clock = asyncio.get_running_loop().time
        until_s = clock() + _SLICE_S
        for _ in steps:
            if clock() >= until_s:
                await asyncio.sleep(0)
                until_s = clock() + _SLICE_S

    # -- the committer's ---

    def is_changed(self) -> bool:
        """Whether a commit would keep anything new."""
        return self.standing != self._kept or self.extents.is_changed

    def take(self) -> VolumeChange | None:
        """What changed since the last call."""
        if not self.is_changed():
            return None
        changes = self.extents.take_changes()
        self._taken, self._kept = (changes, self._kept), self.standing
        pairs, anew = (changes.pairs, changes.anew) if changes else ((), False)
        return VolumeChange(standings.encode(self.standing), pairs, anew)

    def put_back(self, change: VolumeChange) -> None:
        """It was not kept: all of it counts as changed."""
        changes, self._kept = self._taken
        if changes is not None:
            self.extents.put_back(changes)

    async def aclose(self) -> None:
        if self.lineage is not None:
            await self.lineage.aclose()


async def learn_blocks(layer: Layer, blocks: Iterable[Sealed]) -> None:
    """See Layer.learn; in pieces."""
    batch: list[Sealed] = []
    for block in blocks:
        batch.append(block)
        if len(batch) == _LEARN_BLOCKS:
            layer.learn(batch)
            batch.clear()
            await asyncio.sleep(0)
    layer.learn(batch)


def blocks_of(record: Record) -> Iterator[Sealed]:
    """What a record names, for Layer.learn; a block may come more than once."""
    yield from _sealed(_record_pages(record))


def _record_pages(record: Record) -> Iterator[tuple[int, int, bool]]:
    """(first page, how many, whether they are zeros) of what a record names."""
    for run in record.runs:
        yield run.page, run.pages, False
    for zeroes in record.zeroes:
        yield zeroes.page, zeroes.pages, True


def _map_pages(extents: ExtentMap) -> Iterator[tuple[int, int, bool]]:
    """The same of all that a map has."""
    for _, pieces in extents.rows():
        for piece in pieces:
            yield piece.page, piece.pages, False
    for first, end in extents.zeroes():
        yield first, end - first, True


def _sealed(ranges: Iterable[tuple[int, int, bool]]) -> Iterator[Sealed]:
    last: list[int] | None = None
    for page, pages, is_zero in ranges:
        while pages:
            block, at = divmod(page, PAGES_PER_BLOCK)
            count = min(pages, PAGES_PER_BLOCK - at)
            mask = ((1 << count) - 1) << at
            if last is not None and last[0] != block:
                yield Sealed(last[0], 0, last[1], last[2])
                last = None
            last = last or [block, 0, 0]
            last[1] |= mask
            last[2] |= mask if is_zero else 0
            page, pages = page + count, pages - count
    if last is not None:
        yield Sealed(last[0], 0, last[1], last[2])
