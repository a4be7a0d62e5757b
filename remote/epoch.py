"""The bytes of an epoch's record. Pure; the table of them is in docs/formats.md.

A header of fixed size, the inline bytes (so that they are at the same place in every record, and a run in
them is one range of the object like any other), texts, data objects, runs, zeroes, moves, and the sha256 of
all that, which is the record's hash. One record has one spelling: what is decoded encodes to the same
bytes.
"""

from __future__ import annotations

import struct
from uuid import UUID

from tierblk.errors import RemoteRefused
from tierblk.remote.birth import Base
from tierblk.remote.packed import HASH_BYTES, Malformed, Reader, sealed, unsealed
from tierblk.remote.record import (
    CRC_BYTES,
    INLINE_AT,
    Codec,
    Data,
    Move,
    ObjectName,
    Record,
    Run,
    Zeroes,
    fault,
)
from tierblk.units import MIB

FORMAT_VERSION = 1
MAGIC = b"TBEPOCH\0"
RECORD_BYTES_MAX = 64 * MIB

_BEGIN = struct.Struct("<8sI")
# state, uuid, epoch, attempt, writer, previous, size, base visible, rolled back to, created, size of the
# base; then how many: bytes of url and validator, data objects, runs, zeroes, moves, inline bytes.
_HEADER = struct.Struct("<I16sQ16s16s32sQQQQQ7I")
_DATA = struct.Struct("<II")
_RUN = struct.Struct("<QIIIBB")
_ZEROES = struct.Struct("<QQ")
_SOURCE = struct.Struct("<Q16sII")

assert _BEGIN.size + _HEADER.size == INLINE_AT


def encode(record: Record) -> bytes:
    """The bytes of a record. ValueError says which rule it breaks; decode would refuse it."""
    wrong = fault(record)
    if wrong is not None:
        raise ValueError(f"no record: {wrong}")
    base = record.base or Base("", 0, "")
    url, validator = base.url.encode(), base.validator.encode()
    parts = [
        _BEGIN.pack(MAGIC, FORMAT_VERSION),
        _HEADER.pack(
            record.released,
            record.uuid.bytes,
            record.epoch,
            record.attempt,
            record.writer,
            record.previous,
            record.size_bytes,
            record.base_visible_bytes,
            record.rolled_back_to,
            record.created_unix_s,
            base.size_bytes,
            len(url),
            len(validator),
            len(record.data),
            len(record.runs),
            len(record.zeroes),
            len(record.moves),
            len(record.inline),
        ),
        record.inline,
        url,
        validator,
        *(_DATA.pack(data.n, data.length_bytes) for data in record.data),
        *map(_run_bytes, record.runs),
        *(_ZEROES.pack(zeroes.page, zeroes.pages) for zeroes in record.zeroes),
        *(_SOURCE.pack(*move.source, move.offset_bytes) + _run_bytes(move.to) for move in record.moves),
    ]
    encoded = sealed(b"".join(parts))
    if len(encoded) > RECORD_BYTES_MAX:
        raise ValueError(f"no record: it has {len(encoded)} bytes, more than {RECORD_BYTES_MAX}")
    return encoded


def hash_of(encoded: bytes) -> bytes:
    """The hash of a record, from its bytes: what the next one calls `previous`."""
    return encoded[-HASH_BYTES:]


def decode(data: bytes, *, name: str) -> Record:
    """The record that the bytes are; name is the object's, for the messages.

    RemoteRefused: not a record, damaged, of a newer format, or one that breaks a rule (I12). Whether it is
    the one that was asked for says record.check_follows.
    """
    reader = unsealed(
        data,
        name=name,
        what="record of an epoch",
        magic=MAGIC,
        version=FORMAT_VERSION,
        bytes_max=RECORD_BYTES_MAX,
    )
    try:
        record = _record(reader)
        reader.end()
    except Malformed as error:
        raise RemoteRefused(f"{name} is no record of an epoch: {error}") from None
    wrong = fault(record)
    if wrong is not None:
        raise RemoteRefused(f"{name} is no record of an epoch: {wrong}")
    return record


def _run_bytes(run: Run) -> bytes:
    fields = (run.page, run.n, run.offset_bytes, run.stored_bytes, run.pages, run.codec)
    return _RUN.pack(*fields) + run.crcs


def _record(reader: Reader) -> Record:
    state, uuid, epoch, attempt, writer, previous, *numbers = reader.fields(_HEADER)
    size_bytes, visible_bytes, rolled_back_to, created_unix_s, base_bytes, *counts = numbers
    url_bytes, validator_bytes, data, runs, zeroes, moves, inline_bytes = counts
    if state > 1:
        raise Malformed(f"its state is {state}, neither held (0) nor released (1)")
    inline = reader.take(inline_bytes)
    return Record(
        uuid=UUID(bytes=uuid),
        epoch=epoch,
        attempt=attempt,
        writer=writer,
        previous=previous,
        size_bytes=size_bytes,
        base_visible_bytes=visible_bytes,
        base=take_base(reader, base_bytes, url_bytes, validator_bytes),
        released=bool(state),
        rolled_back_to=rolled_back_to,
        created_unix_s=created_unix_s,
        data=tuple(Data(*reader.fields(_DATA)) for _ in reader.times(data, _DATA.size)),
        runs=tuple(_run(reader) for _ in reader.times(runs, _RUN.size + CRC_BYTES)),
        zeroes=tuple(Zeroes(*reader.fields(_ZEROES)) for _ in reader.times(zeroes, _ZEROES.size)),
        moves=tuple(_move(reader) for _ in reader.times(moves, _SOURCE.size + _RUN.size + CRC_BYTES)),
        inline=inline,
    )


def take_base(reader: Reader, size_bytes: int, url_bytes: int, validator_bytes: int) -> Base | None:
    """The base whose texts follow; None when it has no size, and then there are no texts."""
    url, validator = reader.text(url_bytes), reader.text(validator_bytes)
    if size_bytes == 0:
        if url or validator:
            raise Malformed("it has no base, but an address or validator of one")
        return None
    return Base(url, size_bytes, validator)


def _run(reader: Reader) -> Run:
    page, n, offset_bytes, stored_bytes, pages, codec = reader.fields(_RUN)
    if codec not in (Codec.RAW, Codec.ZSTD):
        raise Malformed(f"the run at page {page} has a codec {codec}, neither raw (0) nor zstd (1)")
    return Run(page, pages, n, offset_bytes, stored_bytes, Codec(codec), reader.take(pages * CRC_BYTES))


def _move(reader: Reader) -> Move:
    epoch, attempt, n, offset_bytes = reader.fields(_SOURCE)
    return Move(ObjectName(epoch, attempt, n), offset_bytes, _run(reader))
