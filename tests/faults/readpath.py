"""The whole native way of a read, local door to server and back: engine, fills, fetcher, source, in one loop.

Every piece is the real one; this takes the daemon's place between engine and fills, and evicts and commits as
it would.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.engine_rig import unpack_row
from tierblk.config import RemoteSettings
from tierblk.core import (
    BLOCK_BYTES,
    ENTRIES_PER_ROW,
    EVICT,
    EVICTED,
    NEED_SPACE,
    PAGE_BYTES,
    PAGES_PER_BLOCK,
    Engine,
    LocalDoor,
    Record,
    map_bytes,
)
from tierblk.errors import RemoteUnavailable
from tierblk.fill import Fills
from tierblk.layer import Base
from tierblk.remote import Fetcher, RawImage, Source, open_source

LAYER = 1
DEVICE = "tried"
QUEUE_DEPTH = 32
TIMEOUT_S = 20.0
SECTOR_BYTES = 512
OPEN_TRIES = 10


def settings(**keys: object) -> RemoteSettings:
    """[remote] of a config file, with everything that is waited for as short as it may be."""
    short = {"retry_delay": "1ms", "read_timeout": "200ms", "connect_timeout": "200ms"}
    return RemoteSettings.model_validate({**short, "max_window": "1MiB", "staging": "4MiB", **keys})


class ReadPath:
    """One image behind a door with an empty cache of `slots` blocks. Made by `open_path`."""

    def __init__(
        self,
        directory: Path,
        image: bytes,
        source: Source,
        remote: RemoteSettings,
        slots: int,
        patience_s: float,
    ) -> None:
        self.image = image
        self.remote = remote
        self.fetcher = Fetcher(source, remote)
        self.source = source
        self.issued = 0  # requests that the door got: one a block that a read touches
        self._directory = directory
        self._fds: list[int] = []
        self._pool = ThreadPoolExecutor(QUEUE_DEPTH, "reader")
        self.engine = self._engine(slots)
        self._map_fd = self._open("map", map_bytes(len(image)))
        self.layer = self.engine.open_layer(LAYER, self._map_fd, len(image))
        self.engine.finish_load()
        self.base = Base(self.layer, RawImage(source), self.fetcher)
        self._bases = {LAYER: self.base}
        self.fills = Fills(
            self.engine, self._bases, remote.max_window // BLOCK_BYTES, readahead=remote.readahead
        )
        self.door = LocalDoor(self.engine, self.layer, queue_depth=QUEUE_DEPTH)
        self.set_patience(patience_s)
        asyncio.get_running_loop().add_reader(self.engine.event_fd, self._on_events)

    def _engine(self, slots: int) -> Engine:
        slots_fd = self._open("slots", slots * BLOCK_BYTES, os.O_DIRECT | os.O_NONBLOCK)
        sums_fd = self._open("sums", slots * 64)
        return Engine(slots_fd=slots_fd, slot_count=slots, sums_fd=sums_fd, staging_bytes=self.remote.staging)

    def _open(self, name: str, size_bytes: int, flags: int = 0) -> int:
        path = self._directory / name
        path.write_bytes(b"")
        os.truncate(path, size_bytes)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
        self._fds.append(fd)
        return fd

    def set_patience(self, patience_s: float) -> None:
        """device.on_outage, as the daemon sets it."""
        self.base.patiences[DEVICE] = patience_s
        self.door.set_patience(patience_s)

    # -- the daemon's part ---

    def _on_events(self) -> None:
        for event in self.fills.take(self.engine.poll()):
            if event.kind == NEED_SPACE:
                self.engine.push([Record(EVICT, value=max(1, self.engine.slot_count // 8))])
            elif event.kind == EVICTED:
                self._commit()

    def _commit(self) -> None:
        """Slots that were freed may be used again (R6); there is no index that could forget them."""
        self.engine.commit_begin()
        while self.layer.take_changed(64):
            pass
        self.engine.commit_end(True)

    # -- reading ---

    def read(self, offset_bytes: int, length_bytes: int) -> asyncio.Future[bytes]:
        """Through the door. Multiples of 512."""
        last_block = (offset_bytes + length_bytes - 1) // BLOCK_BYTES
        self.issued += last_block - offset_bytes // BLOCK_BYTES + 1
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, self.door.read, offset_bytes, length_bytes)

    def expect(self, offset_bytes: int, length_bytes: int) -> bytes:
        return self.image[offset_bytes : offset_bytes + length_bytes]

    async def check(self, extent: tuple[int, int]) -> OSError | None:
        """Reads an extent: the right bytes, or the error that it ended in. AssertionError: wrong bytes."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                got = await asyncio.shield(self.read(*extent))
        except TimeoutError:
            raise AssertionError(f"a read of {extent} hangs: {self.state()}") from None
        except OSError as error:
            return error
        assert got == self.expect(*extent), f"wrong bytes at {extent}"
        return None

    async def check_all(self, extents: Sequence[tuple[int, int]], at_once: int = 8) -> list[OSError | None]:
        """The same for many, so many at a time."""
        gate = asyncio.Semaphore(at_once)

        async def one(extent: tuple[int, int]) -> OSError | None:
            async with gate:
                return await self.check(extent)

        return await asyncio.gather(*map(one, extents))

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.state()
            await asyncio.sleep(0)

    def state(self) -> str:
        """Everything that one wants to know of a hang."""
        return (
            f"door {self.door.stats()} engine {self.engine.stats()} fills {self.fills.busy}"
            f" staging {self.fills.free_staging_blocks}"
            f" fetcher {self.fetcher.counters} {self.fetcher.health()}"
        )

    # -- what must hold at the end ---

    async def settle(self) -> None:
        """Until nothing is under way; then every request was answered once, and nothing is lent or open."""
        blocks = self.remote.staging // BLOCK_BYTES
        await self.until(lambda: self.fills.busy == 0 and self.fills.free_staging_blocks == blocks)
        await self.until(lambda: self.door.stats()["active"] == 0 and self.engine.stats()["fills"] == 0)
        assert self.door.stats()["requests"] == self.issued, "lost, or completed twice"
        counters = self.fetcher.counters
        assert counters.in_flight == counters.waiting == 0

    def cached_extents(self) -> list[tuple[int, int]]:
        """(offset, length) of every run of pages that the map calls cached; runs end with their block."""
        extents: list[tuple[int, int]] = []
        for row in range(self.layer.rows):
            for i, (_, _, cached, _, _) in enumerate(unpack_row(self.layer.peek_row(row))):
                block_at = (row * ENTRIES_PER_ROW + i) * BLOCK_BYTES
                for run in re.finditer("1+", f"{cached:0{PAGES_PER_BLOCK}b}"[::-1]):
                    at = block_at + run.start() * PAGE_BYTES
                    end = min(block_at + run.end() * PAGE_BYTES, len(self.image))
                    extents.append((at, end - at))
        return extents

    async def check_cached(self) -> int:
        """Everything cached is right, and comes from the cache: the server must be gone. How many runs."""
        self.set_patience(0)
        extents = self.cached_extents()
        for extent in extents:
            error = await self.check(extent)
            assert error is None, f"{extent} is cached, but reading it says {error}"
        return len(extents)

    async def end_fetches(self) -> None:
        """As when the last device of an image goes: what waits ends in EIO, and so do later misses."""
        self.door.drain()
        self._bases.clear()
        await self.fills.stop()

    async def close(self) -> None:
        """Takes it down as the daemon does; nothing is left."""
        await self.end_fetches()
        await self.fills.idle()
        self.door.quit()
        await asyncio.to_thread(self.door.close)
        asyncio.get_running_loop().remove_reader(self.engine.event_fd)
        self.fills.close()
        await self.source.aclose()
        self.engine.close()
        self._pool.shutdown()
        for fd in self._fds:
            os.close(fd)


async def open_path(
    directory: Path,
    image: bytes,
    url: str,
    *,
    slots: int = 0,
    patience_s: float = math.inf,
    remote: RemoteSettings | None = None,
) -> ReadPath:
    """slots 0: as many as the image has blocks, and some more. The server must be healthy for a moment."""
    remote = remote or settings()
    for attempt in range(OPEN_TRIES):
        try:
            source = await open_source(url, remote)
            break
        except RemoteUnavailable:  # the time-outs are short, and the machine may be busy
            if attempt + 1 == OPEN_TRIES:
                raise
    return ReadPath(directory, image, source, remote, slots or len(image) // BLOCK_BYTES + 64, patience_s)


def extents(seed: int, count: int, size_bytes: int, longest_bytes: int = 256 * 1024) -> list[tuple[int, int]]:
    """Seeded (offset, length): lengths log-uniform from a sector on, every alignment of 512."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        length = int(2 ** rng.uniform(9, math.log2(longest_bytes))) // SECTOR_BYTES * SECTOR_BYTES
        drawn.append((rng.randrange((size_bytes - length) // SECTOR_BYTES + 1) * SECTOR_BYTES, length))
    return drawn
