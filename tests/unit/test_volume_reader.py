"""docs/formats.md is enough: a reader that was written from it alone rebuilds every epoch of a volume."""

from __future__ import annotations

import ast
from pathlib import Path
from random import Random
from uuid import UUID

import pytest

from tests.unit import volume_reader as reader
from tests.unit.volume_rig import BASE, UUID_1, Volume
from tierblk.core import crc32c
from tierblk.extent import PAGE_BYTES
from tierblk.remote import checkpoint
from tierblk.remote.birth import Base, Birth
from tierblk.remote.pieces import Piece
from tierblk.remote.record import ObjectName

PAGES = 1100  # two rows, of which the second is short
SIZE_BYTES = PAGES * PAGE_BYTES - 512
IMAGE = Random(1).randbytes(40 * PAGE_BYTES + 1024)
BASES = {BASE.url: IMAGE}


def page(seed: int) -> bytes:
    return Random(seed).randbytes(PAGE_BYTES)


class Story:
    """A volume of several epochs, and what its bytes are after each."""

    def __init__(self) -> None:
        base = Base(BASE.url, len(IMAGE), BASE.validator)
        self.volume = Volume(Birth(UUID_1, SIZE_BYTES, base, None, 1_795_000_000))
        self.bytes = bytearray(IMAGE.ljust(SIZE_BYTES, b"\0"))
        self.after = [bytes(self.bytes)]

    def write(self, writes: dict[int, bytes], zeroes: tuple[tuple[int, int], ...] = ()) -> None:
        for first, count in zeroes:
            self.bytes[first * PAGE_BYTES : (first + count) * PAGE_BYTES] = bytes(count * PAGE_BYTES)
        for number, raw in writes.items():
            self.bytes[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = raw

    def told(self, size_bytes: int = SIZE_BYTES) -> None:
        del self.bytes[size_bytes:]
        self.bytes.extend(bytes(size_bytes - len(self.bytes)))
        self.after.append(bytes(self.bytes))

    def commit(
        self, writes: dict[int, bytes], zeroes: tuple[tuple[int, int], ...] = (), *, inline: bool = False
    ) -> None:
        self.volume.commit(writes, zeroes, inline=inline)
        self.write(writes, zeroes)
        self.told()


@pytest.fixture(scope="module")
def story() -> Story:
    story = Story()
    volume = story.volume
    volume.commit()  # the claim
    story.told()
    story.commit({n: page(n) for n in (0, 1, 2, 15, 16, 17, 39, 40, 1023, 1024)})
    story.commit(dict.fromkeys(range(32, 48), b"r" * PAGE_BYTES) | {5: page(105)}, inline=True)
    story.commit({34: page(134), 1099: page(199)[:-512] + bytes(512)}, ((3, 2), (36, 3), (900, 199)))
    # A collection reads pages 0 to 2 and 15 and stores them anew; page 1 is written at the same time.
    held = next(volume.map.lookup(0, 3))
    assert isinstance(held, Piece)
    source = (held.object, held.offset_bytes)
    written = {1: page(301)}
    volume.commit(written, moves={source: {0: page(0), 1: page(1), 2: page(2)}})
    story.write(written)
    story.told()
    # One that read page 0 before that moves nothing any more.
    volume.commit(moves={source: {0: page(666)}, (ObjectName(1, bytes(16), 0), 0): {1: page(667)}})
    story.told()
    # Shrunk into the base, grown again: neither old bytes nor the base come back.
    volume.commit(size_bytes=20 * PAGE_BYTES)
    story.told(20 * PAGE_BYTES)
    volume.commit({21: page(421)}, size_bytes=SIZE_BYTES)
    story.bytes.extend(bytes(SIZE_BYTES - len(story.bytes)))
    story.write({21: page(421)})
    story.told()
    # Back to epoch 4, base and size included, and page 0 anew.
    volume.commit({0: page(500)}, back_to=4, visible_bytes=len(IMAGE), size_bytes=SIZE_BYTES)
    story.bytes[:] = story.after[4]
    story.write({0: page(500)})
    story.told()
    return story


def test_the_reader_knows_nothing_of_tierblk() -> None:
    source = Path(reader.__file__).read_text()
    assert "import" in source
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported == {"__future__", "dataclasses", "hashlib", "json", "struct", "typing"}


def test_its_checksum_is_the_one() -> None:
    assert reader.crc32c(b"123456789") == 0xE3069283 == crc32c(b"123456789")


def test_every_epoch_is_read_as_it_was_written(story: Story) -> None:
    objects = story.volume.objects
    history = reader.replay(objects, reader.born(objects))
    assert [volume.epoch for volume in history] == list(range(len(story.after)))
    for volume, expected in zip(history[1:], story.after[1:], strict=True):
        assert reader.content(volume, objects, BASES) == expected, f"epoch {volume.epoch}"


def test_a_checkpoint_is_the_same_map(story: Story) -> None:
    objects = story.volume.objects
    history = reader.replay(objects, reader.born(objects))
    for volume, extents in zip(history[1:], story.volume.maps[1:], strict=True):
        read = reader.read_checkpoint(checkpoint.encode(extents))
        assert (read.uuid, read.epoch, read.hash) == (volume.uuid, volume.epoch, volume.hash)
        assert (read.size, read.visible, read.url) == (volume.size, volume.visible, volume.url)
        zeros = {number for number, place in volume.pages.items() if place is None}
        seen = {number for number in zeros if number * PAGE_BYTES < volume.visible}
        assert read.pages == {n: place for n, place in volume.pages.items() if n not in zeros or n in seen}


def test_records_behind_a_checkpoint(story: Story) -> None:
    objects = dict(story.volume.objects)
    del objects[f"epoch/{9:016x}"]  # goes back to before the checkpoint, for which there are the records
    start = reader.read_checkpoint(checkpoint.encode(story.volume.maps[6]))
    history = reader.replay(objects, start)
    assert [volume.epoch for volume in history] == [6, 7, 8]
    for volume in history:
        assert reader.content(volume, objects, BASES) == story.after[volume.epoch]


def test_a_clone_goes_on_from_its_parent(story: Story) -> None:
    clone = story.volume.clone(UUID(int=5))
    forked = clone.map.head.epoch
    clone.commit({8: page(800)})
    objects = clone.objects
    start = reader.replay(story.volume.objects, reader.born(story.volume.objects))[-1]
    start.uuid = UUID(int=5).bytes
    after = reader.replay(objects, start)[-1]
    assert after.epoch == forked + 1
    expected = bytearray(story.after[-1])
    expected[8 * PAGE_BYTES : 9 * PAGE_BYTES] = page(800)
    assert reader.content(after, objects, BASES) == bytes(expected)
