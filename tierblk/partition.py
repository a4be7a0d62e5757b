"""What an image's partition table says about its size. Pure.

The bytes come from a remote, so they may lie (I12): whatever they are, parsing ends and raises nothing.
Nothing here decides what the kernel shows: it only tells people that an image was cut off.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from tierblk.extent import SECTOR_BYTES
from tierblk.units import format_size

HEAD_BYTES = 34 * SECTOR_BYTES  # protective MBR, GPT header and the usual 128 entries of 128 bytes

_MBR_TABLE_OFFSET = 446
_MBR_ENTRY = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
_MBR_MAGIC = b"\x55\xaa"
_MBR_TYPE_GPT = 0xEE

# signature, revision, header bytes, header crc, my sector, backup's sector, first and last usable sector,
# disk id, sector of the entries, their count, their size, their crc
_GPT_HEADER = struct.Struct("<8sIII4xQQQQ16sQIII")
_GPT_MAGIC = b"EFI PART"
_GPT_CRC_OFFSET = 16
_GPT_ENTRY = struct.Struct("<16s16sQQ")  # type, id, first sector, last sector
_GPT_ENTRIES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; its numbers are those that the table claims."""

    number: int
    start_bytes: int
    length_bytes: int

    @property
    def end_bytes(self) -> int:
        """First byte behind it."""
        return self.start_bytes + self.length_bytes


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """A table that is valid in itself. end_bytes is the smallest disk on which it is true."""

    kind: str
    partitions: tuple[Partition, ...]
    end_bytes: int
    image_bytes: int

    def warning(self) -> str | None:
        """A sentence for the user when the image is smaller than its table says."""
        if self.end_bytes <= self.image_bytes:
            return None
        cut = [str(p.number) for p in self.partitions if p.end_bytes > self.image_bytes]
        lost = (
            f"partition{'s' if len(cut) > 1 else ''} {', '.join(cut[:8])}"
            if cut
            else "the backup of the table"
        )
        image, needed = format_size(self.image_bytes), format_size(self.end_bytes)
        return (
            f"the image is {image} ({self.image_bytes} bytes), but its {self.kind.upper()} partition table "
            f"needs {needed} ({self.end_bytes} bytes): "
            f"{lost} reaches beyond its end, so the image was probably cut off"
        )


def parse(head: bytes, size_bytes: int) -> PartitionTable | None:
    """The partition table in an image's first HEAD_BYTES (fewer do); None when it has none that is valid."""
    entries = _mbr_entries(head)
    if entries is None:
        return None
    if any(kind == _MBR_TYPE_GPT for kind, _, _ in entries):
        return _parse_gpt(head, size_bytes)
    partitions = tuple(
        Partition(number, start * SECTOR_BYTES, sectors * SECTOR_BYTES)
        for number, (kind, start, sectors) in enumerate(entries, 1)
        if kind and sectors
    )
    return _table("mbr", partitions, 0, size_bytes) if partitions else None


def _table(kind: str, partitions: tuple[Partition, ...], least_bytes: int, size_bytes: int) -> PartitionTable:
    end_bytes = max([least_bytes, *(partition.end_bytes for partition in partitions)])
    return PartitionTable(kind, partitions, end_bytes, size_bytes)


def _mbr_entries(head: bytes) -> list[tuple[int, int, int]] | None:
    """(type, first sector, sectors) of the four entries; None when sector 0 is something else."""
    if len(head) < SECTOR_BYTES or head[510:512] != _MBR_MAGIC:
        return None
    rows = [_MBR_ENTRY.unpack_from(head, _MBR_TABLE_OFFSET + 16 * n) for n in range(4)]
    # A filesystem's own boot sector ends in the same magic and has code in this place.
    if any(status not in (0x00, 0x80) for status, _, _, _ in rows):
        return None
    return [(kind, start, sectors) for _, kind, start, sectors in rows]


def _parse_gpt(head: bytes, size_bytes: int) -> PartitionTable | None:
    if len(head) < 2 * SECTOR_BYTES:
        return None
    sector = head[SECTOR_BYTES : 2 * SECTOR_BYTES]
    magic, _, header_bytes, crc, mine, backup, _, last_usable, _, first, count, entry_bytes, entries_crc = (
        _GPT_HEADER.unpack_from(sector)
    )
    if magic != _GPT_MAGIC or mine != 1 or not _GPT_HEADER.size <= header_bytes <= SECTOR_BYTES:
        return None
    blanked = sector[:_GPT_CRC_OFFSET] + bytes(4) + sector[_GPT_CRC_OFFSET + 4 : header_bytes]
    if zlib.crc32(blanked) != crc:
        return None
    if entry_bytes < 128 or entry_bytes % 128 or entry_bytes > SECTOR_BYTES or count > _GPT_ENTRIES_MAX:
        return None
    start = first * SECTOR_BYTES
    entries = head[start : start + count * entry_bytes] if start < len(head) else b""
    if len(entries) == count * entry_bytes and zlib.crc32(entries) != entries_crc:
        return None
    partitions = tuple(_gpt_partitions(entries, entry_bytes))
    return _table("gpt", partitions, (max(backup, last_usable) + 1) * SECTOR_BYTES, size_bytes)


def _gpt_partitions(entries: bytes, entry_bytes: int) -> Iterable[Partition]:
    for number in range(len(entries) // entry_bytes):
        kind, _, first, last = _GPT_ENTRY.unpack_from(entries, number * entry_bytes)
        if kind != bytes(16) and first <= last:
            yield Partition(number + 1, first * SECTOR_BYTES, (last - first + 1) * SECTOR_BYTES)
