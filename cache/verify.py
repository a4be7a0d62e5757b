"""A cache directory that nobody serves, looked through: every runnable invariant over its index, its
superblock and its bytes. Changes nothing: the directory is locked, and all of it opened for reading.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tierblk.cache import journal
from tierblk.cache import superblock as superblocks
from tierblk.cache.directory import INDEX, JOURNAL, SLOTS, SUMS, SUMS_BYTES_PER_SLOT
from tierblk.cache.index import Index, open_index
from tierblk.cache.invariants import LayerRows, Violation, check, check_bytes, check_session
from tierblk.cache.layers import LayerRecord
from tierblk.cache.rows import Entry, entries_of, unpack_row
from tierblk.cache.superblock import COPIES, COPY_BYTES, SLOT_BYTES, Superblock
from tierblk.core import PAGE_BYTES
from tierblk.errors import CacheError

Progress = Callable[[int, int], None]
"""Is told (slots looked at, slots to look at)."""


@dataclass(frozen=True)
class LayerFound:
    """A layer of the index, and how many bytes of it are here, and of those how many nobody else has."""

    record: LayerRecord
    cached_bytes: int
    dirty_bytes: int


@dataclass(frozen=True)
class Found:
    """What a look at a directory brought. clean: the last daemon ended in order. bad_superblocks: of its two
    copies how many cannot be read."""

    superblock: Superblock
    clean: bool
    bad_superblocks: int
    layers: list[LayerFound]
    violations: list[Violation]


def verify(path: Path, progress: Progress = lambda done, total: None) -> Found:
    """Looks through a cache directory. Blocks as long as it takes to read what is cached. CacheError when it
    cannot be looked into: it is none, is served, is damaged beyond reading, or was made by a newer version.
    """
    try:
        with _locked(path / SLOTS) as slots_fd:
            return _look(path, slots_fd, progress)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CacheError(f"cannot look into the cache directory {path}: {error.strerror}{where}") from None


@contextmanager
def _locked(slots: Path) -> Iterator[int]:
    slots_fd = os.open(slots, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(slots_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield slots_fd
    except BlockingIOError:
        raise CacheError(
            f"a daemon serves the cache directory {slots.parent}",
            f"`tierblk stop --cache-dir {slots.parent}`",
        ) from None
    finally:
        os.close(slots_fd)


def _look(path: Path, slots_fd: int, progress: Progress) -> Found:
    copies = [os.pread(slots_fd, COPY_BYTES, at * COPY_BYTES) for at in range(COPIES)]
    superblock, bad = superblocks.choose(copies, str(path / SLOTS))
    index = open_index(path / INDEX, superblock.uuid, superblock.slot_count, read_only=True)
    try:
        meta, records = index.meta(), index.layers()
        replay, violations = _journaled(path, index, superblock)
        rows = [_rows(index, record, replay) for record in records]
    finally:
        index.close()
    violations += check_session(superblock, meta.session, meta.clean, running=False)
    violations += _check_lengths(path, superblock)
    violations += check(rows, superblock.slot_count)
    # After an end out of order clean pages of volumes are dropped: one may have been written in place since.
    believed = [
        layer for record, layer in zip(records, rows, strict=True) if meta.clean or not record.is_volume
    ]
    total = sum(1 for layer in believed for entry in _entries(layer) if entry.cached & ~entry.dirty)
    done = 0

    def read(offset_bytes: int, length_bytes: int) -> bytes:
        nonlocal done
        done += 1
        progress(done, total)
        return os.pread(slots_fd, length_bytes, offset_bytes)

    violations += check_bytes(believed, read, (path / SUMS).read_bytes())
    return Found(
        superblock,
        meta.clean,
        bad,
        [_found(record, layer) for record, layer in zip(records, rows, strict=True)],
        # What a row says wrong is found by every check that reads it.
        list(dict.fromkeys(violations)),
    )


def _journaled(
    path: Path, index: Index, superblock: Superblock
) -> tuple[journal.Replay | None, list[Violation]]:
    try:
        return journal.read(path / JOURNAL, index, superblock), []
    except CacheError as error:
        return None, [Violation("R7", None, None, str(error))]


def _rows(index: Index, record: LayerRecord, replay: journal.Replay | None) -> LayerRows:
    """A layer as an opening would find it."""
    rows = dict(index.rows(record.layer_id))
    rows |= replay.rows.get(record.layer_id, {}) if replay else {}
    return LayerRows(
        record.layer_id,
        record.kind,
        record.size_bytes,
        {row: packed for row, packed in rows.items() if packed},
    )


def _check_lengths(path: Path, superblock: Superblock) -> list[Violation]:
    found = []
    for name, slot_bytes in ((SLOTS, SLOT_BYTES), (SUMS, SUMS_BYTES_PER_SLOT)):
        size, wanted = (path / name).stat().st_size, superblock.slot_count * slot_bytes
        if size < wanted:
            text = f"{name} has {size} bytes, and the superblock says {wanted}"
            found.append(Violation("I5", None, None, text))
    return found


def _entries(layer: LayerRows) -> Iterator[Entry]:
    for packed in layer.rows.values():
        try:
            unpack_row(packed)
        except ValueError:
            continue
        yield from entries_of(packed)


def _found(record: LayerRecord, layer: LayerRows) -> LayerFound:
    cached = dirty = 0
    for entry in _entries(layer):
        cached += entry.cached.bit_count()
        dirty += (entry.cached & entry.dirty).bit_count()
    return LayerFound(record, cached * PAGE_BYTES, dirty * PAGE_BYTES)
