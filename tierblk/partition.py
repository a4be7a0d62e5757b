"""What an image's partition table says about its size, and what the kernel reads to find it. Pure.

The bytes come from a remote, so they may lie (I12): whatever they are, parsing ends and raises nothing.
Nothing here decides what the kernel shows: it tells people that an image was cut off, and an attach what to
have in the cache before the kernel asks for it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from uuid import UUID

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
_GPT_ENTRY = struct.Struct("<16s16sQQ8x72s")  # type, id, first sector, last sector, name
_GPT_ENTRIES_MAX = 1024
_GPT_TAIL_SECTORS = 33  # where the usual backup lies: its 128 entries, and its header in the last sector

_MBR_EXTENDED = frozenset({0x05, 0x0F, 0x85})
_MBR_LINKS_MAX = 256  # as many partitions as Linux gives a disk
# Types of primary partitions in which Linux looks for a table of their own, in which sector of them:
# Unixware, Minix, Solaris (which is also the type of Linux swap), FreeBSD, OpenBSD, NetBSD.
_MBR_NESTED = {0x63: 29, 0x81: 0, 0x82: 1, 0xA5: 1, 0xA6: 1, 0xA9: 1}

Reads = Generator[tuple[int, int], bytes, None]
"""Yields (offset, length) in bytes, whole sectors of the image, and is sent what lies there."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; its numbers are those that the table claims. kind: its type, "0x83" or a GUID. name: of
    a GPT."""

    number: int
    start_bytes: int
    length_bytes: int
    kind: str = field(default="", compare=False)
    name: str = field(default="", compare=False)

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
        Partition(number, start * SECTOR_BYTES, sectors * SECTOR_BYTES, f"0x{kind:02x}")
        for number, (kind, start, sectors) in enumerate(entries, 1)
        if kind and sectors
    )
    return _table("mbr", partitions, 0, size_bytes) if partitions else None


def _table(kind: str, partitions: tuple[Partition, ...], least_bytes: int, size_bytes: int) -> PartitionTable:
    end_bytes = max([least_bytes, *(partition.end_bytes for partition in partitions)])
    return PartitionTable(kind, partitions, end_bytes, size_bytes)


def kernel_reads(head: bytes, size_bytes: int) -> Reads:
    """What Linux reads behind an image's first HEAD_BYTES when it looks for partitions: a GPT's backup, or
    the chain of an MBR's logical partitions. Ends after a few hundred steps at most.

    Formats of other machines that need more (LDM, the dynamic disks of Windows) are left out."""
    entries = _mbr_rows(head)
    if entries is None:
        return
    if any(kind == _MBR_TYPE_GPT for _, kind, _, _ in entries):
        yield from _gpt_reads(head, size_bytes)
        return
    for _, kind, start, sectors in entries:
        if sectors and kind in _MBR_EXTENDED:
            yield from _chain_reads(start, size_bytes)
        elif sectors and kind in _MBR_NESTED:
            yield from _within(start + _MBR_NESTED[kind], 1, size_bytes)


def _within(first: int, sectors: int, size_bytes: int) -> Generator[tuple[int, int], bytes, bytes]:
    """One read of what the image has of these sectors, if anything."""
    stop = min(first + sectors, size_bytes // SECTOR_BYTES)
    if stop <= first:
        return b""
    return (yield first * SECTOR_BYTES, (stop - first) * SECTOR_BYTES)


def _gpt_reads(head: bytes, size_bytes: int) -> Reads:
    """The end of the image, and whatever the header says that lies elsewhere: an image that was made larger
    has its backup in the middle."""
    tail = max(size_bytes // SECTOR_BYTES - _GPT_TAIL_SECTORS, 0)
    yield from _within(tail, _GPT_TAIL_SECTORS, size_bytes)
    header = _gpt_header(head[SECTOR_BYTES : 2 * SECTOR_BYTES], 1)
    if header is None:
        return  # then Linux does not ask for the backup either
    if header.entries_stop * SECTOR_BYTES > len(head):
        yield from _within(header.first_entry, header.entries_stop - header.first_entry, size_bytes)
    backup = _gpt_header((yield from _within(header.backup, 1, size_bytes)), header.backup)
    if backup is not None:
        yield from _within(backup.first_entry, backup.entries_stop - backup.first_entry, size_bytes)


def _chain_reads(
    first: int, size_bytes: int
) -> Generator[tuple[int, int], bytes, list[tuple[int, int, int]]]:
    """Each link of the chain is a table whose first extended entry names the next one, from `first` on.
    (type, first sector, sectors) of the others."""
    this, seen, found = first, set[int](), []
    while this not in seen and len(seen) < _MBR_LINKS_MAX:
        seen.add(this)
        rows = _mbr_rows((yield from _within(this, 1, size_bytes))) or []
        links = [start for _, kind, start, sectors in rows if sectors and kind in _MBR_EXTENDED]
        found += [
            (kind, this + start, sectors)
            for _, kind, start, sectors in rows
            if kind and sectors and kind not in _MBR_EXTENDED
        ]
        if not links:
            break
        this = first + links[0]
    return found


def logical(head: bytes, size_bytes: int) -> Generator[tuple[int, int], bytes, list[Partition]]:
    """The logical partitions of an MBR, numbered from 5 on, by reads as those of kernel_reads. Sent
    fewer bytes than it asked for, it ends with what it has."""
    found: list[Partition] = []
    for kind, first, sectors in _mbr_entries(head) or ():
        if sectors and kind in _MBR_EXTENDED:
            for inner, start, length in (yield from _chain_reads(first, size_bytes)):
                begin, extent = start * SECTOR_BYTES, length * SECTOR_BYTES
                found.append(Partition(5 + len(found), begin, extent, f"0x{inner:02x}"))
    return found


def _mbr_rows(sector: bytes) -> list[tuple[int, int, int, int]] | None:
    """(status, type, first sector, sectors) of the four entries; None when it does not end as a table."""
    if len(sector) < SECTOR_BYTES or sector[510:512] != _MBR_MAGIC:
        return None
    return [_MBR_ENTRY.unpack_from(sector, _MBR_TABLE_OFFSET + 16 * n) for n in range(4)]


def _mbr_entries(head: bytes) -> list[tuple[int, int, int]] | None:
    """(type, first sector, sectors) of the four entries; None when sector 0 is something else."""
    rows = _mbr_rows(head)
    # A filesystem's own boot sector ends in the same magic and has code in this place.
    if rows is None or any(status not in (0x00, 0x80) for status, _, _, _ in rows):
        return None
    return [(kind, start, sectors) for _, kind, start, sectors in rows]


@dataclass(frozen=True, slots=True)
class _Header:
    """What a GPT header that is valid in itself says, in sectors."""

    backup: int
    last_usable: int
    first_entry: int
    count: int
    entry_bytes: int
    entries_crc: int

    @property
    def entries_stop(self) -> int:
        """First sector behind the entries."""
        return self.first_entry + -(-self.count * self.entry_bytes // SECTOR_BYTES)


def _gpt_header(sector: bytes, at: int) -> _Header | None:
    """The header in this sector, which is number `at`; None when it is not a valid one."""
    if len(sector) < SECTOR_BYTES:
        return None
    magic, _, header_bytes, crc, mine, backup, _, last_usable, _, first, count, entry_bytes, entries_crc = (
        _GPT_HEADER.unpack_from(sector)
    )
    if magic != _GPT_MAGIC or mine != at or not _GPT_HEADER.size <= header_bytes <= SECTOR_BYTES:
        return None
    blanked = sector[:_GPT_CRC_OFFSET] + bytes(4) + sector[_GPT_CRC_OFFSET + 4 : header_bytes]
    if zlib.crc32(blanked) != crc:
        return None
    if entry_bytes < 128 or entry_bytes % 128 or entry_bytes > SECTOR_BYTES or count > _GPT_ENTRIES_MAX:
        return None
    return _Header(backup, last_usable, first, count, entry_bytes, entries_crc)


def _parse_gpt(head: bytes, size_bytes: int) -> PartitionTable | None:
    header = _gpt_header(head[SECTOR_BYTES : 2 * SECTOR_BYTES], 1)
    if header is None:
        return None
    start, length = header.first_entry * SECTOR_BYTES, header.count * header.entry_bytes
    entries = head[start : start + length] if start < len(head) else b""
    if len(entries) == length and zlib.crc32(entries) != header.entries_crc:
        return None
    partitions = tuple(_gpt_partitions(entries, header.entry_bytes))
    return _table("gpt", partitions, (max(header.backup, header.last_usable) + 1) * SECTOR_BYTES, size_bytes)


def _gpt_partitions(entries: bytes, entry_bytes: int) -> Iterable[Partition]:
    for number in range(len(entries) // entry_bytes):
        kind, _, first, last, text = _GPT_ENTRY.unpack_from(entries, number * entry_bytes)
        if kind != bytes(16) and first <= last:
            name = text.decode("utf-16-le", "replace").partition("\0")[0]
            length_bytes = (last - first + 1) * SECTOR_BYTES
            yield Partition(number + 1, first * SECTOR_BYTES, length_bytes, str(UUID(bytes_le=kind)), name)
