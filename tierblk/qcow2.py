"""Writes a qcow2 image, version 3, front to back: what was never written takes no room and reads as zeros.

The format is that of docs/interop/qcow2.txt in QEMU's sources. All numbers are big endian. The file:

    cluster 0        the header, written last: a file that was not finished is no image
    cluster 1 on     data clusters in the order in which they were written
    behind them      L2 tables, the L1 table, refcount blocks, the refcount table
"""

from __future__ import annotations

import os
import struct
from array import array
from sys import byteorder

CLUSTER_BITS = 16
CLUSTER_BYTES = 1 << CLUSTER_BITS

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC = b"QFI\xfb"
_VERSION = 3
_HEADER_BYTES = 104
_REFCOUNT_ORDER = 4  # of 16 bits
_COPIED = 1 << 63  # the cluster has a refcount of exactly one
_L2_ENTRIES = CLUSTER_BYTES // 8
_REFCOUNTS_PER_BLOCK = CLUSTER_BYTES // 2


class Qcow2Writer:
    """From the first `write` to `finish`. Blocks; OSError."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """descriptor: of an empty file; it stays the caller's. size_bytes: of the disk."""
        self._fd = descriptor
        self._size_bytes = size_bytes
        self._next = 1  # the next free cluster of the file
        self._tables: dict[int, array[int]] = {}  # L2 tables by their place in the L1 table

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """One cluster of the disk, the last one may be short; each at most once."""
        table, at = divmod(offset_bytes >> CLUSTER_BITS, _L2_ENTRIES)
        if table not in self._tables:
            self._tables[table] = array("Q", bytes(CLUSTER_BYTES))
        self._tables[table][at] = self._append(data) | _COPIED

    def finish(self) -> None:
        """The tables and the header; the file is an image when it returns, and is not synced."""
        tables = -(-self._size_bytes // (CLUSTER_BYTES * _L2_ENTRIES))
        l1 = array("Q", bytes(8 * tables))
        for number, table in sorted(self._tables.items()):
            l1[number] = self._append(_big_endian(table)) | _COPIED
        l1_at = self._append(_big_endian(l1))
        refcounts_at, table_clusters = self._write_refcounts()
        header = _HEADER.pack(
            _MAGIC, _VERSION,
            0, 0,  # no backing file
            CLUSTER_BITS, self._size_bytes,
            0,  # not encrypted
            tables, l1_at,
            refcounts_at, table_clusters,
            0, 0,  # no snapshots
            0, 0, 0,  # no features that a reader would have to know
            _REFCOUNT_ORDER, _HEADER_BYTES,
        )  # fmt: skip
        os.ftruncate(self._fd, self._next << CLUSTER_BITS)
        _write_all(self._fd, header, 0)

    def _append(self, data: bytes | memoryview) -> int:
        """At the next free clusters; where that is, in bytes."""
        at = self._next << CLUSTER_BITS
        _write_all(self._fd, data, at)
        self._next += max(1, -(-len(data) // CLUSTER_BYTES))
        return at

    def _write_refcounts(self) -> tuple[int, int]:
        """(offset of the refcount table, its clusters). Every cluster of the file counts one, those of the
        refcounts themselves too."""
        used, blocks, table_clusters = self._next, 0, 0
        while True:
            total = used + blocks + table_clusters
            need_blocks = -(-total // _REFCOUNTS_PER_BLOCK)
            need_table = -(-need_blocks * 8 // CLUSTER_BYTES)
            if (need_blocks, need_table) == (blocks, table_clusters):
                break
            blocks, table_clusters = need_blocks, need_table
        table = array("Q")
        for number in range(blocks):
            counted = min(_REFCOUNTS_PER_BLOCK, total - number * _REFCOUNTS_PER_BLOCK)
            table.append(self._append((b"\0\1" * counted).ljust(CLUSTER_BYTES, b"\0")))
        return self._append(_big_endian(table)), table_clusters


def _big_endian(numbers: array[int]) -> bytes:
    if byteorder == "little":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _write_all(descriptor: int, data: bytes | memoryview, offset_bytes: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset_bytes)
        left, offset_bytes = left[written:], offset_bytes + written
