"""An extent map as key and value pairs, so that of a map that has changed a little, little has to be written.
Pure; the table of them is in docs/formats.md, and where they are kept is not known here.

    h                    the head, and how many pairs of the other kinds there are
    o + number, u32      an object, by its number in the rows
    r + row, u64         the pieces of a row, packed
    z + page, u64        zeros from this page on

Every value ends with the crc32 of its key and of itself: a bit that has changed in one must not become a page
at another place, whose own checksum would still be right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple
from uuid import UUID
from zlib import crc32

from tierblk.extent import PAGE_BYTES
from tierblk.remote.birth import Base
from tierblk.remote.epoch import take_base
from tierblk.remote.packed import Malformed, Reader
from tierblk.remote.record import NO_HASH, Head, ObjectName, pages_of, source_fault, standing_fault

FORMAT_VERSION = 1
Pair = tuple[bytes, bytes]

HEAD, OBJECT, ROW, ZEROES = b"h", b"o", b"r", b"z"
_NUMBER, _PAGE = struct.Struct(">I"), struct.Struct(">Q")
_CRC = _VERSION = struct.Struct("<I")
# uuid, epoch, hash of its record, size, base visible, size of the base; bytes of url and validator; how many
# numbers objects have, free ones included; then how many pairs: objects, rows, zeroes.
_HEAD = struct.Struct("<16sQ32sQQQIIIIQQ")
# As many objects as a volume of 1 PiB has at least; the map of such a one needs other memory than ours.
_NUMBERS_MAX = 1 << 25
_OBJECT = struct.Struct("<Q16sI")
_END = struct.Struct("<Q")


class Changes(NamedTuple):
    """What has to be written so that what is kept is the map: pairs, of which b"" deletes a key. anew: all
    that was kept before goes first."""

    pairs: tuple[Pair, ...]
    anew: bool


@dataclass(slots=True)
class Touched:
    """What of a map may differ from what is kept of it. everything: nothing is kept that counts."""

    everything: bool = True
    head: bool = False
    objects: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    zeroes: set[int] = field(default_factory=set)

    def clear(self) -> None:
        self.everything = self.head = False
        self.forget_parts()

    def forget_parts(self) -> None:
        """Which parts are touched is worth nothing when everything is."""
        for parts in (self.objects, self.rows, self.zeroes):
            parts.clear()

    def add(self, key: bytes) -> None:
        """That pair is touched."""
        self.head = True
        if key[:1] == OBJECT:
            self.objects.add(_NUMBER.unpack(key[1:])[0])
        elif key[:1] == ROW:
            self.rows.add(_PAGE.unpack(key[1:])[0])
        elif key[:1] == ZEROES:
            self.zeroes.add(_PAGE.unpack(key[1:])[0])


class Kept(NamedTuple):
    """A map out of its pairs. objects: by number, None for a free one; rows: packed, their pieces not yet
    looked at; zeroes: [first, end), in order and apart."""

    head: Head
    objects: list[ObjectName | None]
    rows: dict[int, bytes]
    zeroes: list[tuple[int, int]]


def head_pair(head: Head, numbers: int, objects: int, rows: int, zeroes: int) -> Pair:
    """numbers: that objects have, free ones included; then how many pairs of each kind there are."""
    base = head.base or Base("", 0, "")
    url, validator = base.url.encode(), base.validator.encode()
    fields = _HEAD.pack(
        head.uuid.bytes,
        head.epoch,
        head.hash,
        head.size_bytes,
        head.base_visible_bytes,
        base.size_bytes,
        len(url),
        len(validator),
        numbers,
        objects,
        rows,
        zeroes,
    )
    return _pair(HEAD, _VERSION.pack(FORMAT_VERSION) + fields + url + validator)


def object_pair(number: int, name: ObjectName | None) -> Pair:
    """None: the number is free."""
    return _pair(OBJECT + _NUMBER.pack(number), _OBJECT.pack(*name) if name else b"")


def row_pair(row: int, packed: bytes) -> Pair:
    """b"": the row has no pieces."""
    return _pair(ROW + _PAGE.pack(row), packed)


def zeroes_pair(first: int, end: int | None) -> Pair:
    """None: no range begins there."""
    return _pair(ZEROES + _PAGE.pack(first), b"" if end is None else _END.pack(end))


def _pair(key: bytes, value: bytes) -> Pair:
    return key, value + _CRC.pack(crc32(value, crc32(key))) if value else b""


def read(pairs: Iterable[Pair], uuid: UUID) -> Kept:
    """The map that the pairs are, of that volume, in whichever order they come. Malformed: they are none, or
    not all of them are there."""
    values: dict[bytes, bytes] = {}
    for key, value in pairs:
        if key in values:
            raise Malformed(f"the key {key.hex()} is there twice")
        values[key] = _unsealed(key, value)
    if HEAD not in values:
        raise Malformed("it has no head")
    head, numbers, *counts = _head(values.pop(HEAD), uuid)
    objects = dict(_objects(values))
    rows = dict(_with(values, ROW, _PAGE))
    zeroes = [(first, _fields(_END, value)[0]) for first, value in _with(values, ZEROES, _PAGE)]
    found = [len(objects), len(rows), len(zeroes)]
    if found != counts or sum(found) != len(values):
        raise Malformed(f"its head says {counts} objects, rows and zeroes, of which {found} are there")
    _check_objects(objects, numbers, head.epoch)
    zeroes.sort()
    _check_zeroes(zeroes, pages_of(head.base_visible_bytes))
    return Kept(head, [objects.get(number) for number in range(numbers)], rows, zeroes)


def head_of(value: bytes, uuid: UUID) -> Head:
    """The head alone, of the value that is kept of it. Malformed."""
    return _head(_unsealed(HEAD, value), uuid)[0]


def _unsealed(key: bytes, value: bytes) -> bytes:
    body = value[: -_CRC.size]
    if not body or value[-_CRC.size :] != _CRC.pack(crc32(body, crc32(key))):
        raise Malformed(f"the checksum at {key.hex()} is wrong")
    return body


def _with(values: dict[bytes, bytes], kind: bytes, number: struct.Struct) -> Iterator[tuple[int, bytes]]:
    for key, value in values.items():
        if key[:1] == kind and len(key) == 1 + number.size:
            yield number.unpack(key[1:])[0], value


def _fields(layout: struct.Struct, value: bytes) -> tuple[int, ...]:
    if len(value) != layout.size:
        raise Malformed(f"a value has {len(value)} bytes, not {layout.size}")
    return layout.unpack(value)


def _objects(values: dict[bytes, bytes]) -> Iterator[tuple[int, ObjectName]]:
    for number, value in _with(values, OBJECT, _NUMBER):
        reader = Reader(value)
        yield number, ObjectName(*reader.fields(_OBJECT))
        reader.end()


def _head(value: bytes, uuid: UUID) -> tuple[Head, int, int, int, int]:
    """The head, how many numbers there are, and how many pairs of objects, rows and zeroes."""
    reader = Reader(value)
    (version,) = reader.fields(_VERSION)
    if version != FORMAT_VERSION:
        raise Malformed(f"its format is {version}, and this version knows {FORMAT_VERSION}")
    found, epoch, record_hash, size_bytes, visible_bytes, base_bytes, *more = reader.fields(_HEAD)
    url_bytes, validator_bytes, numbers, objects, rows, zeroes = more
    base = take_base(reader, base_bytes, url_bytes, validator_bytes)
    reader.end()
    if found != uuid.bytes:
        raise Malformed(f"it is of volume {UUID(bytes=found)}, not {uuid}")
    if (wrong := standing_fault(size_bytes, visible_bytes, base)) is not None:
        raise Malformed(wrong)
    if (epoch == 0) != (record_hash == NO_HASH):
        raise Malformed(f"the hash of epoch {epoch} is none of it")
    if not objects <= numbers <= _NUMBERS_MAX:
        raise Malformed(f"{objects} objects have {numbers} numbers")
    return Head(uuid, epoch, record_hash, size_bytes, visible_bytes, base), numbers, objects, rows, zeroes


def _check_objects(objects: dict[int, ObjectName], numbers: int, epoch: int) -> None:
    if objects and max(objects) >= numbers:
        raise Malformed(f"there is no number {max(objects)} among {numbers}")
    names = sorted(objects.values())
    for name in names:
        if not 1 <= name.epoch <= epoch or source_fault(name.n, PAGE_BYTES, 1) is not None:
            raise Malformed(f"there is no object {name.n} of epoch {name.epoch}")
    for before, name in pairwise(names):
        if before == name:
            raise Malformed(f"{name} has two numbers")
        if before.epoch == name.epoch and before.attempt != name.attempt:
            raise Malformed(f"epoch {name.epoch} has two attempts")


def _check_zeroes(zeroes: list[tuple[int, int]], base_pages: int) -> None:
    """They are where the base could be seen, and ranges of them do not touch."""
    before = -1
    for first, end in zeroes:
        if first <= before or not first < end <= base_pages:
            raise Malformed(f"the zeroes at page {first} are out of order or not above the base")
        before = end
