"""Partition tables made by a real tool are understood; hostile bytes never raise (I12)."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.partition import HEAD_BYTES, Partition, PartitionTable, kernel_reads, logical, parse

SECTOR = 512
DISK_BYTES = 64 * 2**20


def gpt_head(
    partitions: list[tuple[int, int]], sectors: int, *, entries_at: int = 2, count: int = 128
) -> bytearray:
    """The first sectors of a GPT disk with partitions (first, last sector)."""
    head = bytearray(HEAD_BYTES)
    struct.pack_into("<B3sB3sII", head, 446, 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(sectors - 1, 0xFFFFFFFF))
    head[510:512] = b"\x55\xaa"
    entries = bytearray(count * 128)
    for n, (first, last) in enumerate(partitions):
        struct.pack_into("<16s16sQQ", entries, n * 128, b"type" * 4, bytes([n]) * 16, first, last)
    fields = [
        b"EFI PART",
        0x10000,
        92,
        0,
        1,
        sectors - 1,
        34,
        sectors - 34,
        b"disk" * 4,
        entries_at,
        count,
        128,
    ]
    header = struct.pack("<8sIII4xQQQQ16sQIII", *fields, zlib.crc32(entries))
    fields[3] = zlib.crc32(header)
    head[SECTOR : SECTOR + 92] = struct.pack("<8sIII4xQQQQ16sQIII", *fields, zlib.crc32(entries))
    room = head[entries_at * SECTOR : entries_at * SECTOR + len(entries)]
    head[entries_at * SECTOR : entries_at * SECTOR + len(room)] = entries[: len(room)]
    return head


def sfdisk(path: Path, script: str) -> bytes:
    path.touch()
    with path.open("r+b") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(
        ["/sbin/sfdisk", "--quiet", path],
        input=script,
        text=True,
        check=True,
        capture_output=True,
        timeout=30,
    )
    return path.read_bytes()[:HEAD_BYTES]


def test_a_gpt_from_sfdisk(tmp_path: Path) -> None:
    table = parse(sfdisk(tmp_path / "disk", "label: gpt\nsize=8MiB\nsize=16MiB\n"), DISK_BYTES)
    assert table == PartitionTable(
        "gpt",
        (Partition(1, 2**20, 8 * 2**20), Partition(2, 9 * 2**20, 16 * 2**20)),
        DISK_BYTES,
        DISK_BYTES,
    )
    assert table.warning() is None


def test_an_mbr_from_sfdisk(tmp_path: Path) -> None:
    head = sfdisk(tmp_path / "disk", "label: dos\nsize=8MiB, bootable\n\nsize=16MiB, type=82\n")
    table = parse(head[:SECTOR], DISK_BYTES)
    assert table is not None
    assert table.kind == "mbr"
    assert table.partitions[0] == Partition(1, 2**20, 8 * 2**20)
    assert table.warning() is None


def test_an_image_that_was_cut_off(tmp_path: Path) -> None:
    head = sfdisk(tmp_path / "disk", "label: gpt\nsize=8MiB\nsize=16MiB\n")
    table = parse(head, 12 * 2**20)
    assert table is not None
    assert table.warning() == (
        "the image is 12 MiB (12582912 bytes), but its GPT partition table needs 64 MiB (67108864 bytes): "
        "partition 2 reaches beyond its end, so the image was probably cut off"
    )
    only_backup = parse(head, DISK_BYTES - SECTOR)
    assert only_backup is not None
    assert "the backup of the table reaches beyond its end" in (only_backup.warning() or "")


def test_the_helper_makes_what_sfdisk_makes() -> None:
    table = parse(bytes(gpt_head([(2048, 4095)], 8192)), 8192 * SECTOR)
    assert table is not None
    assert table.partitions == (Partition(1, 2048 * SECTOR, 2048 * SECTOR),)
    assert table.end_bytes == 8192 * SECTOR


def test_entries_that_lie_elsewhere_leave_the_size_of_the_disk() -> None:
    table = parse(bytes(gpt_head([(2048, 4095)], 8192, entries_at=30)), 100 * SECTOR)
    assert table is not None
    assert table.end_bytes == 8192 * SECTOR
    assert table.partitions == (Partition(1, 2048 * SECTOR, 2048 * SECTOR),)


@pytest.mark.parametrize("where", [SECTOR, SECTOR + 9, SECTOR + 40, 2 * SECTOR + 32])
def test_a_damaged_gpt_is_no_table(where: int) -> None:
    head = gpt_head([(2048, 4095)], 8192)
    head[where] ^= 1
    assert parse(bytes(head), 8192 * SECTOR) is None


@pytest.mark.parametrize("head", [b"", b"\x55\xaa", bytes(HEAD_BYTES), b"\xff" * HEAD_BYTES])
def test_no_table(head: bytes) -> None:
    assert parse(head, 2**30) is None


def test_a_boot_sector_of_a_filesystem_is_no_table() -> None:
    assert (
        parse(b"\xeb\x58\x90mkfs.fat" + b"This is not a bootable disk. " * 17 + bytes(8) + b"\x55\xaa", 2**30)
        is None
    )


@given(st.binary(max_size=2048), st.integers(0, 2**64))
def test_hostile_bytes_never_raise(data: bytes, size_bytes: int) -> None:
    for head in (data, data[:510].ljust(510, b"\0") + b"\x55\xaa" + data[510:]):
        table = parse(head, size_bytes)
        assert table is None or isinstance(table.warning(), str | None)


U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


@given(
    U64, U64, U64, U32, U32 | st.sampled_from([128, 256, 512]), st.integers(0, 2**33), st.binary(max_size=512)
)
def test_a_gpt_whose_checksum_is_right_and_whose_numbers_lie(
    backup: int, last: int, first: int, count: int, entry_bytes: int, size_bytes: int, entries: bytes
) -> None:
    head = gpt_head([(2048, 4095)], 8192)
    head[2 * SECTOR : 2 * SECTOR + len(entries)] = entries
    fields = [b"EFI PART", 0x10000, 92, 0, 1, backup, 34, last, b"disk" * 4, first, count, entry_bytes, 0]
    fields[3] = zlib.crc32(struct.pack("<8sIII4xQQQQ16sQIII", *fields))
    head[SECTOR : SECTOR + 92] = struct.pack("<8sIII4xQQQQ16sQIII", *fields)
    table = parse(bytes(head), size_bytes)
    assert table is None or isinstance(table.warning(), str | None)


def reads_of(image: bytes) -> list[tuple[int, int]]:
    """(first sector, sectors) of all that is read behind the head; each lies inside the image."""
    reads, found = kernel_reads(image[:HEAD_BYTES], len(image)), list[tuple[int, int]]()
    wanted = next(reads, None)
    while wanted is not None:
        offset, length = wanted
        assert 0 <= offset < offset + length <= len(image)
        assert (offset % SECTOR, length % SECTOR) == (0, 0)
        found.append((offset // SECTOR, length // SECTOR))
        try:
            wanted = reads.send(image[offset : offset + length])
        except StopIteration:
            wanted = None
    return found


def test_linux_looks_for_the_backup_of_a_gpt_at_the_end(tmp_path: Path) -> None:
    sfdisk(tmp_path / "disk", "label: gpt\nsize=8MiB\n")
    last = DISK_BYTES // SECTOR - 1
    assert reads_of((tmp_path / "disk").read_bytes()) == [(last - 32, 33), (last, 1), (last - 32, 32)]


def test_and_where_the_header_says_when_the_disk_was_made_larger(tmp_path: Path) -> None:
    sfdisk(tmp_path / "disk", "label: gpt\nsize=8MiB\n")
    backup = DISK_BYTES // SECTOR - 1
    grown = (tmp_path / "disk").read_bytes() + bytes(2**20)
    assert reads_of(grown) == [(backup + 2048 - 32, 33), (backup, 1), (backup - 32, 32)]
    assert reads_of(grown[: 32 * 2**20]) == [(65536 - 33, 33)], "nothing of what was cut off"


def test_entries_behind_the_head_are_read_too() -> None:
    image = bytes(gpt_head([(2048, 4095)], 8192, entries_at=64)).ljust(8192 * SECTOR, b"\0")
    assert reads_of(image) == [(8192 - 33, 33), (64, 32), (8191, 1)]


def test_linux_follows_the_chain_of_logical_partitions(tmp_path: Path) -> None:
    """And looks into primary ones whose type may mean a table of their own: swap has Solaris' type."""
    script = "label: dos\n2048,8MiB\n,4MiB,S\n,2MiB\n,,E\n,4MiB\n,8MiB\n,4MiB\n"
    sfdisk(tmp_path / "disk", script)
    dump = subprocess.run(
        ["/sbin/sfdisk", "--dump", tmp_path / "disk"], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    starts = [int(line.split("start=")[1].split(",")[0]) for line in dump.splitlines() if "start=" in line]
    swap, extended, logical = starts[1], starts[3], starts[4:]
    links = [extended, *(start - 2048 for start in logical[1:])]  # sfdisk puts each link a MiB before
    assert len(links) == 3
    assert reads_of((tmp_path / "disk").read_bytes()) == [(swap + 1, 1), *((link, 1) for link in links)]


def test_a_chain_that_bites_its_tail_ends() -> None:
    image = bytearray(100 * SECTOR)
    for sector, start in ((0, 50), (50, 7), (57, 0)):  # links count from the first one, which is 50
        struct.pack_into("<B3xB3xII", image, sector * SECTOR + 446, 0, 5, start, 10)
        image[sector * SECTOR + 510 : (sector + 1) * SECTOR] = b"\x55\xaa"
    assert reads_of(bytes(image)) == [(50, 1), (57, 1)]


@given(st.binary(max_size=64), st.integers(0, 80), st.sampled_from([5, 0x0F, 0x82, 0xEE]))
def test_what_is_read_lies_inside_whatever_the_table_says(data: bytes, sectors: int, kind: int) -> None:
    link = bytes(446) + struct.pack("<B3xB3xII", 0, kind, sectors // 2, 7) + data.ljust(48, b"\0")[:48]
    image = (link + b"\x55\xaa") * sectors
    assert len(reads_of(image)) <= 4 * 256


def logical_of(image: bytes) -> list[Partition]:
    reads = logical(image[:HEAD_BYTES], len(image))
    answer: bytes | None = None
    while True:
        try:
            offset, length = next(reads) if answer is None else reads.send(answer)
        except StopIteration as stop:
            return list(stop.value)
        answer = image[offset : offset + length]


def test_types_and_names(tmp_path: Path) -> None:
    linux = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    table = parse(sfdisk(tmp_path / "gpt", f'label: gpt\nsize=8MiB, type={linux}, name="wörk"\n'), DISK_BYTES)
    assert table is not None
    assert [(p.kind, p.name) for p in table.partitions] == [(linux.lower(), "wörk")]
    table = parse(sfdisk(tmp_path / "mbr", "label: dos\nsize=8MiB, type=82\n"), DISK_BYTES)
    assert table is not None
    assert [(p.kind, p.name) for p in table.partitions] == [("0x82", "")]


def test_logical_partitions_are_numbered_from_5(tmp_path: Path) -> None:
    sfdisk(tmp_path / "disk", "label: dos\n2048,8MiB\n,,E\n,4MiB\n,8MiB,S\n")
    dump = subprocess.run(
        ["/sbin/sfdisk", "--dump", tmp_path / "disk"], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    starts = [int(line.split("start=")[1].split(",")[0]) for line in dump.splitlines() if "start=" in line]
    found = logical_of((tmp_path / "disk").read_bytes())
    assert found == [
        Partition(5, starts[2] * SECTOR, 4 * 2**20),
        Partition(6, starts[3] * SECTOR, 8 * 2**20),
    ]
    assert [partition.kind for partition in found] == ["0x83", "0x82"]


@given(st.binary(max_size=64), st.integers(0, 80))
def test_a_chain_of_logical_partitions_ends_whatever_it_says(data: bytes, sectors: int) -> None:
    link = bytes(446) + struct.pack("<B3xB3xII", 0, 5, sectors // 2, 7) + data.ljust(48, b"\0")[:48]
    assert len(logical_of((link + b"\x55\xaa") * sectors)) <= 4 * 4 * 256
