"""What dm-log-writes logged: every write to a disk in the order in which the disk could have kept it, with
FLUSH, FUA and marks; and disks as they were at a point of it.

The log (linux: Documentation/admin-guide/device-mapper/log-writes.rst, and the structures of its target, all
little endian): sector 0 holds {magic u64, version u64, entries u64, sector size u32}; then, sector after
sector, each entry {sector u64, sectors u64, flags u64, data length u64}, in a sector of its own, with a
mark's text behind it, followed by its data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_SUPER, _ENTRY = struct.Struct("<QQQI"), struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Entry:
    """One thing that happened to the disk. at: where its data is in the log; offset, length: on the disk; all
    in bytes."""

    flags: int
    offset: int
    length: int
    at: int
    mark: str = ""


class Log:
    """An open log. ValueError when it is none."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        magic, version, count, sector_bytes = _SUPER.unpack(os.pread(self._fd, _SUPER.size, 0))
        if magic != MAGIC or version != 1:
            raise ValueError(f"{path} is no log of dm-log-writes")
        self.entries = list(self._walk(count, sector_bytes))

    def _walk(self, count: int, sector_bytes: int) -> Iterator[Entry]:
        at = sector_bytes
        for _ in range(count):
            head = os.pread(self._fd, sector_bytes, at)
            sector, sectors, flags, length = _ENTRY.unpack_from(head)
            mark = head[_ENTRY.size : _ENTRY.size + length].decode() if flags & MARK else ""
            at += sector_bytes
            yield Entry(flags, sector * sector_bytes, sectors * sector_bytes, at, mark)
            if not flags & DISCARD:
                at += sectors * sector_bytes

    def close(self) -> None:
        os.close(self._fd)

    def apply(self, entry: Entry, disk_fd: int) -> None:
        """What it did to the disk."""
        if entry.flags & DISCARD:
            os.pwrite(disk_fd, bytes(entry.length), entry.offset)
        elif entry.length:
            os.pwrite(disk_fd, os.pread(self._fd, entry.length, entry.at), entry.offset)
