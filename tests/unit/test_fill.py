"""Misses to bytes: the real engine, the real fetcher, and a source in memory that brings what a test lets it
bring."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tierblk.config import RemoteSettings
from tierblk.core import BLOCK_BYTES, MISS, PAGE_BYTES, Engine, LocalDoor, Record, map_bytes
from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.fill import Fills
from tierblk.layer import Base
from tierblk.remote import Fetcher, Identity, RawImage

IMAGE = random.Random(5).randbytes(40 * BLOCK_BYTES + 3 * 512)
STAGING_BLOCKS = 16
WINDOW_BLOCKS = 4
TIMEOUT_S = 20.0


class MemorySource:
    """Brings `image` page by page, as far as byte `limit`, and then waits, or raises `error` once `errors`
    are left."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.identity = Identity("http://memory/image", len(image), "size:0")
        self.limit = len(image)
        self.error: TierblkError | None = None
        self.errors = 0
        self.reads: list[tuple[int, int]] = []
        self.running = 0
        self.linger: asyncio.Event | None = None  # until then a read does not end
        self._moved = asyncio.Event()

    def move(self, limit: int, error: TierblkError | None = None, errors: int = 10**9) -> None:
        """From here on bytes come up to `limit`; what would have to wait there raises `error`."""
        self.limit, self.error, self.errors = limit, error, errors
        self._moved.set()
        self._moved = asyncio.Event()

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Callable[[int], None]) -> None:
        self.reads.append((offset_bytes, len(buffer)))
        self.running += 1
        try:
            at = 0
            while at < len(buffer):
                moved = self._moved
                end = min(at + PAGE_BYTES, len(buffer), self.limit - offset_bytes)
                if end > at:
                    buffer[at:end] = self.image[offset_bytes + at : offset_bytes + end]
                    at = end
                    progress(at)
                elif self.error is not None and self.errors:
                    self.errors -= 1
                    raise self.error
                else:
                    await moved.wait()
            if self.linger is not None:
                await self.linger.wait()
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        pass


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


class Serving:
    """An engine whose events go to Fills, as the daemon's do, but for misses while `holding`."""

    def __init__(
        self, directory: Path, slots: int = 64, slots_flags: int = os.O_RDWR, readahead: bool = False
    ) -> None:
        self.fds = []
        for name, size in (("slots", slots * BLOCK_BYTES), ("sums", slots * 64)):
            path = directory / name
            path.write_bytes(b"")
            os.truncate(path, size)
            flags = slots_flags | os.O_DIRECT | os.O_NONBLOCK if name == "slots" else os.O_RDWR
            self.fds.append(os.open(path, flags | os.O_CLOEXEC))
        self.engine = Engine(
            slots_fd=self.fds[0],
            slot_count=slots,
            sums_fd=self.fds[1],
            staging_bytes=STAGING_BLOCKS * BLOCK_BYTES,
        )
        self.bases: dict[int, Base] = {}
        self.sources: dict[int, MemorySource] = {}
        self.doors: dict[int, LocalDoor] = {}
        self.pool = ThreadPoolExecutor(32)
        self.holding: list[Record] | None = None
        self.fills = Fills(self.engine, self.bases, WINDOW_BLOCKS, readahead=readahead)
        for layer_id in (1, 2):
            self._open(layer_id)
        self.engine.finish_load()
        for layer_id, base in self.bases.items():
            self.doors[layer_id] = LocalDoor(self.engine, base.layer, queue_depth=64)
        asyncio.get_running_loop().add_reader(self.engine.event_fd, self._on_events)

    def _open(self, layer_id: int) -> None:
        map_fd = os.memfd_create(f"map-{layer_id}")
        os.truncate(map_fd, map_bytes(len(IMAGE)))
        self.fds.append(map_fd)
        source = MemorySource(IMAGE)
        fetcher = Fetcher(source, RemoteSettings(max_requests=3, retries=2, hedge_percent=0), sleep=no_sleep)
        layer = self.engine.open_layer(layer_id, map_fd, len(IMAGE))
        self.bases[layer_id] = Base(layer, RawImage(source), fetcher)
        self.sources[layer_id] = source

    def _on_events(self) -> None:
        events = self.engine.poll()
        if self.holding is None:
            self.fills.take(events)
            return
        self.holding += [event for event in events if event.kind == MISS]
        self.fills.take([event for event in events if event.kind != MISS])

    def read(self, block: int, blocks: int = 1, layer_id: int = 1) -> asyncio.Future[bytes]:
        length = min(blocks * BLOCK_BYTES, len(IMAGE) - block * BLOCK_BYTES)
        return self.read_bytes(block * BLOCK_BYTES, length, layer_id)

    def read_bytes(self, offset: int, length: int, layer_id: int = 1) -> asyncio.Future[bytes]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self.pool, self.doors[layer_id].read, offset, length)

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)

    async def at_once(self, misses: int) -> None:
        """Collects that many misses and hands them over as one batch, as a busy loop would get them."""
        held = self.holding
        assert held is not None
        await self.until(lambda: len(held) == misses)
        self.holding = None
        self.fills.miss(held)

    async def settled(self) -> None:
        """Every miss is answered; all staging memory is back, none of it twice."""
        async with asyncio.timeout(TIMEOUT_S):
            await self.fills.idle()
        await self.until(lambda: self.fills.free_staging_blocks == STAGING_BLOCKS)
        assert self.fills.busy == 0
        assert self.engine.stats()["fills"] == 0
        assert all(source.running == 0 for source in self.sources.values())

    async def close(self) -> None:
        for door in self.doors.values():
            door.drain()
            door.quit()
            await asyncio.to_thread(door.close)
        await self.fills.stop()
        await self.settled()
        asyncio.get_running_loop().remove_reader(self.engine.event_fd)
        self.engine.close()
        self.pool.shutdown()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    serving = Serving(tmp_path)
    yield serving
    await serving.close()


def expect(block: int, blocks: int = 1) -> bytes:
    return IMAGE[block * BLOCK_BYTES : (block + blocks) * BLOCK_BYTES]


async def failed(read: asyncio.Future[bytes]) -> bool:
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait([read])
    return isinstance(read.exception(), OSError)


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


async def test_memory_is_lent_again_only_after_the_network_has_left_it(serving: Serving) -> None:
    """R5: a window whose blocks are all in their slots is not free while its read still runs."""
    ended = serving.sources[1].linger = asyncio.Event()
    assert await serving.read(0, 4) == expect(0, 4)
    await serving.fills.idle()
    assert serving.fills.free_staging_blocks < STAGING_BLOCKS
    ended.set()
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
    serving.doors[1].set_patience(0)
    serving.sources[1].move(0, RemoteUnavailable("away"))
    assert await failed(serving.read(0))
    assert serving.fills.busy == 1, "it goes on for those who wait"
    serving.sources[1].move(len(IMAGE))
    await serving.settled()
    assert await serving.read(0) == expect(0)
    assert len([offset for offset, _ in serving.sources[1].reads if offset == 0]) > 1
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
