"""Misses to bytes: windows, early waiters, failures, stops, staging memory."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fill_rig import IMAGE, STAGING_BLOCKS, Serving, expect, failed
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import RemoteRefused, RemoteUnavailable


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    serving = Serving(tmp_path)
    yield serving
    await serving.close()


async def test_neighbouring_misses_share_windows(serving: Serving) -> None:
    serving.holding = []
    reads = [serving.read(3, 6), serving.read(20)]
    await serving.at_once(7)
    assert [await read for read in reads] == [expect(3, 6), expect(20)]
    await serving.settled()
    windows = [(3, 4), (7, 2), (20, 1)]
    assert serving.sources[1].reads == [(at * BLOCK_BYTES, count * BLOCK_BYTES) for at, count in windows]


async def test_the_ragged_end_is_asked_for_as_long_as_it_is(serving: Serving) -> None:
    serving.holding = []
    read = serving.read(38, 3)
    await serving.at_once(3)
    assert await read == expect(38, 3)
    await serving.settled()
    assert serving.sources[1].reads == [(38 * BLOCK_BYTES, 2 * BLOCK_BYTES + 3 * 512)]


async def test_a_waiter_wakes_at_its_own_pages_not_at_the_windows_end(serving: Serving) -> None:
    serving.holding = []
    serving.sources[1].move(0)
    early = serving.read_bytes(PAGE_BYTES, 2 * PAGE_BYTES)
    late = serving.read(1, 2)
    await serving.at_once(3)
    serving.sources[1].move(3 * PAGE_BYTES + 100)  # the fourth page has only begun
    assert await early == IMAGE[PAGE_BYTES : 3 * PAGE_BYTES]
    assert serving.sources[1].running == 1
    serving.sources[1].move(2 * BLOCK_BYTES)
    assert await serving.read(1) == expect(1)
    assert not late.done()
    serving.sources[1].move(len(IMAGE))
    assert await late == expect(1, 2)
    await serving.settled()
    assert len(serving.sources[1].reads) == 1


async def test_more_misses_than_staging_memory_take_turns(serving: Serving) -> None:
    reads = [serving.read(block, 5) for block in range(0, 40, 5)] + [serving.read(0, 40, layer_id=2)]
    assert [await read for read in reads] == [expect(block, 5) for block in range(0, 40, 5)] + [expect(0, 40)]
    await serving.settled()
    assert serving.engine.stats()["slot_write_errors"] == 0


async def test_a_broken_read_goes_on_where_it_broke(serving: Serving) -> None:
    serving.holding = []
    serving.sources[1].move(5 * PAGE_BYTES + 7, RemoteUnavailable("reset"), errors=2)
    read = serving.read(0, 2)
    await serving.at_once(2)
    await serving.until(lambda: len(serving.sources[1].reads) == 3)
    serving.sources[1].move(len(IMAGE))
    assert await read == expect(0, 2)
    await serving.settled()
    rest = 2 * BLOCK_BYTES - 5 * PAGE_BYTES - 7
    assert serving.sources[1].reads == [(0, 2 * BLOCK_BYTES), *[(5 * PAGE_BYTES + 7, rest)] * 2]
    assert serving.bases[1].health()["state"] == "ok"


async def test_what_came_before_a_failure_is_served_and_kept(serving: Serving) -> None:
    serving.holding = []
    serving.sources[1].move(BLOCK_BYTES + 4 * PAGE_BYTES, RemoteRefused("another version"))
    whole, part, lost = serving.read(0), serving.read_bytes(BLOCK_BYTES, PAGE_BYTES), serving.read(1, 2)
    await serving.at_once(3)
    assert await whole == expect(0)
    assert await part == expect(1)[:PAGE_BYTES]
    assert await failed(lost)
    await serving.settled()
    health = serving.bases[1].health()
    assert (health["state"], health["reason"]) == ("refused", "another version")
    assert serving.fills.slot_write_failure is None
    assert await serving.read(0) == expect(0)  # a hit
    assert await failed(serving.read(1))
    serving.sources[1].move(len(IMAGE))
    assert await serving.read(1, 2) == expect(1, 2)
    await serving.settled()
    assert serving.bases[1].health()["state"] == "ok"


async def test_stop_ends_what_runs_what_waits_and_what_has_not_begun(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.holding = []
    serving.sources[1].move(2 * PAGE_BYTES)
    reads = [serving.read(block, 4) for block in range(0, 32, 4)]  # twice as many blocks as staging memory
    other = serving.read(0, 2, layer_id=2)
    await serving.at_once(34)
    await serving.until(lambda: serving.sources[1].running == 3)
    late = serving.read(36)
    await serving.until(lambda: serving.fills.busy > 34)
    await serving.fills.stop(1)
    assert serving.sources[1].running == 0
    assert all([await failed(read) for read in [*reads, late]])
    assert await other == expect(0, 2)  # the other image's fetches went on
    await serving.settled()
    await serving.fills.stop()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_fetch_cancelled_before_its_first_step_fails_its_waiters(serving: Serving) -> None:
    serving.holding = []
    read = serving.read(0, 2)
    await serving.at_once(2)
    await serving.fills.stop()
    assert await failed(read)
    await serving.settled()
    assert serving.sources[1].reads == []


async def test_memory_is_lent_again_as_its_bytes_are_complete_and_kept(serving: Serving) -> None:
    """R5: a place is free when its block is in its slot, for a source writes no byte twice; not before."""
    source = serving.sources[1]
    ended = source.linger = asyncio.Event()
    source.move(2 * BLOCK_BYTES + PAGE_BYTES)
    read = serving.read(0, 4)
    await serving.until(lambda: serving.fills.free_staging_blocks == STAGING_BLOCKS - 2)
    await serving.until(lambda: serving.fills.busy == 2)
    assert serving.fills.free_staging_blocks == STAGING_BLOCKS - 2
    source.move(len(IMAGE))
    assert await read == expect(0, 4)
    await serving.fills.idle()
    assert source.running == 1
    assert serving.fills.free_staging_blocks == STAGING_BLOCKS
    ended.set()
    await serving.settled()


async def test_memory_that_the_network_may_still_write_to_is_not_lent(serving: Serving) -> None:
    """R5: a fetch that is ended gives its places back when its read has ended."""
    source = serving.sources[1]
    source.move(BLOCK_BYTES + PAGE_BYTES)
    read = serving.read(0, 4)
    await serving.until(lambda: serving.fills.free_staging_blocks == STAGING_BLOCKS - 3)
    source.held = asyncio.Event()
    stopping = asyncio.create_task(serving.fills.stop())
    await serving.until(lambda: source.cancelled == 1)
    assert serving.fills.free_staging_blocks == STAGING_BLOCKS - 3
    source.held.set()
    await stopping
    assert await failed(read)
    await serving.settled()


async def test_a_miss_of_a_base_that_is_gone_ends_in_an_error(serving: Serving) -> None:
    base = serving.bases.pop(1)
    assert await failed(serving.read(0))
    await serving.settled()
    serving.bases[1] = base
    assert await serving.read(0) == expect(0)


async def test_a_fetch_that_dies_of_a_bug_fails_its_waiters_and_says_so(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.sources[1].move(PAGE_BYTES)
    serving.sources[1].error, serving.sources[1].errors = ZeroDivisionError(), 9  # type: ignore[assignment]
    assert await failed(serving.read(0, 2))
    await serving.settled()
    assert "died of a bug" in caplog.text


async def test_a_reader_in_order_is_read_ahead_of_and_nothing_comes_twice(tmp_path: Path) -> None:
    serving = Serving(tmp_path, readahead=True)
    for block in range(41):
        assert await serving.read(block) == expect(block)
    await serving.settled()
    reads = sorted(serving.sources[1].reads)
    assert sum(length for _, length in reads) == len(IMAGE)
    assert all(one + length == other for (one, length), (other, _) in itertools.pairwise(reads))
    assert len(reads) < 20
    await serving.close()


async def test_what_was_fetched_ahead_is_urgent_when_somebody_waits_for_it(tmp_path: Path) -> None:
    serving = Serving(tmp_path, readahead=True)
    source = serving.sources[1]
    source.move(4 * BLOCK_BYTES)
    for block in range(4):
        assert await serving.read(block) == expect(block)
    await serving.until(lambda: any(window.is_ahead for window in serving.fills._tasks.values()))
    (window,) = serving.fills._tasks.values()
    assert window.blocks.start == 4
    read = serving.read(4)
    try:
        await serving.until(lambda: not window.is_ahead)
    finally:
        source.move(len(IMAGE))
        assert await read == expect(4)
        await serving.settled()
        await serving.close()


async def test_scattered_small_reads_fetch_little(tmp_path: Path) -> None:
    """Once the pattern is clear, which here reads of a larger image have made it."""
    serving = Serving(tmp_path)
    streams = serving.fills._streams_of(serving.bases[1])
    rng = random.Random(1)
    for _ in range(200):
        page = rng.randrange(1 << 30)
        streams.missed(page, page + 1)
    assert streams.granule_pages == 1
    wanted = [(block, page) for block in (3, 11, 23, 37) for page in (5, 9)]
    for block, page in wanted:
        at = block * BLOCK_BYTES + page * PAGE_BYTES
        assert await serving.read_bytes(at, PAGE_BYTES) == IMAGE[at : at + PAGE_BYTES]
    await serving.settled()
    assert sum(length for _, length in serving.sources[1].reads) <= 4 * len(wanted) * PAGE_BYTES
    for block in (3, 11, 23, 37):  # the rest of a block that has some of it
        assert await serving.read(block) == expect(block)
    await serving.settled()
    await serving.close()
