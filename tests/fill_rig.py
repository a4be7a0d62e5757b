"""Misses to bytes: the real engine, the real fetcher, and a source in memory that brings what a test lets it
bring."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tierblk.config import RemoteSettings
from tierblk.core import BLOCK_BYTES, MISS, PAGE_BYTES, Engine, LocalDoor, Record, map_bytes
from tierblk.errors import TierblkError
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
        self.held: asyncio.Event | None = None  # until then one that was cancelled does not
        self.cancelled = 0
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
        except asyncio.CancelledError:
            self.cancelled += 1
            if self.held is not None:
                await self.held.wait()
            raise
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        pass


async def no_sleep(_: float) -> None:
    await asyncio.sleep(0)


class Serving:
    """An engine whose events go to Fills, as the daemon's do, but for misses while `holding`."""

    def __init__(
        self,
        directory: Path,
        slots: int = 64,
        slots_flags: int = os.O_RDWR,
        readahead: bool = False,
        slots_fd: int | None = None,
    ) -> None:
        """slots_fd: in place of a file, and the caller's to close."""
        self.fds = []
        for name, size in (("slots", slots * BLOCK_BYTES), ("sums", slots * 64)):
            path = directory / name
            path.write_bytes(b"")
            os.truncate(path, size)
            flags = slots_flags | os.O_DIRECT | os.O_NONBLOCK if name == "slots" else os.O_RDWR
            self.fds.append(os.open(path, flags | os.O_CLOEXEC))
        self.engine = Engine(
            slots_fd=self.fds[0] if slots_fd is None else slots_fd,
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
        await self.until(lambda: all(source.running == 0 for source in self.sources.values()))

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


def expect(block: int, blocks: int = 1) -> bytes:
    return IMAGE[block * BLOCK_BYTES : (block + blocks) * BLOCK_BYTES]


async def failed(read: asyncio.Future[bytes]) -> bool:
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait([read])
    return isinstance(read.exception(), OSError)
