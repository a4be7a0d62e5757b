"""Records of the journal that are under way: nobody is answered before they are durable, and none is begun
while a commit takes its copies. A pipe is in the journal's place, so that a test says when a record lands."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EIO
from pathlib import Path

import pytest

from tests.engine_rig import TIMEOUT_S, Rig
from tierblk.cache import journal
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, LocalDoor, map_bytes

SIZE_BYTES = 300 * BLOCK_BYTES
RING_BYTES = 1 << 20
WORDS = b"w" * PAGE_BYTES


class JournalRig:
    """An engine with a volume, two doors to it, and a journal that takes nothing before `land`."""

    def __init__(self, folder: Path, journal_path: str | None = None) -> None:
        self._rig = Rig(folder, bytes(BLOCK_BYTES), 300)
        self.engine = self._rig.engine
        self._map = (folder / "volume.map").open("w+b")
        self._map.truncate(map_bytes(SIZE_BYTES))
        self.volume = self.engine.open_layer(2, self._map.fileno(), SIZE_BYTES, kind="local")
        self._from, self._to = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._full = 0
        while True:
            try:
                self._full += os.write(self._to, bytes(PAGE_BYTES))
            except BlockingIOError:
                break
        if journal_path is not None:
            os.close(self._to)
            self._to = os.open(journal_path, os.O_RDWR | os.O_CLOEXEC)
        self.engine.open_journal(self._to, PAGE_BYTES, RING_BYTES, 7)
        self.doors = [LocalDoor(self.engine, None, volume=self.volume, queue_depth=8) for _ in range(2)]
        self.pool = ThreadPoolExecutor(8)

    def flush(self, door: int = 0) -> Future[None]:
        return self.pool.submit(self.doors[door].flush)

    def land(self) -> bytes:
        """Everything that was written so far and waits, and what follows it at once."""
        found = bytearray()
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(found) <= self._full and time.monotonic() < deadline_s:
            try:
                found += os.read(self._from, 1 << 20)
            except BlockingIOError:
                threading.Event().wait(0.001)
        records, self._full = bytes(found[self._full :]), 0
        return records

    def land_one(self) -> None:
        """The record that waits lands, and the next one waits: the pipe is as full as before."""
        os.read(self._from, PAGE_BYTES)

    def land_some(self) -> None:
        try:
            os.read(self._from, 1 << 20)
        except BlockingIOError:
            threading.Event().wait(0.001)

    def end_commit_flushes(self) -> None:
        """What Python does at FLUSH, without a commit."""
        self.engine.poll()
        self.engine.end_flushes(self.engine.take_flushes())

    def break_off(self) -> None:
        """The journal's medium is gone."""
        os.close(self._from)
        self._from = -1

    def counted(self, name: str) -> int:
        return sum(door.stats()[name] for door in self.doors)

    def close(self) -> None:
        for door in self.doors:
            door.drain()
            door.quit()
            door.close()
        self.pool.shutdown()
        self._rig.close()
        self._map.close()
        for descriptor in (self._from, self._to):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[JournalRig]:
    rig = JournalRig(tmp_path)
    yield rig
    rig.close()


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)


def rows_of(records: bytes) -> list[list[int]]:
    return [[row for _, row, _ in rows] for _, _, _, rows in journal.records(bytes(PAGE_BYTES) + records)]


@pytest.mark.parametrize("door", [0, 1])
def test_r7_a_flush_without_changes_waits_for_the_record_that_has_them(rig: JournalRig, door: int) -> None:
    """Its write was completed before it came, and is durable only with the record of an earlier FLUSH."""
    rig.doors[0].write(0, WORDS)
    first = rig.flush()
    wait_for(lambda: rig.counted("flush_records") == 1)
    second = rig.flush(door)
    wait_for(lambda: rig.counted("waiting") == 2)
    assert not first.done()
    assert not second.done()
    assert rows_of(rig.land()) == [[0]]
    for flush in (first, second):
        flush.result(TIMEOUT_S)
    assert rig.counted("flush_records") == 1


def test_who_comes_meanwhile_shares_the_next_record(rig: JournalRig) -> None:
    rig.doors[0].write(0, WORDS)
    first = rig.flush()
    wait_for(lambda: rig.counted("flush_records") == 1)
    for row in (1, 2):
        rig.doors[row % 2].write(row * 64 * BLOCK_BYTES, WORDS)
    later = [rig.flush(door % 2) for door in range(4)]
    wait_for(lambda: rig.counted("waiting") == 5)
    rig.land()
    for flush in (first, *later):
        flush.result(TIMEOUT_S)
    assert rig.counted("flush_records") == 2


def test_r6_no_record_is_begun_while_a_commit_takes_its_copies(rig: JournalRig) -> None:
    """Nobody could say which of the two copies of a row is newer."""
    rig.engine.commit_begin()
    rig.doors[0].write(0, WORDS)
    flush = rig.flush()
    wait_for(lambda: rig.counted("flush_commits") == 1)
    assert rig.counted("flush_records") == 0
    assert rig.engine.commit_taken() == 0
    rig.engine.commit_end(True)
    taken = rig.engine.take_flushes()
    rig.engine.end_flushes(taken)
    flush.result(TIMEOUT_S)
    second = rig.flush()
    wait_for(lambda: rig.counted("flush_records") == 1)
    rig.land()
    second.result(TIMEOUT_S)


def test_r7_a_record_that_fails_is_an_error_of_all_it_covers_and_of_all_later_ones(rig: JournalRig) -> None:
    rig.doors[0].write(0, WORDS)
    flushes = [rig.flush()]
    wait_for(lambda: rig.counted("flush_records") == 1)
    flushes.append(rig.flush(1))
    wait_for(lambda: rig.counted("waiting") == 2)
    rig.break_off()
    flushes.append(rig.flush())
    for flush in flushes:
        with pytest.raises(OSError, match="Input/output error") as caught:
            flush.result(TIMEOUT_S)
        assert caught.value.errno == EIO
    assert rig.engine.flushes_failed()
    assert rig.counted("flush_records") == 1, "a later one would make the failed one a hole before it"


def test_a_door_that_leaves_hands_on_who_waits_for_the_next_record(rig: JournalRig) -> None:
    """It led for another, and a third came; then it was closed."""
    rig.doors[0].write(0, WORDS)
    first = rig.flush()
    wait_for(lambda: rig.counted("flush_records") == 1)
    rig.doors[1].write(64 * BLOCK_BYTES, WORDS)
    second = rig.flush(1)
    wait_for(lambda: rig.counted("waiting") == 2)
    rig.doors[0].drain()
    rig.doors[0].quit()
    rig.land_one()
    first.result(TIMEOUT_S)
    wait_for(lambda: rig.counted("flush_records") == 2)
    rig.doors[1].write(128 * BLOCK_BYTES, WORDS)
    third = rig.flush(1)
    wait_for(lambda: rig.counted("waiting") == 2)
    while not (second.done() and third.done()):
        rig.land_some()
        rig.end_commit_flushes()


@pytest.mark.parametrize("door", [0, 1])
def test_r7_without_room_for_a_record_everybody_waits_for_a_commit(tmp_path: Path, door: int) -> None:
    """Also a FLUSH that comes later and finds nothing changed: what came before it is in no record."""
    rig = JournalRig(tmp_path, journal_path="/dev/full")
    try:
        rig.doors[0].write(0, WORDS)
        first = rig.flush()
        wait_for(lambda: rig.counted("flush_commits") == 1)
        second = rig.flush(door)
        wait_for(lambda: rig.counted("flush_commits") == 2 or second.done())
        assert not first.done()
        assert not second.done()
        rig.end_commit_flushes()
        for flush in (first, second):
            flush.result(TIMEOUT_S)
        assert not rig.engine.flushes_failed()
    finally:
        rig.end_commit_flushes()
        rig.close()


def test_a_door_that_leaves_ends_its_record_first(rig: JournalRig) -> None:
    """Others wait for it."""
    rig.doors[0].write(0, WORDS)
    first = rig.flush()
    wait_for(lambda: rig.counted("flush_records") == 1)
    second = rig.flush(1)
    wait_for(lambda: rig.counted("waiting") == 2)
    rig.doors[0].drain()
    rig.doors[0].quit()
    assert not second.done()
    rig.land()
    first.result(TIMEOUT_S)
    second.result(TIMEOUT_S)
