"""Map files: the block maps of a running cache, on tmpfs, where they outlive a killed daemon (R1).

    RUN/<cache uuid>/maps/<layer id>.map      one header page, then 32 bytes a block; sparse

The header says for which boot, cache, session and layer the entries hold. It is written after they are
complete, so a daemon that is killed while it loads a map leaves a file without one. The entries are the C
core's; only a resize, when nobody serves them, changes some.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENXIO
from pathlib import Path
from uuid import UUID

from tierblk.cache.filesystem import MEMORY_FILESYSTEMS, filesystem_type
from tierblk.cache.rows import Entry
from tierblk.cache.start import is_current
from tierblk.cache.superblock import Superblock
from tierblk.core import MAP_HEADER_BYTES, crc32c, map_bytes
from tierblk.errors import CacheError
from tierblk.extent import block_count

MAP_VERSION = 1  # rises with every change of the header or of the core's entry (tb_entry)
MAGIC = b"TBMAP\0\0\0"

ENTRY_BYTES = 32
_ENTRY = struct.Struct("<IHHHH")  # of the core's entry: slot, present, cached, zero, dirty
_SLOT = struct.Struct("<I28x")
_MARKS = struct.Struct("<14xH16x")
REFERENCED, PROBATION, SEALED = 1, 2, 8  # of the core's flags (core.h), what may be shown of them
_SHOWN = struct.Struct("<IHHHH14xH4x")  # with the mask of dirty pages that have sums; a killed daemon's too
_READ_BYTES = 1 << 20

_FIELDS = struct.Struct("<8sII16s16sQQ")
_CRC = struct.Struct("<I")
_CRC_AT = 508

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a map's header says: whose entries these are, and in which session and boot."""

    boot_id: UUID
    cache_uuid: UUID
    session: int
    layer_id: int
    blocks: int


def pack_stamp(stamp: Stamp) -> bytes:
    """The header page."""
    head = _FIELDS.pack(
        MAGIC,
        MAP_VERSION,
        stamp.layer_id,
        stamp.boot_id.bytes,
        stamp.cache_uuid.bytes,
        stamp.session,
        stamp.blocks,
    ).ljust(_CRC_AT, b"\0")
    return (head + _CRC.pack(crc32c(head))).ljust(MAP_HEADER_BYTES, b"\0")


def unpack_stamp(header: bytes) -> Stamp | None:
    """What a header page says; None when it is none, damaged, or of another format version."""
    if len(header) != MAP_HEADER_BYTES or _CRC.unpack_from(header, _CRC_AT)[0] != crc32c(header[:_CRC_AT]):
        return None
    magic, version, layer_id, boot_id, cache_uuid, session, blocks = _FIELDS.unpack_from(header)
    if magic != MAGIC or version != MAP_VERSION:
        return None
    return Stamp(UUID(bytes=boot_id), UUID(bytes=cache_uuid), session, layer_id, blocks)


def data_extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(from, to) in bytes of what a sparse file has between two offsets. OSError."""
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:  # nothing but a hole is left
                return
            raise
        stop = min(end, os.lseek(descriptor, start, os.SEEK_HOLE))
        if start < stop:
            yield start, stop
        start = stop


def entries_in_map(packed: bytes) -> list[Entry]:
    """Neighbouring entries. A slot that was taken for a write which has not ended is in no row either."""
    return [
        Entry(
            slot if cached else 0,
            present,
            cached,
            zero,
            dirty,
            dirty & cached & summed,
        )
        for slot, present, cached, zero, dirty, summed in _SHOWN.iter_unpack(packed)
    ]


def marks_in(packed: bytes) -> list[int]:
    """The core's flags of each of neighbouring entries. They mean nothing to another session."""
    return [marks for (marks,) in _MARKS.iter_unpack(packed)]


def boot_id() -> UUID:
    """The kernel's name for the time since it was booted."""
    return UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())


def find_map(
    folder: Path,
    layer_id: int,
    size_bytes: int,
    superblock: Superblock,
    *,
    boot: UUID | None = None,
    flags: int = os.O_RDONLY,
) -> int | None:
    """A descriptor of the map of a layer in a folder of maps, if it is as new as the slots, else None.
    superblock: as it was found. flags: to open it with."""
    try:
        descriptor = os.open(folder / f"{layer_id}.map", flags | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        stamp = unpack_stamp(os.pread(descriptor, MAP_HEADER_BYTES, 0))
        length = os.fstat(descriptor).st_size
    except OSError:
        stamp, length = None, 0
    session, blocks = stamp.session if stamp else 0, block_count(size_bytes)
    wanted = Stamp(boot or boot_id(), superblock.uuid, session, layer_id, blocks)
    if stamp != wanted or length != map_bytes(size_bytes) or not is_current(session, superblock):
        os.close(descriptor)
        return None
    return descriptor


class Maps:
    """The map files of one cache. Descriptors that it hands out are open until `close`."""

    def __init__(self, run_dir: Path, superblock: Superblock, boot: UUID | None = None) -> None:
        self.path = run_dir / str(superblock.uuid) / "maps"
        self._uuid = superblock.uuid
        self._boot = boot or boot_id()
        self._descriptors: dict[int, int] = {}
        self._blocks: dict[int, int] = {}
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if filesystem_type(self.path) not in MEMORY_FILESYSTEMS:
                _log.warning("%s is not on tmpfs: block maps are slower there", self.path)
        except OSError as error:
            raise CacheError(f"cannot use {self.path} for block maps: {error.strerror}") from None

    def open_current(self, layer_id: int, size_bytes: int, superblock: Superblock) -> int | None:
        """The descriptor of a layer's map if it is as new as the slots, else None. `superblock`: as it was
        found.
        """
        if layer_id in self._descriptors:  # a resize has looked into it before
            return self._descriptors[layer_id]
        descriptor = find_map(self.path, layer_id, size_bytes, superblock, boot=self._boot, flags=os.O_RDWR)
        if descriptor is not None:
            self._keep(layer_id, descriptor, block_count(size_bytes))
        return descriptor

    def create(self, layer_id: int, size_bytes: int) -> int:
        """The descriptor of a new, empty, unstamped map; an old file of that name is gone. CacheError."""
        path = self._file(layer_id)
        try:
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._keep(layer_id, descriptor, block_count(size_bytes))
            os.ftruncate(descriptor, map_bytes(size_bytes))
        except OSError as error:
            raise CacheError(f"cannot make the block map {path}: {error.strerror}") from None
        return descriptor

    def stamp(self, layer_id: int, session: int) -> None:
        """Says that the map is complete and holds for that session. One page: a kill leaves the old header or
        the new.
        """
        stamp = Stamp(self._boot, self._uuid, session, layer_id, self._blocks[layer_id])
        try:
            os.pwrite(self._descriptors[layer_id], pack_stamp(stamp), 0)
        except OSError as error:
            raise CacheError(f"cannot write the block map {self._file(layer_id)}: {error.strerror}") from None

    def entries_in(self, layer_id: int, slots: range) -> Iterator[Entry]:
        """The entries of an open map that no daemon serves whose slot is one of these. CacheError."""
        return (entry for _, entry in self._find(layer_id, slots))

    def forget_slots(self, layer_id: int, slots: range) -> None:
        """Takes these slots, and what is cached in them, from an open map that no daemon serves.

        CacheError.
        """
        for offset_bytes, entry in self._find(layer_id, slots):
            kept = _ENTRY.pack(0, entry.present, 0, entry.zero, entry.dirty & entry.zero)
            try:
                os.pwrite(self._descriptors[layer_id], kept, offset_bytes)
            except OSError as error:
                raise self._unusable(layer_id, "written", error) from None

    def _find(self, layer_id: int, slots: range) -> Iterator[tuple[int, Entry]]:
        """(offset in the file in bytes, entry) of every entry with one of these slots."""
        descriptor = self._descriptors[layer_id]
        end = MAP_HEADER_BYTES + self._blocks[layer_id] * ENTRY_BYTES
        try:
            for start, stop in data_extents(descriptor, MAP_HEADER_BYTES, end):
                for at in range(start, stop, _READ_BYTES):
                    data = os.pread(descriptor, min(_READ_BYTES, stop - at), at)
                    for number, (slot,) in enumerate(_SLOT.iter_unpack(data)):
                        if slot in slots:
                            offset = number * ENTRY_BYTES
                            yield at + offset, Entry(*_ENTRY.unpack_from(data, offset))
        except OSError as error:
            raise self._unusable(layer_id, "read", error) from None

    def _unusable(self, layer_id: int, what: str, error: OSError) -> CacheError:
        return CacheError(f"the block map {self._file(layer_id)} cannot be {what}: {error.strerror}")

    def remove_others(self) -> None:
        """Removes map files that no layer of this session has."""
        for path in self.path.glob("*.map"):
            if path.stem not in {str(layer_id) for layer_id in self._descriptors}:
                path.unlink(missing_ok=True)

    def remove_all(self) -> None:
        """After the clean mark: the index has it all."""
        for path in self.path.glob("*.map"):
            path.unlink(missing_ok=True)

    def forget(self, layer_id: int) -> None:
        """Closes and removes one map, that of a layer which could not be opened."""
        os.close(self._descriptors.pop(layer_id))
        del self._blocks[layer_id]
        self._file(layer_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes every descriptor; files stay."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _file(self, layer_id: int) -> Path:
        return self.path / f"{layer_id}.map"

    def _keep(self, layer_id: int, descriptor: int, blocks: int) -> None:
        self._descriptors[layer_id] = descriptor
        self._blocks[layer_id] = blocks
