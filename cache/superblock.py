"""The superblock: what the slots file says about itself, kept twice in slot 0. Pure.

Copies lie at byte 0 and 4096 of the slots file and are written in turn, so a write that a power cut tore
leaves the one before it. Of the valid copies the one with the higher sequence counts. In every format version
the magic, the version and the checksum are where they are here, so that an old program can tell a newer
format from damage.

Two numbers tie slots and index together (R8): `session` is the last session that was begun, `confirmed` the
last one that may have written slots. docs/formats.md tells how they are used; `start.py` does it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from tierblk.core import crc32c
from tierblk.errors import CacheError
from tierblk.extent import BLOCK_BYTES, PAGE_BYTES

FORMAT_VERSION = 2
MAGIC = b"TIERBLK\0"
COPY_BYTES = PAGE_BYTES
COPIES = 2
SLOT_BYTES = BLOCK_BYTES

# Everything is in the first 512 bytes, the least that a disk writes as a whole.
_FIELDS = struct.Struct("<8sII16sQQQQQ")
_CRC = struct.Struct("<I")
_CRC_AT = 508


@dataclass(frozen=True, slots=True)
class Superblock:
    """Identity and geometry of a cache directory, and its sessions."""

    uuid: UUID
    slot_count: int
    created_unix_s: int
    sequence: int
    session: int
    confirmed: int
    slot_bytes: int = SLOT_BYTES
    version: int = FORMAT_VERSION

    @property
    def offset_bytes(self) -> int:
        """Where in the slots file this copy belongs."""
        return self.sequence % COPIES * COPY_BYTES


def renumbered(superblock: Superblock, sequence: int) -> Superblock:
    """The same facts as the copy with that sequence."""
    return replace(superblock, sequence=sequence)


def pack(superblock: Superblock) -> bytes:
    """COPY_BYTES, ready to be written at superblock.offset_bytes."""
    head = _FIELDS.pack(
        MAGIC,
        superblock.version,
        superblock.slot_bytes,
        superblock.uuid.bytes,
        superblock.slot_count,
        superblock.created_unix_s,
        superblock.sequence,
        superblock.session,
        superblock.confirmed,
    ).ljust(_CRC_AT, b"\0")
    return (head + _CRC.pack(crc32c(head))).ljust(COPY_BYTES, b"\0")


def unpack(copy: bytes) -> Superblock | None:
    """What the copy says, of whatever version; None when it is torn, damaged or none at all."""
    if len(copy) != COPY_BYTES or not copy.startswith(MAGIC):
        return None
    if _CRC.unpack_from(copy, _CRC_AT)[0] != crc32c(copy[:_CRC_AT]):
        return None
    _, version, slot_bytes, uuid, *numbers = _FIELDS.unpack_from(copy)
    slot_count, created_unix_s, sequence, session, confirmed = numbers
    return Superblock(
        UUID(bytes=uuid), slot_count, created_unix_s, sequence, session, confirmed, slot_bytes, version
    )


def choose(copies: Sequence[bytes], path: str) -> tuple[Superblock, int]:
    """The newest valid copy and how many were not valid; `path` is the slots file, for the messages.

    CacheError when the format is newer, when none is valid, or when the fields contradict the format.
    """
    found = [superblock for copy in copies if (superblock := unpack(copy)) is not None]
    for superblock in found:
        if superblock.version > FORMAT_VERSION:
            raise CacheError(
                f"{path} was made by a newer tierblk: its format is {superblock.version}, "
                f"this version knows {FORMAT_VERSION}",
                "use that version of tierblk, or another directory",
            )
    if not found:
        ours = any(copy.startswith(MAGIC) for copy in copies)
        raise CacheError(
            f"both superblocks of {path} are damaged" if ours else f"{path} is not a slots file of tierblk",
            "remove the cache directory to begin with an empty one" if ours else "use another directory",
        )
    newest = max(found, key=lambda superblock: superblock.sequence)
    if newest.slot_bytes != SLOT_BYTES or newest.slot_count < 2 or newest.confirmed > newest.session:
        raise CacheError(
            f"the superblock of {path} contradicts its format",
            "remove the cache directory to begin with an empty one",
        )
    return newest, len(copies) - len(found)
