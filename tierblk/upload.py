"""The bytes of a sealed epoch on their way to the store: read from the slots, packed into objects, created.

Blocks go in the order of their addresses, so that what is read together later lies together. A small epoch is
bytes in its record and no object at all; a larger one is objects of OBJECT_PAGES pages, a few under way at
once, each out of one of as many buffers: memory is bounded whatever an epoch has.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tierblk.core import PAGE_BYTES, PAGES_PER_BLOCK, Layer, Sealed
from tierblk.outlast import to_the_end
from tierblk.remote import (
    CRC_BYTES,
    IN_RECORD,
    INLINE_AT,
    INLINE_BYTES_MAX,
    Codec,
    Data,
    ObjectName,
    Run,
    Zeroes,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

OBJECT_PAGES = 4096
INLINE_PAGES = INLINE_BYTES_MAX // PAGE_BYTES
WORTH_PERCENT = 90
"""A run is stored compressed when it has at most so much of its bytes then."""

Persist = Callable[[Callable[[], Awaitable[T]]], Awaitable[T]]
"""Does it until there is an answer."""


@dataclass(slots=True)
class Packed:
    """What of an epoch goes into its record. groups: the blocks that were read together, and their sums, for
    Layer.clean."""

    data: list[Data] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    zeroes: list[Zeroes] = field(default_factory=list)
    inline: bytes = b""
    groups: list[tuple[Sequence[Sealed], bytes | None]] = field(default_factory=list)
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks whose pages are one object, or the record's inline bytes. n: of the object, or IN_RECORD."""

    n: int
    blocks: Sequence[Sealed]


class Uploader:
    """Brings sealed blocks of a layer to a store. create: makes an object, however long it takes; false when
    there is one of that name already. compression: "none" or "zstd". At most `requests` objects are under way
    at once."""

    def __init__(
        self,
        layer: Layer,
        create: Callable[[str, Sequence[bytes | memoryview]], Awaitable[bool]],
        *,
        requests: int,
        compression: str,
    ) -> None:
        self._layer = layer
        self._create = create
        self._requests = requests
        self.uploaded_bytes = 0
        """Of pages that are in the store, before compression, so far."""
        self._compressor = _zstd if compression == "zstd" else None

    async def upload(self, epoch: int, attempt: bytes, blocks: list[Sealed]) -> Packed:
        """All that these blocks were at the seal; the objects are there when it returns. OSError: the SSD
        does not give a page back. blocks is sorted."""
        blocks.sort()
        packed = Packed(zeroes=list(zero_ranges(blocks)))
        only_zeroes = [block for block in blocks if block.dirty == block.zero]
        if only_zeroes:
            packed.groups.append((only_zeroes, None))
        groups = split([block for block in blocks if block.dirty != block.zero])
        results: dict[int, tuple[Data | None, list[Run], bytes]] = {}
        free = asyncio.Semaphore(self._requests)
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    await free.acquire()
                    bring = self._bring(epoch, attempt, group, results, packed)
                    tasks.create_task(bring).add_done_callback(lambda _: free.release())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        for group in groups:
            data, runs, sums = results[group.n]
            if data is not None:
                packed.data.append(data)
            packed.runs += runs
            packed.groups.append((group.blocks, sums))
        return packed

    async def _bring(
        self,
        epoch: int,
        attempt: bytes,
        group: Group,
        results: dict[int, tuple[Data | None, list[Run], bytes]],
        packed: Packed,
    ) -> None:
        pages = sum((block.dirty & ~block.zero).bit_count() for block in group.blocks)
        buffer = memoryview(
            mmap.mmap(-1, pages * PAGE_BYTES)
        )  # page-aligned, and given back when it is dropped
        sums = await to_the_end(asyncio.to_thread(self._read, group.blocks, buffer))
        runs = list(runs_of(group, sums))
        pieces: list[bytes | memoryview] = [buffer]
        if self._compressor is not None:
            runs, pieces = await to_the_end(
                asyncio.to_thread(compressed, runs, buffer, group.n, self._compressor)
            )
        length_bytes = sum(map(len, pieces))
        if group.n == IN_RECORD:
            packed.inline = b"".join(pieces)
            results[group.n] = (None, runs, sums)
        else:
            # The attempt is random, so what is there already is ours: its answer was lost (R15, R16).
            await self._create(str(ObjectName(epoch, attempt, group.n)), pieces)
            results[group.n] = (Data(group.n, length_bytes), runs, sums)
        packed.stored_bytes += length_bytes
        self.uploaded_bytes += pages * PAGE_BYTES

    def _read(self, blocks: Sequence[Sealed], buffer: memoryview) -> bytes:
        """Their dirty pages; the sums of these. What has flipped on the SSD since it was written is uploaded
        as it is, for so does the device read, and only the log knows from then on."""
        _, sums = self._layer.read_sealed(blocks, buffer)
        for block, pages in self._layer.unfit(blocks, sums):
            which = ", ".join(str(page) for page in range(PAGES_PER_BLOCK) if pages >> page & 1)
            what = f"block {block} of layer {self._layer.layer_id}"
            log.error(
                "pages %s of %s are not what was written: the SSD has changed them; uploaded as is",
                which,
                what,
            )
        return sums


def zero_ranges(blocks: Sequence[Sealed]) -> Iterator[Zeroes]:
    """What became zeros, in as few ranges as there can be. blocks in order."""
    first = end = 0
    for block in blocks:
        for at, count in mask_runs(block.zero):
            page = block.block * PAGES_PER_BLOCK + at
            if page != end:
                if end > first:
                    yield Zeroes(first, end - first)
                first = page
            end = page + count
    if end > first:
        yield Zeroes(first, end - first)


def split(blocks: Sequence[Sealed]) -> list[Group]:
    """Groups of at most OBJECT_PAGES pages each, or the one that fits into the record."""
    counts = [(block.dirty & ~block.zero).bit_count() for block in blocks]
    if not blocks:
        return []
    if sum(counts) <= INLINE_PAGES:
        return [Group(IN_RECORD, blocks)]
    groups: list[Group] = []
    begin = pages = 0
    for at, count in enumerate(counts):
        if pages + count > OBJECT_PAGES:
            groups.append(Group(len(groups), blocks[begin:at]))
            begin, pages = at, 0
        pages += count
    return [*groups, Group(len(groups), blocks[begin:])]


def runs_of(group: Group, sums: bytes) -> Iterator[Run]:
    """The runs of a group whose pages lie raw one behind the other."""
    page_at = 0
    begin = INLINE_AT if group.n == IN_RECORD else 0
    for block in group.blocks:
        for at, count in mask_runs(block.dirty & ~block.zero):
            yield Run(
                block.block * PAGES_PER_BLOCK + at,
                count,
                group.n,
                begin + page_at * PAGE_BYTES,
                count * PAGE_BYTES,
                Codec.RAW,
                sums[page_at * CRC_BYTES : (page_at + count) * CRC_BYTES],
            )
            page_at += count


def compressed(
    runs: Sequence[Run], raw: memoryview, n: int, compressor: Callable[[], Callable[[memoryview], bytes]]
) -> tuple[list[Run], list[bytes | memoryview]]:
    """The same runs, each compressed where that is worth it, and their bytes in order. compressor: makes one
    for this call, since one serves one thread at a time."""
    compress = compressor()
    begin = at_bytes = INLINE_AT if n == IN_RECORD else 0
    kept: list[Run] = []
    pieces: list[bytes | memoryview] = []
    for run in runs:
        bytes_of_run = raw[run.offset_bytes - begin : run.offset_bytes - begin + run.stored_bytes]
        small = compress(bytes_of_run)
        is_worth = len(small) * 100 <= run.stored_bytes * WORTH_PERCENT
        piece: bytes | memoryview = small if is_worth else bytes_of_run
        kept.append(
            Run(
                run.page,
                run.pages,
                n,
                at_bytes,
                len(piece),
                Codec.ZSTD if is_worth else Codec.RAW,
                run.crcs,
            )
        )
        pieces.append(piece)
        at_bytes += len(piece)
    return kept, pieces


def _zstd() -> Callable[[memoryview], bytes]:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress


def mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of set bits."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        at, mask = at + skip, mask >> skip
        count = (~mask & (mask + 1)).bit_length() - 1
        yield at, count
        at, mask = at + count, mask >> count
