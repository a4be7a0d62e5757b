"""A reader of volumes, written from docs/formats.md alone: it knows nothing of tierblk. Slow and small.

Of zstd it knows frames of raw and repeated bytes; a real reader takes a library for that.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096
RECORD = 0xFFFFFFFF

CRC_TABLE = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    CRC_TABLE.append(n)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def unzstd(frame: bytes) -> bytes:
    """A single-segment frame whose content size has 4 bytes, and whose blocks are raw or repeat one byte."""
    assert frame[:5] == b"\x28\xb5\x2f\xfd\xa0"
    out, at, last = b"", 9, 0
    while not last:
        header = int.from_bytes(frame[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        assert kind in (0, 1)
        out += frame[at + 3 : at + 3 + size] if kind == 0 else frame[at + 3 : at + 4] * size
        at += 3 + (size if kind == 0 else 1)
    assert len(out) == int.from_bytes(frame[5:9], "little")
    return out


@dataclass(frozen=True)
class Place:
    """Where one page is: the index-th of the pages that are stored at offset of the object."""

    epoch: int
    attempt: bytes
    n: int
    offset: int
    stored: int
    codec: int
    index: int
    crc: int

    def name(self) -> str:
        if self.n == RECORD:
            return f"epoch/{self.epoch:016x}"
        return f"data/{self.epoch:016x}.{self.attempt.hex()}.{self.n:04x}"


@dataclass
class Volume:
    """What a volume is at an epoch; a page in `pages` with no place is zeros."""

    uuid: bytes = b""
    epoch: int = 0
    hash: bytes = bytes(32)
    size: int = 0
    visible: int = 0
    url: str = ""
    pages: dict[int, Place | None] = field(default_factory=dict)


class Cursor:
    def __init__(self, data: bytes, magic: bytes) -> None:
        assert hashlib.sha256(data[:-32]).digest() == data[-32:]
        self.data, self.at = data[:-32], 0
        assert self.take("8sI") == (magic, 1)

    def take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return found

    def bytes(self, count: int) -> bytes:
        assert self.at + count <= len(self.data)
        self.at += count
        return self.data[self.at - count : self.at]


def run(cursor: Cursor, epoch: int, attempt: bytes) -> dict[int, Place]:
    page, n, offset, stored, pages, codec = cursor.take("QIIIBB")
    sums = cursor.take(f"{pages}I")
    return {page + i: Place(epoch, attempt, n, offset, stored, codec, i, sums[i]) for i in range(pages)}


def apply(data: bytes, history: list[Volume]) -> Volume:
    """The volume behind a record; history: what it was at each epoch before, from 0 on."""
    before = history[-1]
    cursor = Cursor(data, b"TBEPOCH\0")
    _, uuid, epoch, attempt, _, previous = cursor.take("I16sQ16s16s32s")
    size, visible, back_to, _, _ = cursor.take("5Q")
    url_bytes, validator_bytes, objects, runs, zeroes, moves, inline = cursor.take("7I")
    assert (uuid, epoch, previous) == (before.uuid, before.epoch + 1, before.hash)
    cursor.bytes(inline)
    url = cursor.bytes(url_bytes).decode()
    cursor.bytes(validator_bytes)
    cursor.bytes(8 * objects)
    written: dict[int, Place | None] = {}
    for _ in range(runs):
        written.update(run(cursor, epoch, attempt))
    for _ in range(zeroes):
        page, count = cursor.take("QQ")
        written.update(dict.fromkeys(range(page, page + count)))
    start = next(old for old in history if old.epoch == back_to) if back_to else before
    end = -(-size // PAGE)
    pages = {page: place for page, place in start.pages.items() if page < end}
    for _ in range(moves):
        source = cursor.take("Q16sII")
        for page, place in run(cursor, epoch, attempt).items():
            now = pages.get(page)
            if now and (now.epoch, now.attempt, now.n, now.offset) == source:
                pages[page] = place
    assert cursor.at == len(cursor.data)
    return Volume(uuid, epoch, data[-32:], size, visible, url, {**pages, **written})


def read_checkpoint(data: bytes) -> Volume:
    cursor = Cursor(data, b"TBCHECK\0")
    uuid, epoch, record_hash, size, visible, _ = cursor.take("16sQ32sQQQ")
    url_bytes, validator_bytes, objects, zeroes, rows = cursor.take("5I")
    url = cursor.bytes(url_bytes).decode()
    cursor.bytes(validator_bytes)
    names = [cursor.take("Q16sI") for _ in range(objects)]
    pages: dict[int, Place | None] = {}
    for _ in range(zeroes):
        page, count = cursor.take("QQ")
        pages.update(dict.fromkeys(range(page, page + count)))
    for _ in range(rows):
        row, length = cursor.take("QI")
        end = cursor.at + length
        while cursor.at < end:
            page, count, skip, _, codec, number, offset, stored = cursor.take("HBBBBIII")
            of_epoch, attempt, n = names[number]
            for i, crc in enumerate(cursor.take(f"{count}I")):
                place = Place(of_epoch, attempt, n, offset, stored, codec, skip + i, crc)
                pages[row * 1024 + page + i] = place
        assert cursor.at == end
    assert cursor.at == len(cursor.data)
    return Volume(uuid, epoch, record_hash, size, visible, url, pages)


def born(objects: dict[str, bytes]) -> Volume:
    birth = json.loads(objects["volume.json"])
    assert birth["format"] == 1
    return Volume(uuid=bytes.fromhex(birth["uuid"].replace("-", "")))


def replay(objects: dict[str, bytes], start: Volume) -> list[Volume]:
    """The volume at `start` and at each epoch behind it."""
    history = [start]
    while (name := f"epoch/{history[-1].epoch + 1:016x}") in objects:
        history.append(apply(objects[name], history))
    return history


def content(volume: Volume, objects: dict[str, bytes], bases: dict[str, bytes]) -> bytes:
    """All bytes of the volume."""
    visible = bases.get(volume.url, b"")[: volume.visible]
    out = bytearray(visible.ljust(volume.size, b"\0"))
    for page, place in volume.pages.items():
        raw = bytes(PAGE)
        if place is not None:
            stored = objects[place.name()][place.offset : place.offset + place.stored]
            unpacked = unzstd(stored) if place.codec else stored
            raw = unpacked[place.index * PAGE : (place.index + 1) * PAGE]
            assert crc32c(raw) == place.crc
        out[page * PAGE : (page + 1) * PAGE] = raw
    return bytes(out[: volume.size])
