"""What the core records of each request while somebody reads it."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine_rig import TIMEOUT_S, Rig
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Layer, LocalDoor, Trace, Traced, map_bytes, ticks_now
from tierblk.core._core import ffi, lib
from tierblk.core.traces import RECORDS
from tierblk.latency import OPERATIONS, TIERS

BLOCKS = 24
ZERO_BLOCK = 9
IMAGE = random.Random(3).randbytes(BLOCKS * BLOCK_BYTES)
IMAGE = IMAGE[: ZERO_BLOCK * BLOCK_BYTES] + bytes(BLOCK_BYTES) + IMAGE[(ZERO_BLOCK + 1) * BLOCK_BYTES :]
VOLUME = 2
MANY_BLOCKS = 1024
CORE = ROOT / "tierblk" / "core"
SMALL = "TB_TRACE_RECORDS 8"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 64, hot_bytes=8 * BLOCK_BYTES)
    yield rig
    rig.close()


@pytest.fixture
def layer(rig: Rig, tmp_path: Path) -> Iterator[Layer]:
    """A volume of 64 MiB."""
    size_bytes = MANY_BLOCKS * BLOCK_BYTES
    with (tmp_path / "volume.map").open("w+b") as file:
        os.truncate(file.fileno(), map_bytes(size_bytes))
        yield rig.engine.open_layer(VOLUME, file.fileno(), size_bytes, kind="scratch")


@pytest.fixture
def volume(rig: Rig, layer: Layer) -> Iterator[LocalDoor]:
    """The volume over the image."""
    door = LocalDoor(rig.engine, rig.layer, volume=layer)
    yield door
    door.drain()
    door.quit()
    door.close()


def shown(records: list[Traced]) -> list[tuple[str | None, str | None, int, int, int]]:
    """(operation, tier, offset, length, error) of each."""
    return [
        (
            OPERATIONS[each.op],
            TIERS[each.tier] if each.tier < len(TIERS) else None,
            each.offset_bytes,
            each.length_bytes,
            each.error,
        )
        for each in records
    ]


def all_of(trace: Trace) -> list[Traced]:
    records, lost = trace.read(RECORDS)
    assert lost == 0
    return records


def test_every_read_is_there_once_with_its_tier(rig: Rig) -> None:
    trace = rig.door.trace()
    before = ticks_now()
    rig.finish(rig.read(512, 2 * BLOCK_BYTES))
    rig.finish(rig.read(ZERO_BLOCK * BLOCK_BYTES, 4096))
    missed = all_of(trace)
    assert sorted(shown(missed)) == [
        ("read", "miss", 512, BLOCK_BYTES - 512, 0),
        ("read", "miss", BLOCK_BYTES, BLOCK_BYTES, 0),
        ("read", "miss", 2 * BLOCK_BYTES, 512, 0),
        ("read", "miss", ZERO_BLOCK * BLOCK_BYTES, 4096, 0),
    ]
    for _ in range(3):
        rig.finish(rig.read(BLOCK_BYTES, BLOCK_BYTES))
    rig.finish(rig.read(ZERO_BLOCK * BLOCK_BYTES + 512, 1024))
    served = all_of(trace)
    assert shown(served) == [
        ("read", "hit", BLOCK_BYTES, BLOCK_BYTES, 0),
        ("read", "hit", BLOCK_BYTES, BLOCK_BYTES, 0),
        ("read", "memory", BLOCK_BYTES, BLOCK_BYTES, 0),
        ("read", "zero", ZERO_BLOCK * BLOCK_BYTES + 512, 1024, 0),
    ]
    for each in missed + served:
        assert before <= each.began
        assert each.took > 0
        assert each.began + each.took <= ticks_now()
    assert all_of(trace) == []
    trace.close()


def test_a_read_that_fails_says_why(rig: Rig) -> None:
    trace = rig.door.trace()
    read = rig.read(0, 4096)
    rig.settle()
    rig.fail(0, errno=5)
    with pytest.raises(OSError, match="Input/output"):
        read.result(TIMEOUT_S)
    assert shown(all_of(trace)) == [("read", "miss", 0, 4096, 5)]
    trace.close()


def test_writes_flushes_and_discards_are_as_they_were_asked_for(rig: Rig, volume: LocalDoor) -> None:
    """Also a write of part of a page, which reads the rest of it first; a discard of many slices; a write of
    zeros whose edges are writes of their own."""
    volume.write(PAGE_BYTES, bytes(2 * PAGE_BYTES))  # of the volume: its pages need no base
    trace = volume.trace()
    volume.write(BLOCK_BYTES - 4096, b"w" * 8192, fua=True)
    volume.write(PAGE_BYTES + 512, b"p" * 1024)
    volume.flush()
    volume.discard(30 * BLOCK_BYTES + 512, 900 * BLOCK_BYTES)
    volume.write_zeroes(PAGE_BYTES + 1024, 512)
    assert volume.read(PAGE_BYTES, 4096)[512:1024] == b"p" * 512
    records = all_of(trace)
    assert shown(records) == [
        ("write", "write", BLOCK_BYTES - 4096, 4096, 0),
        ("write", "write", BLOCK_BYTES, 4096, 0),
        ("write", "write", PAGE_BYTES + 512, 1024, 0),
        ("flush", "flush", 0, 0, 0),
        ("discard", None, 30 * BLOCK_BYTES + 512, 900 * BLOCK_BYTES, 0),
        ("zeroes", None, PAGE_BYTES + 1024, 512, 0),
        ("read", "hit", PAGE_BYTES, 4096, 0),
    ]
    assert [each.fua for each in records] == [True, True, *[False] * 5]
    trace.close()


def test_what_is_not_acknowledged_any_more_is_there_with_its_error(volume: LocalDoor, layer: Layer) -> None:
    trace = volume.trace()
    layer.refuse(30)
    with pytest.raises(OSError, match="Read-only"):
        volume.write(BLOCK_BYTES, bytes(512))
    with pytest.raises(OSError, match="Read-only"):
        volume.discard(BLOCK_BYTES, 4096)
    layer.refuse(0)
    assert shown(all_of(trace)) == [
        ("write", "write", BLOCK_BYTES, 512, 30),
        ("discard", None, BLOCK_BYTES, 4096, 30),
    ]
    trace.close()


def test_only_what_is_wanted_is_given(rig: Rig, volume: LocalDoor) -> None:
    ops, tiers = 1 << OPERATIONS.index("write"), 1 << TIERS.index("zero")
    traces = {
        "all": volume.trace(),
        "writes": volume.trace(ops=ops),
        "zeros": volume.trace(tiers=tiers),
        "slow": volume.trace(min_ticks=1 << 62),
        "range": volume.trace(within=(100 * BLOCK_BYTES, 101 * BLOCK_BYTES)),
    }
    for at in (99, 100, 101):
        volume.write(at * BLOCK_BYTES, bytes(BLOCK_BYTES))
    volume.discard(40 * BLOCK_BYTES, 100 * BLOCK_BYTES)
    volume.read(200 * BLOCK_BYTES, 4096)
    volume.flush()
    found = {
        name: [(op, at // BLOCK_BYTES) for op, _, at, _, _ in shown(all_of(t))] for name, t in traces.items()
    }
    assert found["all"] == [
        ("write", 99), ("write", 100), ("write", 101), ("discard", 40), ("read", 200), ("flush", 0)
    ]  # fmt: skip
    assert found["writes"] == [("write", 99), ("write", 100), ("write", 101)]
    assert found["zeros"] == [("read", 200)]
    assert found["slow"] == []
    assert found["range"] == [("write", 100), ("discard", 40)]
    for trace in traces.values():
        trace.close()


def test_what_is_written_over_before_it_is_read_is_counted(volume: LocalDoor) -> None:
    slow, fast = volume.trace(), volume.trace()
    buffer = ffi.new("uint8_t[]", 100 * BLOCK_BYTES)  # Door.read makes a new one each time
    seen = 0
    for _ in range(200):
        assert not lib.tb_local_read(volume.queues[0], 24 * BLOCK_BYTES, len(buffer), buffer)
        seen += len(all_of(fast))
    assert seen == 20_000
    records, lost = slow.read(30_000)
    assert len(records) + lost == 20_000
    assert RECORDS - 1 <= len(records) <= RECORDS
    assert records[-1].offset_bytes == 123 * BLOCK_BYTES
    assert slow.read(1) == ([], 0)
    slow.close()
    fast.close()


def test_it_is_on_while_somebody_reads_and_a_new_reader_sees_nothing_old(volume: LocalDoor) -> None:
    first = volume.trace()
    volume.flush()
    second = volume.trace()
    volume.flush()
    assert (len(all_of(first)), len(all_of(second))) == (2, 1)
    first.close()
    first.close()
    volume.flush()
    assert len(all_of(second)) == 1
    second.close()
    volume.flush()
    third = volume.trace()
    assert all_of(third) == []
    third.close()


def test_no_more_than_asked_for_at_once(volume: LocalDoor) -> None:
    trace = volume.trace()
    volume.read(24 * BLOCK_BYTES, 1000 * BLOCK_BYTES)
    pieces = [len(trace.read(300)[0]) for _ in range(5)]
    assert pieces == [300, 300, 300, 100, 0]
    trace.close()


def test_switched_on_and_off_while_requests_run(rig: Rig, volume: LocalDoor) -> None:
    """Every record is whole, of one request that there was, whatever the moment at which it began to be
    read; and what one reader has not lost is complete."""
    over = threading.Event()

    def work(seed: int) -> int:
        chance = random.Random(seed)
        turns = 0
        while not over.is_set():
            volume.read((24 + chance.randrange(500)) * BLOCK_BYTES, chance.randint(1, 64) * BLOCK_BYTES)
            volume.flush()
            turns += 1
        return turns

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, seed) for seed in range(3)]
        kinds: Counter[tuple[str | None, str | None, int]] = Counter()
        try:
            for turn in range(1500):
                traces = [volume.trace() for _ in range(1 + turn % 2)]
                for _ in range(turn % 4):
                    for trace in traces:
                        for op, tier, offset, length, error in shown(trace.read(500)[0]):
                            assert error == 0
                            assert offset % BLOCK_BYTES == 0
                            kinds[op, tier, length] += 1
                for trace in traces:
                    trace.close()
        finally:
            over.set()
        assert all(worker.result(TIMEOUT_S) for worker in workers)
    assert set(kinds) == {("read", "zero", BLOCK_BYTES), ("flush", "flush", 0)}


def test_one_who_reads_all_the_time_misses_nothing(volume: LocalDoor) -> None:
    trace = volume.trace()
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(volume.read, (24 + 100 * worker) * BLOCK_BYTES, 100 * BLOCK_BYTES)
            for worker in range(4)
            for _ in range(10)
        ]
        found: Counter[int] = Counter()
        while not all(call.done() for call in calls):
            found.update(each.offset_bytes // BLOCK_BYTES for each in all_of(trace))
        found.update(each.offset_bytes // BLOCK_BYTES for each in all_of(trace))
    assert found == dict.fromkeys(range(24, 424), 10)
    trace.close()


def test_a_trace_may_be_closed_after_its_door(rig: Rig) -> None:
    door = LocalDoor(rig.engine, rig.layer)
    trace = door.trace()
    door.drain()
    door.quit()
    door.close()
    trace.close()
    with pytest.raises(ValueError, match="closed"):
        door.trace()


def test_what_is_written_over_while_it_is_copied_is_not_given(tmp_path: Path) -> None:
    """With a ring of eight records, and a writer that is always about to write over what is copied; switched
    on and off all the time."""
    for path in [*CORE.glob("*.h"), CORE / "trace.c", Path(__file__).with_name("trace_race.c")]:
        (tmp_path / path.name).write_text(path.read_text().replace(f"TB_TRACE_RECORDS {RECORDS}", SMALL))
    program = tmp_path / "race"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-pthread"]
    subprocess.run(["gcc", *flags, tmp_path / "trace_race.c", "-o", program], check=True, timeout=60)
    done = subprocess.run([program, "10000000"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    turns, read, lost = map(int, done.stdout.split())
    assert min(turns, read, lost) > 0
