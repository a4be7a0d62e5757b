"""The pages of a volume that are in its stores, as a source: what the map names is read, checked and put
where it belongs.

A read becomes few ranges of objects: pieces that lie near each other in one object are one request. Pages
that are raw and in the same order there and here go straight into the buffer; the rest goes through memory of
its own, because it is compressed, or lies elsewhere, or is not wanted as a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import zstandard

from tierblk.errors import RemoteMismatch
from tierblk.extent import PAGE_BYTES
from tierblk.remote.extents import ExtentMap
from tierblk.remote.lineage import Lineage
from tierblk.remote.pieces import Piece
from tierblk.remote.record import Codec, ObjectName, pages_of
from tierblk.remote.source import Identity, Progress
from tierblk.remote.store import Store, all_of
from tierblk.units import KIB, MIB

RANGE_BYTES_MAX = 8 * MIB
GAP_BYTES_MAX = 64 * KIB
"""Between two pieces: reading over it costs less than another request."""

REQUESTS_MAX = 32
REQUESTS_OF_READ_MAX = 8
"""So that one read of scattered pages does not keep all others waiting."""

THREAD_BYTES = 256 * KIB
"""Fewer are checked before a thread would have begun."""

WINDOW_BYTES_MAX = 8 * MIB
"""Of a zstd frame: what a decompressor has to be able to (RFC 8878), and what one may make us reserve."""

Checksum = Callable[[memoryview], int]


@dataclass(slots=True)
class _Range:
    """Bytes [begin, end) of an object, and the pieces in them, in the order of their bytes."""

    object: ObjectName
    begin: int
    end: int
    pieces: list[Piece] = field(default_factory=list)

    def takes(self, begin: int, end: int) -> bool:
        """Whether a piece at these bytes, which does not begin before the last one, may be read with it."""
        near = begin <= self.end + GAP_BYTES_MAX
        return near and max(end, self.end) - self.begin <= RANGE_BYTES_MAX

    def is_straight(self) -> bool:
        """Whether its bytes are those of its pages, one after the other."""
        at, page = self.begin, self.pieces[0].page
        for piece in self.pieces:
            begin, end = _place(piece)
            if piece.codec != Codec.RAW or begin != at or piece.page != page:
                return False
            at, page = end, piece.end
        return True


class StoredPages:
    """See Source for what its methods promise. Offsets are multiples of 4096, and so are lengths, except that
    the volume's last page may be asked for only up to the volume's end.

    Only pages that the map has in a piece are read; of a hole in it the buffer gets zeros. (A block map may
    ask for one: over nothing, zeros are not kept in the extent map.)
    """

    def __init__(
        self,
        lineage: Lineage,
        extents: ExtentMap,
        checksum: Checksum,
        *,
        requests_max: int = REQUESTS_MAX,
    ) -> None:
        """extents: looked at at the begin of every read, on the loop. checksum: the crc32c of bytes, called
        in threads too; an argument since it is the engine's, which the far tier does not know. requests_max:
        how many ranges of all reads may be asked for at once; the stores are the lineage's to close."""
        self._lineage = lineage
        self._extents = extents
        self._checksum = checksum
        self._turns = asyncio.Semaphore(requests_max)

    @property
    def identity(self) -> Identity:
        """The volume, whatever its epoch; its size is the map's of now."""
        validator = f"volume:{self._lineage.birth.uuid}"
        return Identity(self._lineage.store.shown, self._extents.head.size_bytes, validator)

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """See Source.read_into. The map counts as it is when this is called. ValueError: not whole pages of
        the volume. RemoteMismatch: bytes that are not those which were stored. RemoteRefused, with its name:
        an object is not there."""
        view = buffer.cast("B")
        page, pages = self._pages(offset_bytes, len(view))
        read, pieces = _Read(page, pages, view, progress), list[Piece]()
        for part in self._extents.lookup(page, pages):
            if isinstance(part, Piece):
                pieces.append(part)
            else:
                read.put(part.page, memoryview(bytes(part.pages * PAGE_BYTES)))
        read.want(pieces)
        ranges = _ranges(pieces)
        left = iter(ranges)

        async def work() -> None:
            for wanted in left:
                async with self._turns:
                    await self._fetch(wanted, read)

        await all_of(work() for _ in range(min(len(ranges), REQUESTS_OF_READ_MAX)))

    async def aclose(self) -> None:
        """Close the lineage's stores; reads that still run end in an error."""
        await self._lineage.aclose()

    def _pages(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        """(first, how many)."""
        size_bytes = self._extents.head.size_bytes
        end_bytes = offset_bytes + length_bytes
        if offset_bytes % PAGE_BYTES or (length_bytes % PAGE_BYTES and end_bytes != size_bytes):
            raise ValueError(f"{length_bytes} bytes at {offset_bytes} are not whole pages of the volume")
        return offset_bytes // PAGE_BYTES, pages_of(length_bytes)

    async def _fetch(self, wanted: _Range, read: _Read) -> None:
        """Bring a range, and tell of its pages."""
        store = self._lineage.store_of(wanted.object.epoch)
        straight = read.part(wanted.pieces[0].page, wanted.pieces[-1].end) if wanted.is_straight() else None
        length_bytes = wanted.end - wanted.begin
        target = straight if straight is not None else memoryview(bytearray(length_bytes))
        await store.read_into(str(wanted.object), wanted.begin, target)
        if length_bytes >= THREAD_BYTES:
            found = await asyncio.to_thread(_checked, store, wanted, target, self._checksum)
        else:
            found = _checked(store, wanted, target, self._checksum)
        # Only here: a thread goes on when who waits for it has left.
        if straight is None:
            for piece, raw in found:
                read.put(piece.page, raw)
        read.have(wanted.pieces)


class _Read:
    """The buffer of a read, and which of its pages are there."""

    def __init__(self, page: int, pages: int, view: memoryview, progress: Progress) -> None:
        self._page = page
        self._view = view
        self._progress = progress
        self._there = bytearray(b"\1") * pages
        self._told = 0  # pages, from the first

    def want(self, pieces: list[Piece]) -> None:
        """All but these pages are there."""
        for piece in pieces:
            self._mark(piece, b"\0")
        self._tell()

    def have(self, pieces: list[Piece]) -> None:
        """So are these."""
        for piece in pieces:
            self._mark(piece, b"\1")
        self._tell()

    def part(self, page: int, end: int) -> memoryview | None:
        """The place of pages [page, end); None when the last one has only a part of its own."""
        begin_bytes, end_bytes = (page - self._page) * PAGE_BYTES, (end - self._page) * PAGE_BYTES
        return self._view[begin_bytes:end_bytes] if end_bytes <= len(self._view) else None

    def put(self, page: int, raw: memoryview) -> None:
        """The bytes of pages from `page` on, as far as they have a place."""
        at = (page - self._page) * PAGE_BYTES
        length_bytes = min(len(raw), len(self._view) - at)
        self._view[at : at + length_bytes] = raw[:length_bytes]

    def _mark(self, piece: Piece, mark: bytes) -> None:
        self._there[piece.page - self._page : piece.end - self._page] = mark * piece.pages

    def _tell(self) -> None:
        missing = self._there.find(0, self._told)
        told = len(self._there) if missing < 0 else missing
        if told > self._told:
            self._told = told
            self._progress(min(told * PAGE_BYTES, len(self._view)))


def _place(piece: Piece) -> tuple[int, int]:
    """Bytes [begin, end) of its object that have to be read for a piece."""
    if piece.codec == Codec.RAW:
        begin = piece.offset_bytes + piece.skip * PAGE_BYTES
        return begin, begin + piece.pages * PAGE_BYTES
    return piece.offset_bytes, piece.offset_bytes + piece.stored_bytes


def _ranges(pieces: list[Piece]) -> list[_Range]:
    """What has to be read for the pieces, in the order of the first page of each, so that what is told grows
    from the begin."""
    by_object: dict[ObjectName, list[Piece]] = {}
    for piece in pieces:
        by_object.setdefault(piece.object, []).append(piece)
    ranges: list[_Range] = []
    for name, of_object in by_object.items():
        last: _Range | None = None
        # Parts of one compressed run are at one place, in the order of their pages.
        for piece in sorted(of_object, key=_place):
            begin, end = _place(piece)
            if last is None or not last.takes(begin, end):
                last = _Range(name, begin, end)
                ranges.append(last)
            last.end = max(last.end, end)
            last.pieces.append(piece)
    return sorted(ranges, key=lambda wanted: min(piece.page for piece in wanted.pieces))


def _checked(
    store: Store, wanted: _Range, stored: memoryview, checksum: Checksum
) -> list[tuple[Piece, memoryview]]:
    """The raw bytes of each piece. RemoteMismatch unless they are what was stored. It writes nowhere."""
    runs: dict[tuple[int, int, int], memoryview] = {}
    found = []
    name = f"{store.shown}/{wanted.object}"
    for piece in wanted.pieces:
        begin, end = _place(piece)
        raw = stored[begin - wanted.begin : end - wanted.begin]
        if piece.codec == Codec.ZSTD:
            run = (begin, end, piece.run_pages)
            if run not in runs:
                runs[run] = _unpacked(raw, piece, name)
            raw = runs[run][piece.skip * PAGE_BYTES : (piece.skip + piece.pages) * PAGE_BYTES]
        for page in range(piece.page, piece.end):
            at = (page - piece.page) * PAGE_BYTES
            if checksum(raw[at : at + PAGE_BYTES]) != piece.crc(page):
                raise RemoteMismatch(f"{name}: page {page} is not what was stored, its checksum is wrong")
        found.append((piece, raw))
    return found


def _unpacked(frame: memoryview, piece: Piece, name: str) -> memoryview:
    """All pages of a compressed run."""
    raw_bytes = piece.run_pages * PAGE_BYTES
    try:
        # What a frame says of its size would be reserved, however much it is.
        if zstandard.frame_content_size(frame) in (-1, raw_bytes):
            raw = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX).decompress(
                frame, max_output_size=raw_bytes, allow_extra_data=False
            )
            if len(raw) == raw_bytes:
                return memoryview(raw)
    except (zstandard.ZstdError, MemoryError):
        pass
    raise RemoteMismatch(
        f"{name}: the run at {piece.offset_bytes} does not decompress to {piece.run_pages} pages"
    )
