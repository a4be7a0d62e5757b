"""Seals: what a volume was at one instant can be read until the epoch ends, whatever is written meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine_rig import TIMEOUT_S, Rig
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, LocalDoor, map_bytes
from tierblk.core import Sealed as Block

BLOCKS = 24


class EpochRig:
    """A volume of BLOCKS blocks over nothing."""

    def __init__(self, folder: Path, slots: int = 100) -> None:
        self.rig = Rig(folder, bytes(BLOCK_BYTES), slots)
        self.engine = self.rig.engine
        size_bytes = BLOCKS * BLOCK_BYTES
        self._map = (folder / "volume.map").open("w+b")
        self._map.truncate(map_bytes(size_bytes))
        self.volume = self.engine.open_layer(2, self._map.fileno(), size_bytes, kind="local")
        self.door = LocalDoor(self.engine, None, volume=self.volume, queue_depth=16)
        self.content = bytearray(size_bytes)

    def write(self, at: int, data: bytes) -> None:
        self.door.write(at, data)
        self.content[at : at + len(data)] = data

    def collect(self) -> list[Block]:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self.volume.collect(4):
            assert time.monotonic() < deadline_s
        found = []
        while blocks := self.volume.sealed(3):
            found += blocks
        assert len({each.block for each in found}) == len(found)
        return found

    def sealed_bytes(self, blocks: list[Block]) -> dict[int, bytes]:
        """Page number of the volume -> its bytes at the seal, out of the slots file."""
        pages = {}
        with self.rig.slots_path.open("rb") as slots:
            for each in blocks:
                for page in range(16):
                    if not each.dirty >> page & 1:
                        continue
                    slots.seek(each.slot * BLOCK_BYTES + page * PAGE_BYTES)
                    data = bytes(PAGE_BYTES) if each.zero >> page & 1 else slots.read(PAGE_BYTES)
                    pages[each.block * 16 + page] = data
        return pages

    def dirty(self) -> int:
        return sum(
            entry_dirty.bit_count()
            for row in range(self.volume.rows)
            for entry_dirty in _dirty(self.volume.peek_row(row))
        )

    def close(self) -> None:
        self.door.drain()
        self.door.quit()
        self.door.close()
        self.rig.close()
        self._map.close()


def _dirty(packed: bytes) -> Iterator[int]:
    for at in range(0, 64 * 12, 12):
        yield int.from_bytes(packed[at + 10 : at + 12], "little")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EpochRig]:
    rig = EpochRig(tmp_path)
    yield rig
    rig.close()


@contextmanager
def ended_by(over: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        over.set()


def pages_of(content: bytearray) -> dict[int, bytes]:
    pages = range(len(content) // PAGE_BYTES)
    return {page: bytes(content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) for page in pages}


def test_an_epoch_has_what_was_written_before_its_seal(rig: EpochRig) -> None:
    rig.write(5 * PAGE_BYTES, b"a" * PAGE_BYTES)
    rig.write(3 * BLOCK_BYTES, b"b" * BLOCK_BYTES)
    rig.volume.seal()
    with pytest.raises(OSError, match="layer 2"):
        rig.volume.seal()
    blocks = rig.collect()
    assert {each.block for each in blocks} == {0, 3}
    assert rig.sealed_bytes(blocks) == {
        5: b"a" * PAGE_BYTES,
        **{48 + n: b"b" * PAGE_BYTES for n in range(16)},
    }
    rig.volume.clean(blocks)
    rig.volume.end_epoch()
    assert rig.dirty() == 0
    rig.volume.seal()
    assert rig.collect() == []
    rig.volume.end_epoch()


@pytest.mark.parametrize("collected_first", [False, True])
def test_what_is_written_after_the_seal_is_not_in_it(rig: EpochRig, collected_first: bool) -> None:
    rig.write(0, b"1" * BLOCK_BYTES)
    rig.write(BLOCK_BYTES, b"2" * PAGE_BYTES)
    before = pages_of(rig.content)
    rig.volume.seal()
    blocks = rig.collect() if collected_first else []
    rig.write(PAGE_BYTES, b"x" * PAGE_BYTES)
    rig.write(2 * PAGE_BYTES + 512, b"y" * 512)
    rig.write(2 * BLOCK_BYTES, b"z" * PAGE_BYTES)
    rig.door.discard(3 * PAGE_BYTES, PAGE_BYTES)
    rig.content[3 * PAGE_BYTES : 4 * PAGE_BYTES] = bytes(PAGE_BYTES)
    rig.door.discard(BLOCK_BYTES, BLOCK_BYTES)
    rig.content[BLOCK_BYTES : 2 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    rig.write(BLOCK_BYTES + PAGE_BYTES, b"w" * PAGE_BYTES)
    blocks = blocks or rig.collect()
    assert rig.sealed_bytes(blocks) == {page: before[page] for page in range(17)}
    assert rig.door.read(0, 4 * BLOCK_BYTES) == rig.content[: 4 * BLOCK_BYTES]
    rig.volume.clean(blocks)
    rig.volume.end_epoch()
    assert rig.door.read(0, 4 * BLOCK_BYTES) == rig.content[: 4 * BLOCK_BYTES]
    rig.volume.seal()
    fresh = rig.sealed_bytes(rig.collect())
    assert {1, 2, 17, 32} <= fresh.keys(), "what came after the seal is in the next epoch"
    assert all(data == pages_of(rig.content)[page] for page, data in fresh.items())
    rig.volume.end_epoch()


def test_a_discard_after_the_seal_is_not_cleaned_with_its_epoch(rig: EpochRig) -> None:
    """Over a base it is something to keep: zeros that the base does not have."""
    door = LocalDoor(rig.engine, rig.rig.layer, volume=rig.volume, queue_depth=4)
    door.write(0, b"a" * BLOCK_BYTES)
    rig.volume.seal()
    door.discard(PAGE_BYTES, PAGE_BYTES)
    blocks = rig.collect()
    assert [each.dirty for each in blocks] == [0xFFFF]
    rig.volume.clean(blocks)
    rig.volume.end_epoch()
    assert next(_dirty(rig.volume.peek_row(0))) == 0b10
    assert door.read(PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)
    door.drain()
    door.quit()
    door.close()


def test_slots_that_only_the_epoch_has_come_back_after_a_commit(rig: EpochRig) -> None:
    free = rig.engine.stats()["free"]
    for round_ in range(5):
        for block in range(10):
            rig.write(block * BLOCK_BYTES, bytes([round_]) * BLOCK_BYTES)
        rig.volume.seal()
        for block in range(10):
            rig.write(block * BLOCK_BYTES, bytes([round_ + 50]) * PAGE_BYTES)
        assert rig.engine.stats()["free"] == free - 20
        rig.volume.end_epoch()
        assert rig.engine.stats()["quarantined"] == 10
        rig.engine.commit_begin()
        rig.engine.commit_end(ok=True)
        assert rig.engine.stats()["free"] == free - 10


def test_writers_and_readers_beside_seals_see_what_they_wrote(tmp_path: Path) -> None:
    """Every epoch has all writes that were complete at its seal, whole, and none that had not begun: each
    thread's pages carry a counter that only grows."""
    rig = EpochRig(tmp_path, slots=200)
    began, ended = [0] * 6, [0] * 6
    over = threading.Event()
    wrong: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        count = 0
        last: dict[int, int] = {}
        while not over.is_set():
            count += 1
            page = chance.randrange(BLOCKS * 16 // 6) * 6 + number
            began[number] = count
            rig.door.write(page * PAGE_BYTES, count.to_bytes(8, "little") * (PAGE_BYTES // 8))
            last[page] = count
            ended[number] = count
            page = chance.choice(list(last))
            data = rig.door.read(page * PAGE_BYTES, PAGE_BYTES)
            if data != last[page].to_bytes(8, "little") * (PAGE_BYTES // 8):
                wrong.append(f"page {page} has {data[:8].hex()}, not {last[page]}")

    with ThreadPoolExecutor(6) as pool, ended_by(over):
        threads = [pool.submit(work, number) for number in range(6)]
        known: dict[int, int] = {}
        rounds, deadline_s = 0, time.monotonic() + TIMEOUT_S
        while rounds < 40 or not rig.door.stats()["moved"]:
            assert time.monotonic() < deadline_s, "no write met a sealed block"
            rounds += 1
            complete = list(ended)
            rig.volume.seal()
            most = list(began)
            blocks = rig.collect()
            for page, data in rig.sealed_bytes(blocks).items():
                value = int.from_bytes(data[:8], "little")
                if data != data[:8] * (PAGE_BYTES // 8) or value > most[page % 6]:
                    wrong.append(f"epoch: page {page} has {data[:8].hex()}, {most} had begun")
                known[page] = value
            if any(
                max((v for p, v in known.items() if p % 6 == n), default=0) < complete[n] for n in range(6)
            ):
                wrong.append(f"epoch: writes of {complete} are not in it")
            rig.volume.clean(blocks)
            rig.volume.end_epoch()
            rig.engine.commit_begin()
            rig.engine.commit_end(ok=True)
        over.set()
        for thread in threads:
            thread.result(TIMEOUT_S)
    assert wrong == []
    rig.close()
