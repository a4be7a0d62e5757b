"""Which dirty pages in slots have their sums (docs/formats.md, "summed").

A file beside the slots, written at a clean end and believed only until the next session begins: whoever may
write to a page takes its bit away first, in memory, and this file is not kept up to date. So it says for
which cache, and behind which session's end. Without it nothing is lost but the means to find a bit that
flips."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from tierblk.core import crc32c
from tierblk.durable import sync_directory

SUMMED, NEW_SUMMED = "summed", "summed.new"
VERSION = 1
MAGIC = b"TBSUMMED"
MASK_BYTES = 2  # a u16 a slot, little endian

_HEAD = struct.Struct("<8sI16sQQ")  # magic, version, uuid, session, slots
_CRC = struct.Struct("<I")


def room_for(slot_count: int) -> bytearray:
    """Of each slot the mask of its pages: none of them."""
    return bytearray(MASK_BYTES * slot_count)


def mask_of(masks: bytes | bytearray, slot: int) -> int:
    """That of a slot; 0 of one behind the last."""
    return int.from_bytes(masks[MASK_BYTES * slot : MASK_BYTES * (slot + 1)], "little")


def pack(uuid: UUID, session: int, masks: bytes) -> bytes:
    """The file."""
    body = _HEAD.pack(MAGIC, VERSION, uuid.bytes, session, len(masks) // MASK_BYTES) + masks
    return body + _CRC.pack(crc32c(body))


def unpack(packed: bytes, uuid: UUID, session: int) -> bytes:
    """The masks; b"" when it is damaged, of another cache, another session or another version."""
    body = packed[: -_CRC.size]
    if len(body) < _HEAD.size or packed[-_CRC.size :] != _CRC.pack(crc32c(body)):
        return b""
    magic, version, owner, of_session, slot_count = _HEAD.unpack_from(body)
    masks = body[_HEAD.size :]
    wanted = (MAGIC, VERSION, uuid.bytes, session, MASK_BYTES * slot_count)
    return masks if (magic, version, owner, of_session, len(masks)) == wanted else b""


def read(directory: Path, uuid: UUID, session: int) -> bytes:
    """The masks behind the clean end of that session; b"" when there are none that count."""
    try:
        return unpack((directory / SUMMED).read_bytes(), uuid, session)
    except OSError:
        return b""


def write(directory: Path, uuid: UUID, session: int, masks: bytes) -> None:
    """Durable when it returns; OSError, and then there is none."""
    path, new = directory / SUMMED, directory / NEW_SUMMED
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(pack(uuid, session, masks))
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
        sync_directory(directory)
    except OSError:
        remove(directory)
        raise


def remove(directory: Path) -> None:
    """It is of an earlier session, and only takes room."""
    for name in (SUMMED, NEW_SUMMED):
        with suppress(OSError):
            os.unlink(directory / name)
