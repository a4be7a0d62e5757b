"""Fills when remote, readers or disk are in trouble: what is given up, what goes on, what is passed by."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from contextlib import suppress
from pathlib import Path

from tests.fill_rig import IMAGE, STAGING_BLOCKS, TIMEOUT_S, WINDOW_BLOCKS, Serving, expect, failed
from tierblk.core import BLOCK_BYTES, LocalDoor
from tierblk.errors import RemoteUnavailable


async def test_an_ssd_that_takes_no_writes_does_not_stop_reads(tmp_path: Path) -> None:
    serving = Serving(tmp_path, slots_flags=os.O_RDONLY)
    for _ in range(2):
        assert await serving.read(0, 8) == expect(0, 8)
        await serving.settled()
    assert serving.fills.slot_write_failure is not None
    stats = serving.engine.stats()
    assert stats["slot_write_errors"] >= 4
    assert stats["slot_write_errors"] + stats["passed_blocks"] == 16  # after some failures it is left alone
    assert stats["bad"] == 0
    assert serving.bases[1].layer.cached_pages() == 0
    await serving.close()


async def test_what_nobody_waits_for_is_given_up_at_once_and_somebody_who_comes_is_served(
    tmp_path: Path,
) -> None:
    serving = Serving(tmp_path, readahead=True)
    serving.bases[1].patiences["a device"] = 1000.0
    for block in range(4):
        assert await serving.read(block) == expect(block)
    source = serving.sources[1]
    await serving.settled()
    ahead = max(offset + length for offset, length in source.reads) // BLOCK_BYTES
    assert ahead > 4
    source.move(0, RemoteUnavailable("away"))
    read = serving.read(4 + (ahead - 4), 2)
    before = len(source.reads)
    await serving.until(lambda: len(source.reads) > before + 5)  # more than the retries, for somebody waits
    assert not read.done()
    assert serving.bases[1].health()["state"] == "degraded"
    source.move(len(IMAGE))
    assert await read == expect(ahead, 2)
    await serving.settled()
    assert serving.bases[1].health()["state"] == "ok"
    await serving.close()


async def test_fail_fast_doors_are_told_while_others_wait(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    serving.bases[1].patiences["patient"] = 1000.0
    patient = LocalDoor(serving.engine, serving.bases[1].layer, queue_depth=1)
    serving.doors[1].set_patience(0)
    serving.sources[1].move(0, RemoteUnavailable("away"))
    waits = asyncio.get_running_loop().run_in_executor(serving.pool, patient.read, 0, BLOCK_BYTES)
    await serving.until(lambda: patient.stats()["waiting"] == 1)
    assert await failed(serving.read(0))
    assert serving.fills.busy == 1, "it goes on for those who wait"
    serving.sources[1].move(len(IMAGE))
    assert await waits == expect(0)
    await serving.settled()
    assert len([offset for offset, _ in serving.sources[1].reads if offset == 0]) > 1
    patient.quit()
    await asyncio.to_thread(patient.close)
    await serving.close()


async def test_what_nobody_waits_for_any_more_holds_nothing_through_an_outage(tmp_path: Path) -> None:
    """A reader whose patience is over leaves, and with him his fetch, though another device of the image
    would wait for ever; who comes next begins anew."""
    serving = Serving(tmp_path)
    serving.bases[1].patiences["patient"] = 1000.0
    serving.doors[1].set_patience(0.05)
    serving.sources[1].move(0, RemoteUnavailable("away"))
    for block in (0, 7):
        assert await failed(serving.read(block, 2))
    await serving.settled()
    serving.doors[1].set_patience(1000.0)
    read = serving.read(7)
    await serving.until(lambda: serving.fills.busy == 1)
    serving.sources[1].move(len(IMAGE))
    assert await read == expect(7)
    await serving.settled()
    await serving.close()


async def test_a_slow_remote_goes_on_for_a_reader_who_has_left(tmp_path: Path) -> None:
    """It is in no trouble: the next reader, as impatient, finds what the first one waited for in vain."""
    serving = Serving(tmp_path)
    serving.doors[1].set_patience(0.05)
    serving.sources[1].move(0)
    assert await failed(serving.read(0))
    assert serving.fills.busy == 1
    serving.sources[1].move(len(IMAGE))
    await serving.settled()
    assert await serving.read(0) == expect(0)
    assert serving.sources[1].reads == [(0, BLOCK_BYTES)]
    await serving.close()


async def test_a_fetch_that_has_no_place_yet_ends_with_the_last_who_waits(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    serving.sources[1].move(0)
    reads = [serving.read(block, WINDOW_BLOCKS) for block in range(0, STAGING_BLOCKS, WINDOW_BLOCKS)]
    await serving.until(lambda: serving.fills.free_staging_blocks == 0)
    serving.doors[2].set_patience(0.05)
    assert await failed(serving.read(0, layer_id=2))
    await serving.until(lambda: serving.fills.busy == STAGING_BLOCKS)
    serving.sources[1].move(len(IMAGE))
    assert await asyncio.gather(*reads) == [
        expect(block, WINDOW_BLOCKS) for block in range(0, STAGING_BLOCKS, WINDOW_BLOCKS)
    ]
    await serving.settled()
    assert serving.sources[2].reads == []
    await serving.close()


async def test_a_disk_that_hangs_is_passed_by(tmp_path: Path) -> None:
    """Its writes hold the memory that they write from for ever; reads go on with what is left of it."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while os.write(theirs, bytes(BLOCK_BYTES)):
            pass
    os.set_blocking(theirs, True)  # io_uring now waits for a reader who does not come
    serving = Serving(tmp_path, slots_fd=theirs)
    for _ in range(2):
        for block in range(0, 40, 2):
            async with asyncio.timeout(TIMEOUT_S):
                assert await serving.read(block, 2) == expect(block, 2)
    assert serving.engine.stats()["passed_blocks"] > 40
    # The last ones are about to end; what hangs stays.
    await serving.until(lambda: serving.engine.stats()["fills"] <= STAGING_BLOCKS * 3 // 4)
    await serving.until(lambda: serving.fills.free_staging_blocks >= STAGING_BLOCKS // 4)
    assert serving.engine.stats()["fills"] > 0
    over = threading.Event()
    draining = asyncio.create_task(asyncio.to_thread(_drain, ours, over))
    await serving.settled()
    over.set()
    await draining
    await serving.close()
    os.close(theirs)
    os.close(ours)


def _drain(fd: int, over: threading.Event) -> None:
    while not over.is_set():
        if select.select([fd], [], [], 0.05)[0]:
            os.read(fd, 1 << 20)
