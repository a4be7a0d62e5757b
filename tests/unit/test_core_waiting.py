"""Waiting in the engine: readahead that nobody waits for yet, patience, giving up, the watchdog, and writes
in runs."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_rig import TIMEOUT_S, Rig
from tierblk.core import (
    BLOCK_BYTES,
    FILL,
    FILL_WHOLE,
    FILL_WHOLE_MORE,
    GIVE_UP,
    PAGE_BYTES,
    PREFETCH,
    READ_ON,
    WAITED,
    Record,
)

BLOCKS = 40
IMAGE = random.Random(5).randbytes(BLOCKS * BLOCK_BYTES)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 60)
    yield rig
    rig.close()


def prefetch(rig: Rig, block: int, count: int, mark: int = 0xFFFF) -> None:
    rig.engine.push([Record(PREFETCH, layer=1, block=block, value=count, pages=mark)])


def kinds(rig: Rig) -> list[tuple[int, int]]:
    return [(event.kind, event.block) for event in rig.told]


def window(rig: Rig, first: int, count: int, place: int, *, last_more: bool = False) -> None:
    """The whole blocks of one window, in staging from `place` on, in one batch of commands."""
    at, length = place * BLOCK_BYTES, count * BLOCK_BYTES
    rig.engine.staging[at : at + length] = rig.image[first * BLOCK_BYTES :][:length]
    rig.finals |= set(range(first, first + count))
    rig.engine.push(
        Record(
            FILL,
            layer=1,
            token=rig.asked[first + i].token,
            block=first + i,
            value=at + i * BLOCK_BYTES,
            result=FILL_WHOLE if i == count - 1 and not last_more else FILL_WHOLE_MORE,
            pages=0xFFFF,
        )
        for i in range(count)
    )


def test_readahead_fills_what_is_missing_and_tells_of_its_first_reader(rig: Rig) -> None:
    rig.finish(rig.read(4 * BLOCK_BYTES, PAGE_BYTES))
    rig.told.clear()
    prefetch(rig, 2, 6, mark=1)
    rig.until(lambda: len(rig.asked) == 5)
    assert {event.result for event in rig.asked.values()} == {1}
    assert set(rig.asked) == {2, 3, 5, 6, 7}
    read = rig.read(3 * BLOCK_BYTES, PAGE_BYTES)
    rig.until(lambda: len(rig.told) == 2)
    assert sorted(kinds(rig)) == [(WAITED, 3), (READ_ON, 3)]
    rig.finish(read)
    assert read.result() == rig.expect(3 * BLOCK_BYTES, PAGE_BYTES)
    again = rig.read(3 * BLOCK_BYTES, PAGE_BYTES)
    rig.finish(again)
    assert len(rig.told) == 2, "a mark is told of once"


def test_a_mark_on_a_cached_block_is_told_of_by_a_hit(rig: Rig) -> None:
    rig.finish(rig.read(0, BLOCK_BYTES))
    prefetch(rig, 0, 1, mark=0)
    rig.obeyed()
    assert rig.read(0, 512).result(TIMEOUT_S) == rig.expect(0, 512)
    rig.until(lambda: kinds(rig) == [(READ_ON, 0)])


def test_readahead_beyond_the_end_and_of_no_layer_is_nothing(rig: Rig) -> None:
    prefetch(rig, BLOCKS - 1, 1 << 40)
    rig.engine.push([Record(PREFETCH, layer=9, block=0, value=4), Record(PREFETCH, layer=65535, value=4)])
    prefetch(rig, 1 << 60, 4)
    rig.obeyed()
    assert set(rig.asked) == {BLOCKS - 1}
    rig.settle_all()


def test_a_late_reader_gets_staged_bytes_before_they_are_written(rig: Rig) -> None:
    """A block that waits for its neighbours to be written with them keeps no reader waiting."""
    prefetch(rig, 0, 2)
    rig.until(lambda: len(rig.asked) == 2)
    window(rig, 0, 1, 5, last_more=True)
    rig.obeyed()
    assert rig.engine.stats()["slot_write_calls"] == 0
    assert rig.read(0, BLOCK_BYTES).result(TIMEOUT_S) == rig.expect(0, BLOCK_BYTES)
    assert rig.engine.stats()["slot_writes"] == 0
    rig.settle_all()


def test_a_window_is_written_in_runs_of_neighbouring_slots(rig: Rig) -> None:
    prefetch(rig, 0, 20)
    rig.until(lambda: len(rig.asked) == 20)
    window(rig, 0, 20, 3)
    rig.settle_all()
    stats = rig.engine.stats()
    assert (stats["slot_writes"], stats["slot_write_calls"]) == (20, 2)  # 1 MiB and the rest
    slots = [rig.entries()[block][0] for block in range(20)]
    assert slots == list(range(slots[0], slots[0] + 20))
    assert rig.read(0, 20 * BLOCK_BYTES).result(TIMEOUT_S) == rig.expect(0, 20 * BLOCK_BYTES)


def test_runs_of_two_windows_that_arrive_mixed_stay_apart(rig: Rig) -> None:
    prefetch(rig, 0, 8)
    rig.until(lambda: len(rig.asked) == 8)
    for i in range(4):
        window(rig, i, 1, 10 + i, last_more=i < 3)
        window(rig, 4 + i, 1, 20 + i, last_more=i < 3)
        rig.obeyed()
    rig.settle_all()
    assert rig.engine.stats()["slot_write_calls"] == 2
    assert rig.read(0, 8 * BLOCK_BYTES).result(TIMEOUT_S) == rig.expect(0, 8 * BLOCK_BYTES)


def test_a_disk_that_has_nothing_to_do_is_not_passed_by(rig: Rig) -> None:
    """Half of the staging memory's 64 places are in runs that wait for the network: no slow disk."""
    prefetch(rig, 0, 34)
    rig.until(lambda: len(rig.asked) == 34)
    for first, place in ((0, 0), (11, 20), (22, 40)):
        window(rig, first, 11, place, last_more=True)
    rig.obeyed()
    assert rig.engine.stats()["slot_write_calls"] == 0
    slow_s = time.monotonic() + 0.6  # a disk that has not written anything for so long is slow
    rig.until(lambda: time.monotonic() >= slow_s)
    window(rig, 33, 1, 60)
    rig.settle_all()
    stats = rig.engine.stats()
    assert (stats["slot_writes"], stats["passed_blocks"]) == (34, 0)


def test_a_run_whose_rest_failed_or_never_comes_is_written(rig: Rig) -> None:
    prefetch(rig, 0, 3)
    rig.until(lambda: len(rig.asked) == 3)
    window(rig, 0, 1, 5, last_more=True)
    rig.fail(1)
    rig.until(lambda: set(rig.asked) == {2})
    assert rig.engine.stats()["slot_writes"] == 1
    window(rig, 2, 1, 9, last_more=True)
    rig.until(lambda: not rig.asked)  # after a second without its neighbour
    assert rig.engine.stats()["slot_writes"] == 2


def test_few_slots_are_free_here_and_there(tmp_path: Path) -> None:
    """A run takes what neighbours there are, and what finds no slot passes through."""
    rig = Rig(tmp_path, IMAGE, 11)
    rig.finish(rig.read(0, 10 * BLOCK_BYTES))
    assert rig.evict(7) == 7
    rig.commit()
    prefetch(rig, 20, 10)
    rig.until(lambda: len(rig.asked) == 10)
    window(rig, 20, 10, 0)
    rig.settle_all()
    assert rig.engine.stats()["free"] == 0
    assert rig.engine.stats()["passed_blocks"] == 3
    held = [entry[0] for entry in rig.entries().values() if entry[0]]
    assert sorted(held) == list(range(1, 11))
    read = rig.read(20 * BLOCK_BYTES, 10 * BLOCK_BYTES)
    rig.finish(read)
    assert read.result() == rig.expect(20 * BLOCK_BYTES, 10 * BLOCK_BYTES)
    rig.close()


def test_patience_ends_in_an_error_and_the_fill_goes_on(rig: Rig) -> None:
    rig.door.set_patience(0.3)
    read = rig.read(0, PAGE_BYTES)
    rig.until(lambda: 0 in rig.asked)
    rig.until(read.done)
    with pytest.raises(OSError, match="Input/output error"):
        read.result()
    assert rig.engine.stats()["expired"] == 1
    rig.door.set_patience(math.inf)
    late = rig.read(0, PAGE_BYTES)
    rig.finish(late)
    assert late.result() == rig.expect(0, PAGE_BYTES)


def test_giving_up_concerns_fail_fast_doors_only(rig: Rig) -> None:
    patient = rig.read(0, PAGE_BYTES)
    rig.until(lambda: 0 in rig.asked)
    rig.engine.push([Record(GIVE_UP, token=rig.asked[0].token, result=-113)])
    rig.obeyed()
    assert not patient.done()
    rig.door.set_patience(0)
    hasty = rig.read(PAGE_BYTES, PAGE_BYTES)
    with pytest.raises(OSError, match="No route to host"):  # of a fill that was given up already
        hasty.result(TIMEOUT_S)
    rig.engine.push([Record(GIVE_UP, token=rig.asked[0].token, result=-5)])
    with pytest.raises(OSError, match="Input/output error"):
        patient.result(TIMEOUT_S)
    rig.settle_all()


def test_how_long_the_oldest_waits(rig: Rig) -> None:
    assert rig.door.stats()["oldest_wait_ms"] == 0
    read = rig.read(0, PAGE_BYTES)
    rig.until(lambda: rig.door.stats()["oldest_wait_ms"] > 20)
    rig.finish(read)
    rig.until(lambda: rig.door.stats()["oldest_wait_ms"] == 0)


def test_what_several_ask_of_a_block_at_once_is_one_miss(rig: Rig) -> None:
    """Requests that come before their MISS is told are in it; its pages are what all of them want."""
    reads = [rig.read(page * PAGE_BYTES, PAGE_BYTES) for page in range(4)]
    rig.finish(*reads)
    for page, read in enumerate(reads):
        assert read.result() == rig.expect(page * PAGE_BYTES, PAGE_BYTES)


_SILENT = """
import sys, pathlib, tempfile
sys.path.insert(0, {root!r})
from tests.engine_rig import Rig
directory = pathlib.Path(tempfile.mkdtemp())
rig = Rig(directory, bytes(65536), 8, map_directory=directory)
rig.engine.set_watchdog({limit_s})
read = rig.read(0, 512)
{then}
read.result({wait_s})
"""


_SILENT_WRITER = """\
import os, pathlib, sys, tempfile
sys.path.insert(0, {root!r})
from tierblk.core import BLOCK_BYTES, Engine, LocalDoor, map_bytes
folder = pathlib.Path(tempfile.mkdtemp())
def file(name, size):
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    return fd
slots, sums = file("slots", 9 * BLOCK_BYTES), file("sums", 9 * 64)
engine = Engine(slots_fd=slots, slot_count=9, sums_fd=sums, staging_bytes=BLOCK_BYTES)
size = 64 * BLOCK_BYTES
volume = engine.open_layer(1, file("map", map_bytes(size)), size, kind={kind!r})
engine.finish_load()
engine.set_watchdog(0.6)
door = LocalDoor(engine, None, volume=volume)
for block in range({blocks}):
    door.write(block * BLOCK_BYTES, bytes(4096))
volume.flush_far({kind!r} == "write-back")
door.flush()
"""


def run_source(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which the watchdog may end."""
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"TMPDIR": str(folder)},
    )


@pytest.mark.parametrize("beats", [False, True])
def test_the_watchdog_ends_a_silent_loop_only(beats: bool, tmp_path: Path) -> None:
    """Only while requests wait, and only a loop that says nothing for longer than the limit."""
    root = str(Path(__file__).parents[2])
    then = (
        "import time\nend = time.monotonic() + 1.5\n"
        "rig.until(lambda: (rig.engine.beat(), time.monotonic() > end)[1])\nrig.finish(read)"
        if beats
        else ""
    )
    source = _SILENT.format(root=root, limit_s=0.6, then=then, wait_s=TIMEOUT_S)
    ended = run_source(source, tmp_path)
    if beats:
        assert ended.returncode == 0, ended.stderr
    else:
        assert ended.returncode == -signal.SIGABRT, ended.stderr
        assert "the event loop has not answered" in ended.stderr


@pytest.mark.parametrize("what", ["a FLUSH", "a FLUSH of the store", "a write without a slot"])
def test_the_watchdog_knows_of_writers(what: str, tmp_path: Path) -> None:
    """They wait for a commit or an epoch, which a loop that has died will never run; no fill is under way."""
    root = str(Path(__file__).parents[2])
    blocks = 9 if what == "a write without a slot" else 1
    kind = "write-back" if what == "a FLUSH of the store" else "local"
    source = _SILENT_WRITER.format(root=root, blocks=blocks, kind=kind)
    ended = run_source(source, tmp_path)
    assert ended.returncode == -signal.SIGABRT, ended.stderr
    assert "the event loop has not answered" in ended.stderr
