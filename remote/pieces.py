"""Pieces of an extent map, and the rows that they are packed in. Pure.

A row is 64 neighbouring blocks (1024 pages, 4 MiB), as in the cache's index. Its pieces are packed one
behind the other: a map of many gigabytes is a few long byte strings, not an object for each page.
Checkpoints have the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tierblk.extent import PAGES_PER_BLOCK
from tierblk.remote.packed import Malformed
from tierblk.remote.record import CRC_BYTES, Codec, ObjectName, Run, shape_fault, source_fault

ROW_PAGES = 64 * PAGES_PER_BLOCK

# page in the row, pages, skip, run_pages, codec, number of the object, offset, stored bytes; then the
# checksums.
_PIECE = struct.Struct("<HBBBBIII")
PIECE_BYTES_MIN = _PIECE.size + CRC_BYTES


class Piece(NamedTuple):
    """Neighbouring pages of one run: pages `skip` and following of the run_pages that are stored at
    offset_bytes of an object, in stored_bytes. A raw page can be read alone, of a zstd run all is. crcs:
    those of these pages.
    """

    page: int
    pages: int
    object: ObjectName
    offset_bytes: int
    stored_bytes: int
    codec: Codec
    skip: int
    run_pages: int
    crcs: bytes

    @property
    def end(self) -> int:
        """First page behind it."""
        return self.page + self.pages

    @property
    def share_bytes(self) -> int:
        """Its part of the stored bytes, rounded up."""
        return -(-self.stored_bytes * self.pages // self.run_pages)

    def crc(self, page: int) -> int:
        """The crc32c of the raw bytes of one of its pages."""
        at = (page - self.page) * CRC_BYTES
        return int.from_bytes(self.crcs[at : at + CRC_BYTES], "little")

    def part(self, first: int, end: int) -> Piece:
        """The pages of it in [first, end), of which there is at least one."""
        first, end = max(first, self.page), min(end, self.end)
        if (first, end) == (self.page, self.end):
            return self
        at = first - self.page
        return self._replace(
            page=first,
            pages=end - first,
            skip=self.skip + at,
            crcs=self.crcs[at * CRC_BYTES : (end - self.page) * CRC_BYTES],
        )

    def goes_on_in(self, other: Piece) -> bool:
        """Whether the two could be one piece."""
        return (
            (self.object, self.offset_bytes) == (other.object, other.offset_bytes)
            and self.end == other.page
            and self.skip + self.pages == other.skip
        )


class Hole(NamedTuple):
    """Pages of which a volume has no bytes: those of the base below base_visible_bytes (zeros behind it,
    where the last page is cut), or zeros."""

    page: int
    pages: int
    from_base: bool


def piece_of(run: Run, name: ObjectName) -> Piece:
    """All of a run."""
    return Piece(
        run.page, run.pages, name, run.offset_bytes, run.stored_bytes, run.codec, 0, run.pages, run.crcs
    )


def pack(pieces: Iterable[Piece], numbers: Mapping[ObjectName, int]) -> bytes:
    """Pieces of one row, in order, as bytes that say an object by its number."""
    parts = []
    for piece in pieces:
        parts.append(
            _PIECE.pack(
                piece.page % ROW_PAGES,
                piece.pages,
                piece.skip,
                piece.run_pages,
                piece.codec,
                numbers[piece.object],
                piece.offset_bytes,
                piece.stored_bytes,
            )
        )
        parts.append(piece.crcs)
    return b"".join(parts)


def unpack(row: int, packed: bytes, objects: Sequence[ObjectName | None]) -> list[Piece]:
    """The pieces of a row; objects by their numbers. Malformed: the bytes are not whole pieces of such
    objects.

    What the pieces say is not looked at, except that their codec is one.
    """
    pieces, at = [], 0
    while at < len(packed):
        if at + _PIECE.size > len(packed):
            raise Malformed(f"row {row} ends within a piece")
        page, pages, skip, run_pages, codec, number, offset_bytes, stored_bytes = _PIECE.unpack_from(
            packed, at
        )
        crcs = packed[at + _PIECE.size : (at := at + _PIECE.size + pages * CRC_BYTES)]
        if at > len(packed):
            raise Malformed(f"row {row} ends within a piece")
        name = objects[number] if number < len(objects) else None
        if name is None or codec not in (Codec.RAW, Codec.ZSTD):
            raise Malformed(f"row {row} has object {number} or codec {codec}, which are none")
        pieces.append(
            Piece(
                row * ROW_PAGES + page,
                pages,
                name,
                offset_bytes,
                stored_bytes,
                Codec(codec),
                skip,
                run_pages,
                crcs,
            )
        )
    return pieces


def piece_fault(piece: Piece, last: Piece | None, row: int, pages_end: int) -> str | None:
    """What is wrong with a piece behind the last one of its row; None: nothing."""
    if last is not None and (piece.page < last.end or last.goes_on_in(piece)):
        return f"the piece at page {piece.page} does not begin where one can"
    if piece.page // ROW_PAGES != row or piece.end > pages_end or piece.pages == 0:
        return f"the piece at page {piece.page} is not inside its row and the volume"
    if piece.skip + piece.pages > piece.run_pages:
        return f"the piece at page {piece.page} is not inside its run"
    wrong = shape_fault(piece.page - piece.skip, piece.run_pages, piece.codec, piece.stored_bytes)
    return wrong or source_fault(piece.object.n, piece.offset_bytes, piece.stored_bytes)
