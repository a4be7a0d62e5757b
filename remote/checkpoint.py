"""A checkpoint: the whole extent map at an epoch as bytes. Pure; the table of them is in docs/formats.md.

It spares a reader all records up to its epoch. It is named by the hash of that epoch's record, so the loser
of a race for the epoch cannot leave a wrong map under a name that counts (R15), and says the hash itself
too. One map has one spelling: what is decoded encodes to the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from uuid import UUID

from tierblk.errors import RemoteRefused
from tierblk.extent import PAGE_BYTES
from tierblk.remote.birth import Base
from tierblk.remote.epoch import take_base
from tierblk.remote.extents import ExtentMap
from tierblk.remote.names import ATTEMPT_BYTES, CheckpointName
from tierblk.remote.packed import Malformed, Reader, sealed, unsealed
from tierblk.remote.pieces import PIECE_BYTES_MIN, Piece, pack, piece_fault, unpack
from tierblk.remote.record import (
    NO_HASH,
    Head,
    ObjectName,
    pages_of,
    source_fault,
    standing_fault,
)
from tierblk.units import GIB

FORMAT_VERSION = 1
MAGIC = b"TBCHECK\0"
CHECKPOINT_BYTES_MAX = 4 * GIB

_BEGIN = struct.Struct("<8sI")
# uuid, epoch, hash of its record, size, base visible, size of the base;
# then how many: bytes of url and validator, objects, ranges of zeroes, rows.
_HEADER = struct.Struct("<16sQ32sQQQ5I")
_OBJECT = struct.Struct("<Q16sI")
_ZEROES = struct.Struct("<QQ")
_ROW = struct.Struct("<QI")


def name_of(head: Head) -> str:
    """The name, below the prefix, of the checkpoint of a map that stands there."""
    return str(CheckpointName(head.epoch, head.hash))


def encode(extents: ExtentMap) -> bytes:
    """The bytes of a map at an epoch from 1. ValueError: it is at none, or has more than a checkpoint can."""
    head = extents.head
    if head.epoch == 0:
        raise ValueError("no checkpoint: the volume has no epoch yet")
    base = head.base or Base("", 0, "")
    url, validator = base.url.encode(), base.validator.encode()
    objects = sorted(extents.live_bytes())
    numbers = {name: number for number, name in enumerate(objects)}
    rows = [(row, pack(pieces, numbers)) for row, pieces in extents.rows()]
    zeroes = extents.zeroes()
    header = _HEADER.pack(
        head.uuid.bytes,
        head.epoch,
        head.hash,
        head.size_bytes,
        head.base_visible_bytes,
        base.size_bytes,
        len(url),
        len(validator),
        len(objects),
        len(zeroes),
        len(rows),
    )
    parts = [_BEGIN.pack(MAGIC, FORMAT_VERSION), header, url, validator]
    parts += [_OBJECT.pack(*name) for name in objects]
    parts += [_ZEROES.pack(first, end - first) for first, end in zeroes]
    for row, packed in rows:
        parts += [_ROW.pack(row, len(packed)), packed]
    encoded = sealed(b"".join(parts))
    if len(encoded) > CHECKPOINT_BYTES_MAX:
        raise ValueError(f"no checkpoint: it has {len(encoded)} bytes, more than {CHECKPOINT_BYTES_MAX}")
    return encoded


def decode(data: bytes, *, name: str) -> ExtentMap:
    """The map that the bytes are; name is the object's, for the messages.

    RemoteRefused: no checkpoint, damaged, of a newer format, or a map that no records could have made (I12).
    Whether it is of the record that it should be of is seen in the map's head.
    """
    reader = unsealed(
        data,
        name=name,
        what="checkpoint",
        magic=MAGIC,
        version=FORMAT_VERSION,
        bytes_max=CHECKPOINT_BYTES_MAX,
    )
    try:
        return _map(reader)
    except Malformed as error:
        raise RemoteRefused(f"{name} is no checkpoint: {error}") from None


def _map(reader: Reader) -> ExtentMap:
    uuid, epoch, record_hash, size_bytes, visible_bytes, base_bytes, *counts = reader.fields(_HEADER)
    url_bytes, validator_bytes, objects, zeroes, rows = counts
    base = take_base(reader, base_bytes, url_bytes, validator_bytes)
    if (wrong := standing_fault(size_bytes, visible_bytes, base)) is not None:
        raise Malformed(wrong)
    if epoch == 0 or record_hash == NO_HASH:
        raise Malformed("it is of no record")
    head = Head(UUID(bytes=uuid), epoch, record_hash, size_bytes, visible_bytes, base)
    names = list(_objects(reader, objects, epoch))
    ranges = list(_ranges(reader, zeroes, pages_of(visible_bytes)))
    extents = ExtentMap(head)
    extents.load(_rows(reader, rows, names, pages_of(size_bytes)), ranges)
    reader.end()
    if len(extents.live_bytes()) != len(names):
        raise Malformed("it lists objects of which nothing is used")
    for first, end in ranges:
        if extents.is_stored(first, end):
            raise Malformed(f"of the pages {first} to {end} some are zeros and stored")
    return extents


def _objects(reader: Reader, count: int, epoch: int) -> Iterator[ObjectName]:
    before = None
    for _ in reader.times(count, _OBJECT.size):
        name = ObjectName(*reader.fields(_OBJECT))
        if (before is not None and name <= before) or not 1 <= name.epoch <= epoch:
            raise Malformed(f"an object of epoch {name.epoch} is out of order")
        if before is not None and before.epoch == name.epoch and before.attempt != name.attempt:
            raise Malformed(f"epoch {name.epoch} has two attempts")
        if source_fault(name.n, PAGE_BYTES, 1) is not None or len(name.attempt) != ATTEMPT_BYTES:
            raise Malformed(f"there is no object {name.n} of an epoch")
        yield name
        before = name


def _ranges(reader: Reader, count: int, base_pages: int) -> Iterator[tuple[int, int]]:
    """Zeroes are where the base could be seen, and ranges of them do not touch."""
    before = -1
    for _ in reader.times(count, _ZEROES.size):
        first, pages = reader.fields(_ZEROES)
        if first <= before or not 1 <= pages <= base_pages - first:
            raise Malformed(f"the zeroes at page {first} are out of order or not above the base")
        before = first + pages
        yield first, before


def _rows(
    reader: Reader, count: int, names: list[ObjectName], pages_end: int
) -> Iterator[tuple[int, list[Piece]]]:
    before = -1
    for _ in reader.times(count, _ROW.size + PIECE_BYTES_MIN):
        row, packed_bytes = reader.fields(_ROW)
        if row <= before or packed_bytes == 0:
            raise Malformed(f"row {row} is out of order or empty")
        pieces = unpack(row, reader.take(packed_bytes), names)
        last = None
        for piece in pieces:
            if (wrong := piece_fault(piece, last, row, pages_end)) is not None:
                raise Malformed(wrong)
            last = piece
        yield row, pieces
        before = row
