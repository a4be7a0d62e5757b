"""What a partition, or a whole image, holds, as its first bytes say: type, label, UUID and sizes. Pure.

The bytes come from a remote, so they may lie (I12): whatever they are, nothing is raised, and text is to be
made harmless by whoever shows it. Only what is common on disks and cloud images is known here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

Read = Callable[[int, int], bytes | None]
"""Bytes of a partition by (offset, length), fewer behind its end; None when they are not at hand."""

TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux filesystem",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "Linux root (ARM64)",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux /boot",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux /home",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "0x05": "extended",
    "0x07": "NTFS or exFAT",
    "0x0b": "FAT32",
    "0x0c": "FAT32",
    "0x0f": "extended",
    "0x82": "Linux swap",
    "0x83": "Linux",
    "0x85": "extended",
    "0x8e": "Linux LVM",
    "0xef": "EFI system",
    "0xfd": "Linux RAID",
}


def type_name(kind: str) -> str:
    """A partition's type for people; itself when it is not known here."""
    return TYPES.get(kind, kind)


@dataclass(frozen=True, slots=True)
class Contents:
    """kind as blkid names it. used_bytes may be of some time ago: a mounted filesystem writes it seldom."""

    kind: str
    label: str = ""
    uuid: str = ""
    total_bytes: int | None = None
    used_bytes: int | None = None


class Probed(NamedTuple):
    """contents: None when none was recognised. unread: then something that would say it is not at hand."""

    contents: Contents | None
    unread: bool


def probe(read: Read) -> Probed:
    """What it holds."""
    unread = False
    for offset, length, look in _LOOKS:
        data = read(offset, length)
        if data is None:
            unread = True
        elif len(data) == length:
            found = look(data)
            if found is not None:
                return Probed(found, False)
    return Probed(None, unread)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace").strip()


def _uuid(data: bytes) -> str:
    return "" if data == bytes(16) else str(UUID(bytes=data))


def _used(total: int, free: int) -> int | None:
    return total - free if 0 <= free <= total else None


def _head(page: bytes) -> Contents | None:
    """What begins with its name, or has it in its first page."""
    for look in (_ext, _xfs, _luks, _lvm, _swap, _squashfs, _erofs, _boot_sector):
        found = look(page)
        if found is not None:
            return found
    return None


def _ext(page: bytes) -> Contents | None:
    magic, compat, incompat, ro_compat = struct.unpack_from("<H34xIII", page, 1024 + 0x38)
    shift = struct.unpack_from("<I", page, 1024 + 0x18)[0]
    if magic != 0xEF53 or shift > 6:
        return None
    total, free = (struct.unpack_from("<I", page, 1024 + at)[0] for at in (0x04, 0x0C))
    if incompat & 0x80:  # 64bit
        total += struct.unpack_from("<I", page, 1024 + 0x150)[0] << 32
        free += struct.unpack_from("<I", page, 1024 + 0x158)[0] << 32
    kind = "ext4" if incompat & 0x2C0 or ro_compat & 0x478 else "ext3" if compat & 0x4 else "ext2"
    if incompat & 0x8:
        return Contents("jbd", uuid=_uuid(page[1024 + 0x68 : 1024 + 0x78]))
    used, unit = _used(total, free), 1024 << shift
    return Contents(
        kind,
        _text(page[1024 + 0x78 : 1024 + 0x88]),
        _uuid(page[1024 + 0x68 : 1024 + 0x78]),
        total * unit,
        None if used is None else used * unit,
    )


def _xfs(page: bytes) -> Contents | None:
    magic, unit, total = struct.unpack_from(">4sIQ", page)
    if magic != b"XFSB":
        return None
    used = _used(total, struct.unpack_from(">Q", page, 144)[0])
    return Contents(
        "xfs",
        _text(page[108:120]),
        _uuid(page[32:48]),
        total * unit,
        None if used is None else used * unit,
    )


def _luks(page: bytes) -> Contents | None:
    magic, version = struct.unpack_from(">6sH", page)
    if magic != b"LUKS\xba\xbe":
        return None
    return Contents("crypto_LUKS", _text(page[24:72]) if version == 2 else "", _text(page[168:208]))


def _lvm(page: bytes) -> Contents | None:
    for at in range(0, 4 * 512, 512):
        if page[at : at + 8] == b"LABELONE" and page[at + 24 : at + 32] == b"LVM2 001":
            return Contents("LVM2_member", uuid=_text(page[at + 32 : at + 64]))
    return None


def _swap(page: bytes) -> Contents | None:
    if page[4086:4096] != b"SWAPSPACE2":
        return None
    (last,) = struct.unpack_from("<I", page, 1028)
    return Contents("swap", _text(page[1052:1068]), _uuid(page[1036:1052]), (last + 1) * 4096)


def _squashfs(page: bytes) -> Contents | None:
    if page[:4] != b"hsqs":
        return None
    (size,) = struct.unpack_from("<Q", page, 40)
    return Contents("squashfs", total_bytes=size, used_bytes=size)


def _erofs(page: bytes) -> Contents | None:
    if page[1024:1028] != b"\xe2\xe1\xf5\xe0" or page[1036] > 16:
        return None
    (blocks,) = struct.unpack_from("<I", page, 1024 + 36)
    size = blocks << page[1036]
    return Contents("erofs", _text(page[1088:1104]), _uuid(page[1072:1088]), size, size)


def _boot_sector(page: bytes) -> Contents | None:
    if page[510:512] != b"\x55\xaa":
        return None
    unit, few = struct.unpack_from("<H", page, 11)[0], struct.unpack_from("<H", page, 19)[0]
    total = (few or struct.unpack_from("<I", page, 32)[0]) * unit
    if page[3:11] == b"NTFS    ":
        (serial,) = struct.unpack_from("<Q", page, 0x48)
        return Contents(
            "ntfs", uuid=f"{serial:016X}", total_bytes=struct.unpack_from("<Q", page, 40)[0] * unit
        )
    if page[3:11] == b"EXFAT   ":
        (sectors,) = struct.unpack_from("<Q", page, 72)
        return Contents("exfat", uuid=_serial(page, 100), total_bytes=sectors << min(page[108], 12))
    for name, at in ((b"FAT32   ", 82), (b"FAT16   ", 54), (b"FAT12   ", 54)):
        if page[at : at + 8] == name:
            label = _text(page[at - 11 : at])
            return Contents("vfat", "" if label == "NO NAME" else label, _serial(page, at - 15), total)
    return None


def _serial(page: bytes, at: int) -> str:
    (serial,) = struct.unpack_from("<I", page, at)
    return f"{serial >> 16:04X}-{serial & 0xFFFF:04X}"


def _iso9660(sector: bytes) -> Contents | None:
    if sector[:6] != b"\x01CD001":
        return None
    blocks, unit = struct.unpack_from("<I", sector, 80)[0], struct.unpack_from("<H", sector, 128)[0]
    return Contents("iso9660", _text(sector[40:72]), total_bytes=blocks * unit, used_bytes=blocks * unit)


def _btrfs(page: bytes) -> Contents | None:
    if page[0x40:0x48] != b"_BHRfS_M":
        return None
    total, used = struct.unpack_from("<QQ", page, 0x70)
    return Contents("btrfs", _text(page[0x12B:0x22B]), _uuid(page[0x20:0x30]), total, used)


# (offset, bytes, what may be recognised there); an ISO image may begin as a disk does, and so comes first
_LOOKS = (
    (0x8000, 2048, _iso9660),
    (0, 4096, _head),
    (0x10000, 4096, _btrfs),
)
