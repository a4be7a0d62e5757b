"""The journal: rows that a FLUSH has made durable and the index does not have yet (R7). The C core writes
records (journal.c); here is their format, and what an unclean start takes from them.

    page 0         magic 8 bytes, uuid 16, session u64; crc32c u32 of these
    from page 1    a ring of records, each from a page's begin on, none over the ring's end:
                   magic 8 bytes, session u64, seq u64, rows u32, bytes u32, 0 u32, crc32c u32 of all its
                   bytes with 0 here; then by row: row u64 (bit 63: it holds nothing), layer id u32, 772
                   bytes as in the index

All little endian. A session's records count from 1 and each is durable before the next is begun, so that only
the last one may be in part. Those up to the number that the index holds are in it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import UUID

from tierblk.cache.directory import JOURNAL_BYTES
from tierblk.cache.filesystem import free_bytes, is_no_space, no_space
from tierblk.cache.index import Index, Meta, Rows
from tierblk.cache.start import is_current
from tierblk.cache.superblock import Superblock
from tierblk.core import PAGE_BYTES, RECORD_ENTRY_BYTES, ROW_GONE, crc32c
from tierblk.durable import sync_directory
from tierblk.errors import CacheError

RING_AT_BYTES = PAGE_BYTES
RING_BYTES = JOURNAL_BYTES - RING_AT_BYTES

_HEADER = struct.Struct("<8s16sQ")
_HEAD = struct.Struct("<8sQQIIII")
_ENTRY = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_HEADER_MAGIC, _RECORD_MAGIC = b"TBJOURNL", b"tbrecord"
_CRC_AT = _HEAD.size - _CRC.size


@dataclass(frozen=True, slots=True)
class Replay:
    """What a journal adds to the index of its session, from `count` records: rows by layer, b"" for one that
    holds nothing; seq: the last record's number."""

    rows: dict[int, dict[int, bytes]]
    seq: int
    count: int

    def in_batches(self, count: int) -> Iterator[Rows]:
        """The same in pieces of at most `count` rows."""
        for layer_id, rows in self.rows.items():
            for batch in batched(rows.items(), count):
                yield {layer_id: batch}

    def as_copies(self) -> Rows:
        """For Index.write_rows."""
        return {layer_id: list(rows.items()) for layer_id, rows in self.rows.items()}


def prepare(path: Path, uuid: UUID, session: int) -> None:
    """Before anything says that a session begins: there is a journal, and none of its records can be taken
    for one of that session. It is made if it is not there, or if it is not of this cache's past: who puts
    back a part of the directory begins sessions of the same numbers again. CacheError, OSError.
    """
    if not path.is_file() or path.stat().st_size != JOURNAL_BYTES or not _is_past(path, uuid, session):
        _create(path)


def _is_past(path: Path, uuid: UUID, session: int) -> bool:
    with path.open("rb") as file:
        content = file.read(_HEADER.size + _CRC.size)
    header = content[: _HEADER.size]
    if content[_HEADER.size :] != _CRC.pack(crc32c(header)):
        return False
    magic, of_uuid, of_session = _HEADER.unpack(header)
    return bool(magic == _HEADER_MAGIC and of_uuid == uuid.bytes and of_session < session)


def begin(path: Path, uuid: UUID, session: int) -> int:
    """The records to come are of that session. After those of the last one are in the index, and before the
    index begins the session. Returns the open file, as the core needs it. OSError.
    """
    header = _HEADER.pack(_HEADER_MAGIC, uuid.bytes, session)
    with path.open("r+b", buffering=0) as file:
        file.write(header + _CRC.pack(crc32c(header)))
        os.fdatasync(file.fileno())
    return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)


def _create(path: Path) -> None:
    """Every byte of it is written: a record is then one write, and changes nothing that the filesystem has to
    know."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(bytes(JOURNAL_BYTES))
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        new.unlink(missing_ok=True)
        if is_no_space(error):
            raise no_space(path.parent, JOURNAL_BYTES, free_bytes(path.parent)) from None
        raise
    new.rename(path)
    sync_directory(path.parent)


def read(path: Path, index: Index, superblock: Superblock) -> Replay | None:
    """What the journal of a session that did not end in order adds to the index; None when it adds nothing.

    CacheError when something may be lost: it is damaged, missing, or of another time than the index, and
    there are volumes that count on it. OSError.
    """
    meta = index.meta()
    if meta.clean or meta.journaled is None or not is_current(meta.session, superblock):
        return None
    try:
        return _read(path, meta, superblock)
    except CacheError as error:
        kept = [record.name for record in index.layers() if record.outlives_machine]
        if not kept:
            return None
        raise CacheError(
            f"{error}; what was flushed last to {', '.join(kept)} may be in it",
            f"to go on without it: truncate -s 0 {path}",
        ) from None


def _read(path: Path, meta: Meta, superblock: Superblock) -> Replay | None:
    if not path.is_file():
        raise CacheError(f"the cache's journal is missing: there is no {path}")
    content = path.read_bytes()
    if not content:  # by hand: nothing else makes it so
        return None
    header = content[: _HEADER.size]
    if not any(content[:RING_AT_BYTES]) and not any(records(content)):
        return None  # it was made, and no session begun
    if content[_HEADER.size : _HEADER.size + _CRC.size] != _CRC.pack(crc32c(header)):
        raise CacheError(f"the cache's journal {path} is damaged: its header is")
    magic, uuid, session = _HEADER.unpack(header)
    if magic != _HEADER_MAGIC or uuid != superblock.uuid.bytes:
        raise CacheError(f"the cache's journal {path} belongs to another cache")
    if not meta.session <= session <= superblock.session:
        raise CacheError(
            f"the cache's journal {path} is of session {session}, and the index of {meta.session}"
        )
    assert meta.journaled is not None
    found = {
        seq: rows
        for _, of_session, seq, rows in records(content)
        if of_session == meta.session and seq > meta.journaled
    }
    if not found:
        return None
    last = max(found)
    missing = sorted(set(range(meta.journaled + 1, last)) - found.keys())
    if missing:
        raise CacheError(f"the cache's journal {path} is damaged: record {missing[0]} of {last} is")
    replay: dict[int, dict[int, bytes]] = {}
    for _, rows in sorted(found.items()):
        for layer_id, row, packed in rows:
            replay.setdefault(layer_id, {})[row] = packed
    return Replay(replay, last, len(found))


def records(content: bytes) -> Iterator[tuple[int, int, int, list[tuple[int, int, bytes]]]]:
    """(where, session, seq, [(layer id, row, packed)]) of every whole record in a journal's bytes."""
    at = RING_AT_BYTES
    while at + _HEAD.size <= len(content):
        magic, session, seq, rows, length, zero, crc = _HEAD.unpack_from(content, at)
        whole = (
            magic == _RECORD_MAGIC
            and zero == 0
            and length == _HEAD.size + rows * RECORD_ENTRY_BYTES
            and at + length <= len(content)
            and crc == crc32c(_without_sum(content[at : at + length]))
        )
        if not whole:
            at += PAGE_BYTES
            continue
        entries = (at + _HEAD.size + i * RECORD_ENTRY_BYTES for i in range(rows))
        yield at, session, seq, [_entry(content, entry) for entry in entries]
        at += -(-length // PAGE_BYTES) * PAGE_BYTES


def length_of(content: bytes, at: int) -> int:
    """Bytes of the record that begins there."""
    return int(_HEAD.unpack_from(content, at)[4])


def _without_sum(record: bytes) -> bytes:
    return record[:_CRC_AT] + bytes(_CRC.size) + record[_HEAD.size :]


def batched(rows: Iterable[tuple[int, bytes]], count: int) -> Iterator[list[tuple[int, bytes]]]:
    """Lists of at most `count`."""
    left = iter(rows)
    while batch := list(islice(left, count)):
        yield batch


def _entry(content: bytes, at: int) -> tuple[int, int, bytes]:
    row, layer_id = _ENTRY.unpack_from(content, at)
    if row & ROW_GONE:
        return layer_id, row & ~ROW_GONE, b""
    return layer_id, row, content[at + _ENTRY.size : at + RECORD_ENTRY_BYTES]
