"""The commit cycle on the real engine (R6, R7): what it contains, who shares it, what a failing disk does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from errno import EIO
from pathlib import Path

import pytest

from tests.cache_rig import (
    SLOTS,
    TIMEOUT_S,
    CacheRig,
    check_files,
    copy_cache,
    image_bytes,
    index_rows,
)
from tierblk.cache import commit as commit_module
from tierblk.cache.index import Rows
from tierblk.cache.room import VolumesLoad
from tierblk.cache.rows import entries_of
from tierblk.cache.start import StartMode
from tierblk.errors import CacheError

IMAGE = image_bytes(1, 200)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[CacheRig]:
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    yield rig
    await rig.end(clean=False)


class Gate:
    """A disk whose sync is as slow as the test wants: it stands in for os.fdatasync."""

    def __init__(self) -> None:
        self.syncs = 0
        self._loop = asyncio.get_running_loop()
        self._reached = asyncio.Event()
        self._open = threading.Event()

    def __call__(self, descriptor: int) -> None:
        self.syncs += 1
        self._loop.call_soon_threadsafe(self._reached.set)
        assert self._open.wait(TIMEOUT_S)
        os.fdatasync(descriptor)

    async def reached(self) -> None:
        """Until a cycle is at step 2."""
        await asyncio.wait_for(self._reached.wait(), TIMEOUT_S)

    def release(self) -> None:
        """This cycle and all later ones go on."""
        self._open.set()


def failing(error: OSError) -> Callable[[int], None]:
    def sync(descriptor: int) -> None:
        raise error

    return sync


def committed_blocks(tmp_path: Path) -> set[int]:
    """Blocks of the first layer that the index on disk says are cached."""
    layer, *_ = index_rows(copy_cache(tmp_path / "cache", tmp_path / "copy"))
    return {
        row * 64 + i
        for row, packed in layer.rows.items()
        for i, entry in enumerate(entries_of(packed))
        if entry.cached
    }


async def test_a_cycle_writes_the_rows_that_changed(rig: CacheRig, tmp_path: Path) -> None:
    layer = await rig.base(IMAGE)
    assert not rig.cache.changed()
    await rig.fill(layer, 0, 1, 63, 130)
    assert rig.cache.changed()
    report = await rig.cache.commit()
    assert (report.rows_written, report.rows_deleted) == (2, 0)
    assert not rig.cache.changed()
    assert committed_blocks(tmp_path) == {0, 1, 63, 130}
    report = await rig.cache.commit()
    assert (report.rows_written, report.rows_deleted) == (0, 0)
    await rig.evict(4)
    assert rig.cache.changed()
    report = await rig.cache.commit()
    assert (report.rows_written, report.rows_deleted) == (0, 2)
    assert rig.violations() == []


async def test_i5_slots_and_sums_are_synced_before_the_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the syncs of every day: the other tests have a gate in their place."""
    steps: list[str] = []

    def noting(sync: Callable[[int], None]) -> Callable[[int], None]:
        def noted(descriptor: int) -> None:
            sync(descriptor)
            steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

        return noted

    monkeypatch.setattr(os, "fdatasync", noting(os.fdatasync))
    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    await rig.fill(await rig.base(IMAGE), 0)
    write_rows = rig.cache._index.write_rows

    def write(rows: Rows, *_: object) -> tuple[int, int]:
        steps.append("rows")
        return write_rows(rows)

    monkeypatch.setattr(rig.cache._index, "write_rows", write)
    steps.clear()
    await rig.cache.commit()
    assert steps == ["slots", "sums", "rows"]
    await rig.end(clean=False)


async def test_many_rows_are_taken_in_batches(
    rig: CacheRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "BATCH_ROWS", 1)
    layer, other = await rig.base(IMAGE), await rig.base(IMAGE, "b")
    for block in range(0, 200, 64):
        await rig.fill(layer, block)
        await rig.fill(other, block)
    assert (await rig.cache.commit()).rows_written == 8
    assert rig.violations() == []


async def test_r6_what_comes_after_step_1_is_in_the_next_cycle(rig: CacheRig, tmp_path: Path) -> None:
    """I5: a row packed after the sync would name bytes that no sync has covered."""
    layer = await rig.base(IMAGE)
    await rig.fill(layer, 0)
    rig.cache.committer.sync_slots = gate = Gate()
    cycle = asyncio.create_task(rig.cache.commit())
    await gate.reached()
    await rig.fill(layer, 1)
    gate.release()
    await cycle
    assert committed_blocks(tmp_path) == {0}
    assert rig.cache.changed()
    await rig.cache.commit()
    assert committed_blocks(tmp_path) == {0, 1}


async def test_r6_slots_freed_during_a_cycle_wait_for_the_next(rig: CacheRig) -> None:
    await rig.fill(await rig.base(IMAGE), *range(10))
    await rig.cache.commit()
    await rig.evict(2)
    rig.cache.committer.sync_slots = gate = Gate()
    cycle = asyncio.create_task(rig.cache.commit())
    await gate.reached()
    await rig.evict(3)
    gate.release()
    await cycle
    stats = rig.cache.stats()
    assert (stats["free"], stats["quarantined"]) == (SLOTS - 1 - 8, 3)
    await rig.cache.commit()
    assert rig.cache.stats()["quarantined"] == 0


async def test_r7_who_comes_during_a_cycle_shares_the_next(rig: CacheRig) -> None:
    layer = await rig.base(IMAGE)
    await rig.fill(layer, 0)
    rig.cache.committer.sync_slots = gate = Gate()
    first = asyncio.create_task(rig.cache.commit())
    await gate.reached()
    await rig.fill(layer, 100)
    later = [asyncio.create_task(rig.cache.commit()) for _ in range(5)]
    gate.release()
    reports = await asyncio.gather(*later)
    assert gate.syncs == 2
    assert all(report is reports[0] for report in reports)
    assert (await first).rows_written == reports[0].rows_written == 1
    together = await asyncio.gather(*(rig.cache.commit() for _ in range(5)))
    assert gate.syncs == 3
    assert all(report is together[0] for report in together)


async def test_a_caller_that_is_cancelled_stops_nobody(rig: CacheRig, tmp_path: Path) -> None:
    await rig.fill(await rig.base(IMAGE), 0)
    rig.cache.committer.sync_slots = gate = Gate()
    first, second = (asyncio.create_task(rig.cache.commit()) for _ in range(2))
    await gate.reached()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.release()
    assert (await second).rows_written == 1
    assert committed_blocks(tmp_path) == {0}


@pytest.mark.parametrize("which", ["sync_slots", "sync_sums"])
async def test_r7_a_failed_sync_is_the_last_one(rig: CacheRig, tmp_path: Path, which: str) -> None:
    """The kernel tells of a lost write once; a second sync would succeed and the index would name nothing."""
    layer = await rig.base(IMAGE)
    await rig.fill(layer, *range(5))
    await rig.cache.commit()
    await rig.evict(2)
    await rig.fill(layer, 100)
    kept = committed_blocks(tmp_path)
    before = rig.cache.stats()
    healthy = getattr(rig.cache.committer, which)
    setattr(rig.cache.committer, which, failing(OSError(EIO, os.strerror(EIO))))
    message = r"^the cache's slots could not be synced \(Input/output error\); nothing more is recorded"
    with pytest.raises(CacheError, match=message):
        await rig.cache.commit()
    setattr(rig.cache.committer, which, healthy)
    for _ in range(2):
        with pytest.raises(CacheError, match=message):
            await rig.cache.commit()
    assert rig.cache.committer.refusal is not None
    assert committed_blocks(tmp_path) == kept
    assert layer.changed(), "its rows were put back"
    stats = rig.cache.stats()
    failure = stats.pop("commit_failure")
    assert failure["final"]
    assert failure["reason"] == rig.cache.committer.refusal
    assert before.pop("commit_failure") is None
    assert stats == {**before, "flush_failed": 1}, "and no slot was released"
    await rig.fill(layer, *range(5), 100)  # reads go on
    assert rig.violations() == []


async def test_r7_after_a_failed_sync_the_session_cannot_end_clean(tmp_path: Path) -> None:
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    await rig.fill(await rig.base(IMAGE), *range(5))
    rig.cache.committer.sync_slots = failing(OSError(EIO, "gone"))
    with pytest.raises(CacheError, match="could not be synced"):
        await rig.end(clean=True)
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    assert rig.cache.start_mode is StartMode.WARM
    await rig.fill(await rig.base(IMAGE), *range(5))
    assert rig.fetched == []
    await rig.end(clean=True)


async def test_r7_a_full_disk_is_only_a_delay(
    rig: CacheRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = await rig.base(IMAGE)
    await rig.fill(layer, *range(5))
    await rig.evict(2)

    def full(rows: int, load: VolumesLoad) -> None:
        raise CacheError("the cache's index cannot grow: its disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.cache._index, "_grow", full)
        began = time.time()
        for _ in range(2):
            with pytest.raises(CacheError, match="disk is full"):
                await rig.cache.commit()
    first = rig.cache.stats()["commit_failure"]
    assert (first["reason"], first["final"]) == ("the cache's index cannot grow: its disk is full", False)
    assert began <= first["since"] <= time.time()
    assert rig.cache.committer.refusal is None
    assert layer.changed()
    assert rig.cache.stats()["quarantined"] == 2
    assert (await rig.cache.commit()).rows_written == 1
    assert rig.cache.stats()["commit_failure"] is None
    assert rig.cache.stats()["quarantined"] == 0
    assert len(committed_blocks(tmp_path)) == 3


async def test_who_shared_a_failed_cycle_is_told_and_the_next_may_succeed(
    rig: CacheRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.fill(await rig.base(IMAGE), 0)
    with monkeypatch.context() as patch:
        patch.setattr(rig.cache._index, "write_rows", lambda *_: failing(OSError(EIO, "bug"))(0))
        results = await asyncio.gather(*(rig.cache.commit() for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [OSError] * 3
    assert (await rig.cache.commit()).rows_written == 1


async def test_a_layer_that_is_opened_during_a_cycle_is_in_the_next(rig: CacheRig, tmp_path: Path) -> None:
    await rig.fill(await rig.base(IMAGE), 0)
    rig.cache.committer.sync_slots = gate = Gate()
    cycle = asyncio.create_task(rig.cache.commit())
    await gate.reached()
    await rig.fill(await rig.base(IMAGE, "b"), 7)
    gate.release()
    assert (await cycle).rows_written == 1
    assert (await rig.cache.commit()).rows_written == 1
    assert rig.violations() == []


async def test_the_end_waits_for_the_running_cycle(tmp_path: Path) -> None:
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    await rig.fill(await rig.base(IMAGE), 0, 100)
    rig.cache.committer.sync_slots = gate = Gate()
    cycle = asyncio.create_task(rig.cache.commit())
    await gate.reached()
    ending = asyncio.create_task(rig.end(clean=True))
    gate.release()
    await ending
    assert (await cycle).rows_written == 2
    assert check_files(tmp_path / "cache") == []
