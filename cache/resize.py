"""A cache directory of another size than the configuration says: grown or shrunk as it is opened, before
anything is loaded from it.

Growing takes the room first, then writes the superblock that names it. Shrinking makes everything forget the
slots that go, first the block maps of a killed daemon, which are the truth (R1), then the index; then the
superblock, in both of its copies; then the files are cut. Each step is durable before the next, so at every
instant the files are as long as the superblock says or longer, and no row names a slot that is not there.
What a crash left beyond the end is cut at the next opening, whichever size that one wants.

Only clean blocks are dropped. A dirty page has no other copy (I3): a shrink that would lose one is refused.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice

from tierblk.cache.directory import INDEX_RESERVE_BYTES, SUMS_BYTES_PER_SLOT, Directory
from tierblk.cache.filesystem import free_bytes, is_no_space
from tierblk.cache.index import Index
from tierblk.cache.layers import LayerRecord
from tierblk.cache.maps import Maps
from tierblk.cache.rows import Entry, entries_of, pack_row, unpack_row
from tierblk.cache.start import is_current
from tierblk.cache.superblock import COPIES, SLOT_BYTES
from tierblk.core import ENTRIES_PER_ROW, ROW_BYTES
from tierblk.errors import CacheError
from tierblk.units import format_exact_size, format_size

# Rows of one transaction: many, for the sake of speed; few where a full disk has no room for more.
_BATCH_ROWS_MOST = 1024
_BATCH_ROWS_LEAST = 16

_SLOTS = struct.Struct("<" + "I8x" * ENTRIES_PER_ROW)

_log = logging.getLogger(__name__)


def resize(directory: Directory, index: Index, maps: Maps, size_bytes: int) -> None:
    """Gives an open directory the size that the configuration wants, in whole slots; says so in the log.

    Nothing is loaded yet. CacheError when there is no room to grow, or when a page would go that nothing else
    has; then everything is as it was. CacheError also when the disk fails half-way: both sizes are then fine.
    """
    old, new = directory.superblock.slot_count, size_bytes // SLOT_BYTES
    _cut(directory)
    if new == old:
        return
    if new > old:
        _grow(directory, new)
        dropped = 0
    else:
        dropped = _forget_beyond(directory, index, maps, new)
        for _ in range(COPIES):  # whichever of them is damaged later, the other one knows this size
            _write_slot_count(directory, new)
        _cut(directory)
    _log.info(
        "resize of %s: from %s to %s, %d cached blocks dropped", directory.path, *_sizes(old, new), dropped
    )


def _sizes(old: int, new: int) -> tuple[str, str]:
    return format_exact_size(old * SLOT_BYTES), format_exact_size(new * SLOT_BYTES)


def _write_slot_count(directory: Directory, slot_count: int) -> None:
    found = directory.superblock
    directory.write_superblock(replace(found, sequence=found.sequence + 1, slot_count=slot_count))


def _files(directory: Directory) -> tuple[tuple[int, int], tuple[int, int]]:
    """(descriptor, bytes per slot) of the files whose length is the cache's size."""
    return (directory.slots_fd, SLOT_BYTES), (directory.sums_fd, SUMS_BYTES_PER_SLOT)


def _cut(directory: Directory) -> None:
    """Ends the files where the superblock says. CacheError when the disk refuses."""
    for descriptor, slot_bytes in _files(directory):
        end = directory.superblock.slot_count * slot_bytes
        try:
            if os.fstat(descriptor).st_size > end:
                os.ftruncate(descriptor, end)
        except OSError as error:
            raise CacheError(f"cannot cut the cache in {directory.path}: {error.strerror}") from None


def _grow(directory: Directory, new: int) -> None:
    old = directory.superblock.slot_count
    needed_bytes = (new - old) * (SLOT_BYTES + SUMS_BYTES_PER_SLOT) + INDEX_RESERVE_BYTES
    what = "the cache in {} cannot grow from {} to {}".format(directory.path, *_sizes(old, new))
    hint = "make cache.size smaller, or free some space"
    try:
        if (free := free_bytes(directory.path)) < needed_bytes:
            raise _no_room(what, needed_bytes, free, hint)
        for descriptor, slot_bytes in _files(directory):
            os.posix_fallocate(descriptor, old * slot_bytes, (new - old) * slot_bytes)
            os.fsync(descriptor)
    except OSError as error:
        with suppress(CacheError):  # what cannot be cut now is cut at the next opening
            _cut(directory)
        if is_no_space(error):
            raise _no_room(what, needed_bytes, free_bytes(directory.path), hint) from None
        raise CacheError(f"{what}: {error.strerror}", hint) from None
    _write_slot_count(directory, new)


def _no_room(what: str, needed_bytes: int, free: int, hint: str) -> CacheError:
    return CacheError(
        f"{what}: that needs {format_size(needed_bytes)} more, {format_size(free)} are free", hint
    )


def _forget_beyond(directory: Directory, index: Index, maps: Maps, new: int) -> int:
    """Makes maps and index forget all slots from `new` on, durably. Returns how many blocks had one."""
    found, meta, records = directory.superblock, index.meta(), index.layers()
    going = range(new, found.slot_count)
    killed = not meta.clean and is_current(meta.session, found)
    with_map = [
        record
        for record in records
        if killed and maps.open_current(record.layer_id, record.size_bytes, found) is not None
    ]
    what = "the cache in {} cannot shrink from {} to {}".format(
        directory.path, *_sizes(found.slot_count, new)
    )
    dropped = 0
    for record in records:  # all of them, before anything is changed
        named = _count_clean(_entries_in(index, record.layer_id, going), record, what)
        if record in with_map:
            named = _count_clean(maps.entries_in(record.layer_id, going), record, what)
        dropped += named
    for record in with_map:
        maps.forget_slots(record.layer_id, going)
    for record in records:
        _forget_in_index(index, record.layer_id, going)
    return dropped


def _count_clean(entries: Iterable[Entry], record: LayerRecord, what: str) -> int:
    """How many entries. CacheError for one of which something could be lost (I3)."""
    count = 0
    for entry in entries:
        if entry.dirty & entry.cached or (record.is_volume and not record.is_stored):
            raise CacheError(
                f"{what}: pages of {record.shown} that nothing else has are in the part that would go",
                "set cache.size to the size that it has",
            )
        count += 1
    return count


def _entries_in(index: Index, layer_id: int, slots: range) -> Iterator[Entry]:
    for _, packed in _rows_naming(index, layer_id, slots):
        yield from (entry for entry in entries_of(packed) if entry.slot in slots)


def _rows_naming(index: Index, layer_id: int, slots: range, first: int = 0) -> Generator[tuple[int, bytes]]:
    """(row, packed) of a layer's good rows that name one of these slots. A bad one names nothing (R9)."""
    for row, packed in index.rows(layer_id, first):
        if len(packed) != ROW_BYTES or not any(slot in slots for slot in _SLOTS.unpack_from(packed)):
            continue
        with suppress(ValueError):
            unpack_row(packed)
            yield row, packed


def _forget_in_index(index: Index, layer_id: int, slots: range) -> None:
    """In many transactions: each leaves an index that is right, only of a smaller cache than before."""
    first, count = 0, _BATCH_ROWS_MOST
    while True:
        with closing(_rows_naming(index, layer_id, slots, first)) as rows:
            batch = [(row, _without(packed, slots)) for row, packed in islice(rows, count)]
        if not batch:
            return
        try:
            index.write_rows({layer_id: batch})
        except CacheError:
            if index.broken or count == _BATCH_ROWS_LEAST:
                raise
            count = _BATCH_ROWS_LEAST  # the disk may be full, which is why its owner makes the cache smaller
        else:
            first = batch[-1][0] + 1


def _without(packed: bytes, slots: range) -> bytes:
    """The row without these slots and what is in them; b"" when nothing is left. Zeros need no slot."""
    entries = [
        Entry(0, entry.present, 0, entry.zero, entry.dirty & entry.zero) if entry.slot in slots else entry
        for entry in entries_of(packed)
    ]
    return pack_row(entries) if any(map(any, entries)) else b""
