"""What partitions hold is recognised, by what real tools make where the build needs these tools anyway, and
nothing that a remote sends raises (I12)."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.contents import Contents, Probed, Read, probe, type_name

UUID_TEXT = "11223344-5566-4788-99aa-bbccddeeff00"
UUID_BYTES = bytes.fromhex(UUID_TEXT.replace("-", ""))
SIZE = 8 << 20


def of(image: bytes, absent: Callable[[int], bool] = lambda offset: False) -> Read:
    return lambda offset, length: None if absent(offset) else image[offset : offset + length]


def placed(*pieces: tuple[int, bytes]) -> bytes:
    image = bytearray(0x11000)
    for offset, data in pieces:
        image[offset : offset + len(data)] = data
    return bytes(image)


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_ext_of_mke2fs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "fs"
    command = ["/sbin/mke2fs", "-q", "-t", kind, "-L", "my label", "-U", UUID_TEXT, str(path), "8M"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    found = probe(of(path.read_bytes()))
    assert found.contents is not None
    assert not found.unread
    holds = found.contents
    assert (holds.kind, holds.label, holds.uuid, holds.total_bytes) == (kind, "my label", UUID_TEXT, SIZE)
    assert holds.used_bytes is not None
    assert 0 < holds.used_bytes < SIZE


def test_swap_of_mkswap(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    path.write_bytes(bytes(SIZE))
    command = ["/sbin/mkswap", "-q", "-L", "pages", "-U", UUID_TEXT, str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert probe(of(path.read_bytes())).contents == Contents("swap", "pages", UUID_TEXT, SIZE)


XFS = struct.pack(">4sIQ", b"XFSB", 4096, 100) + bytes(16) + UUID_BYTES + bytes(60) + b"data".ljust(12, b"\0")
LVM = b"LABELONE" + bytes(16) + b"LVM2 001" + b"Abc123" + bytes(26)
LUKS2 = b"LUKS\xba\xbe\0\2" + bytes(16) + b"secret".ljust(48, b"\0") + bytes(96) + UUID_TEXT.encode()
FAT32 = placed((3, b"mkfs.fat"), (11, b"\0\2"), (32, struct.pack("<I", 999)), (67, b"\x78\x56\x34\x12"),
               (71, b"EFI        FAT32   "), (510, b"\x55\xaa"))  # fmt: skip
FAT16 = placed((11, b"\0\2"), (19, struct.pack("<H", 70)), (39, b"\x78\x56\x34\x12"),
               (43, b"NO NAME    FAT16   "), (510, b"\x55\xaa"))  # fmt: skip
NTFS = placed((3, b"NTFS    "), (11, b"\0\2"), (40, struct.pack("<Q", 50)), (0x48, struct.pack("<Q", 0xAB)),
              (510, b"\x55\xaa"))  # fmt: skip
ISO = b"\1CD001\1\0" + bytes(32) + b"DEBIAN 13".ljust(40) + struct.pack("<I", 300) + bytes(44) + b"\0\10"
BTRFS = placed((0x20, UUID_BYTES), (0x40, b"_BHRfS_M"), (0x70, struct.pack("<QQ", 5000, 3000)),
               (0x12B, b"pool"))[:4096]  # fmt: skip


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (placed((0, XFS), (144, struct.pack(">Q", 60))), Contents("xfs", "data", UUID_TEXT, 409600, 163840)),
        (placed((512, LVM)), Contents("LVM2_member", uuid="Abc123")),
        (placed((0, LUKS2)), Contents("crypto_LUKS", "secret", UUID_TEXT)),
        (placed((0, b"hsqs"), (40, struct.pack("<Q", 777))), Contents("squashfs", "", "", 777, 777)),
        (FAT32, Contents("vfat", "EFI", "1234-5678", 999 * 512)),
        (FAT16, Contents("vfat", "", "1234-5678", 70 * 512)),
        (NTFS, Contents("ntfs", "", "00000000000000AB", 25600)),
        (placed((0x8000, ISO)), Contents("iso9660", "DEBIAN 13", "", 300 * 2048, 300 * 2048)),
        (placed((0x10000, BTRFS)), Contents("btrfs", "pool", UUID_TEXT, 5000, 3000)),
    ],
    ids=lambda value: value.kind if isinstance(value, Contents) else "",
)
def test_by_their_first_bytes(image: bytes, wanted: Contents) -> None:
    assert probe(of(image)) == Probed(wanted, False)


def test_what_is_not_cached_is_said() -> None:
    assert probe(of(placed())) == Probed(None, False)
    assert probe(of(placed(), lambda offset: offset == 0)) == Probed(None, True)
    assert probe(of(placed((0x10000, BTRFS)), lambda offset: offset == 0)).contents is not None
    assert probe(of(b"")) == Probed(None, False), "too small for anything"


def test_free_space_that_cannot_be_is_not_shown() -> None:
    lying = placed((0, XFS), (144, b"\xff" * 8))
    assert probe(of(lying)).contents == Contents("xfs", "data", UUID_TEXT, 409600, None)


MAGICS = [(0, b"XFSB"), (0, b"LUKS\xba\xbe"), (0, b"hsqs"), (512, b"LABELONE"), (4086, b"SWAPSPACE2"),
          (1080, b"\x53\xef"), (1024, b"\xe2\xe1\xf5\xe0"), (510, b"\x55\xaa"), (3, b"EXFAT   "),
          (82, b"FAT32   "), (0x8000, b"\1CD001"), (0x10040, b"_BHRfS_M")]  # fmt: skip


@given(st.integers(0, 0xFF), st.binary(max_size=5000), st.lists(st.sampled_from(MAGICS), max_size=5))
def test_nothing_raises(fill: int, data: bytes, magics: list[tuple[int, bytes]]) -> None:
    image = bytearray([fill]) * 0x11000
    image[: len(data)] = data
    for offset, magic in magics:
        image[offset : offset + len(magic)] = magic
    found = probe(of(bytes(image))).contents
    assert found is None or (found.total_bytes or 0) >= 0


def test_names_of_types() -> None:
    assert type_name("0x83") == "Linux"
    assert type_name("0fc63daf-8483-4772-8e79-3d69d8477de4") == "Linux filesystem"
    assert type_name("0x99") == "0x99"
