"""A daemon with one volume over one base: the real cache, engine and upkeep on an event loop in a thread of
its own, and calls through a local door from the test's. The base's misses are answered out of memory, when
they may.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

from tests.property.gate import Gate
from tests.property.host import Host
from tierblk.cache import Cache, journal
from tierblk.cache.directory import JOURNAL
from tierblk.config import CacheSettings
from tierblk.core import (
    BLOCK_BYTES,
    FILL,
    FILL_WHOLE,
    FILLED,
    MISS,
    PAGE_BYTES,
    Engine,
    LocalDoor,
    Record,
    Sealed,
)
from tierblk.extent import block_extent
from tierblk.upkeep import Upkeep

TIMEOUT_S = 20.0
STAGING_BLOCKS = 8
NAME = "vol"
URL = "http://images.example/base.raw"
T = TypeVar("T")


class Misses:
    """In the place of Fills. held: misses wait until they are let go."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self.engine: Engine
        self.held = False
        self._waiting: list[Record] = []
        self._filling: dict[int, int] = {}
        self._places = list(range(STAGING_BLOCKS))
        self.slot_write_failure: str | None = None

    def take(self, events: Sequence[Record]) -> list[Record]:
        """What the upkeep asks of Fills."""
        rest = []
        for event in events:
            if event.kind == MISS:
                self._waiting.append(event)
            elif event.kind == FILLED:
                self._places.append(self._filling.pop(event.token))
            else:
                rest.append(event)
        self.answer()
        return rest

    def answer(self) -> None:
        """On the event loop."""
        while not self.held and self._waiting and self._places:
            event, place = self._waiting.pop(0), self._places.pop()
            self._filling[event.token] = place
            extent = block_extent(event.block, len(self._image))
            at = place * BLOCK_BYTES
            self.engine.staging[at : at + extent.length] = self._image[extent.offset : extent.end]
            pages = (1 << -(-extent.length // PAGE_BYTES)) - 1
            self.engine.push([Record(FILL, event.layer, event.token, event.block, at, FILL_WHOLE, pages)])

    def close(self) -> None:
        pass


class VolumeDaemon:
    """One session on a host. slots: of the cache, the superblock's included; image: the base's bytes, b"" for
    none; size_bytes: of the device; ring_bytes: of the journal."""

    def __init__(
        self,
        host: Host,
        slots: int,
        image: bytes,
        size_bytes: int,
        queue_depth: int = 8,
        ring_bytes: int = journal.RING_BYTES,
    ) -> None:
        self.host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self._thread.start()
        settings = CacheSettings.model_construct(dir=host.directory, size=slots * BLOCK_BYTES)
        try:
            self.cache = self.run(self._open(settings, ring_bytes))
        except BaseException:
            self._end_loop()
            raise
        for name in ("slots", JOURNAL):  # the superblock's sync covers the whole file
            host.durable[name] = host.content(name)
        self.engine = self.cache.engine
        self.gate = Gate(host, self.cache)
        self.misses = Misses(image)
        self.misses.engine = self.engine
        self.base = self.run(self.cache.base_layer(URL, len(image), '"v1"')) if image else None
        over = (URL, len(image), '"v1"') if image else None
        self.volume = self.run(self.cache.volume_layer(NAME, "local", size_bytes, over))
        hot_bytes = 8 * BLOCK_BYTES if image else 0  # a memory tier, out of which nothing older may come
        self.door = LocalDoor(
            self.engine, self.base, volume=self.volume, queue_depth=queue_depth, hot_bytes=hot_bytes
        )
        config: Any = SimpleNamespace(
            cache=SimpleNamespace(
                free_low_percent=0.0, free_high_percent=0.0, commit_interval=3600.0, checksum_after=3600.0
            ),
            daemon=SimpleNamespace(watchdog=0.0),
        )
        fills: Any = self.misses
        self.upkeep = Upkeep(self.cache, fills, config)
        self._on_loop(self.upkeep.start)

    async def _open(self, settings: CacheSettings, ring_bytes: int) -> Cache:
        size_bytes = journal.RING_AT_BYTES + ring_bytes
        with patch.multiple(journal, RING_BYTES=ring_bytes, JOURNAL_BYTES=size_bytes):
            return self._opened(settings)

    def _opened(self, settings: CacheSettings) -> Cache:
        return Cache.open(settings, self.host.run_dir, self._make_engine)

    @staticmethod
    def _make_engine(*, slots_fd: int, slot_count: int, sums_fd: int, dio_align_bytes: int) -> Engine:
        return Engine(
            slots_fd=slots_fd,
            slot_count=slot_count,
            sums_fd=sums_fd,
            staging_bytes=STAGING_BLOCKS * BLOCK_BYTES,
            dio_align_bytes=dio_align_bytes,
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def _on_loop(self, function: Callable[[], None]) -> None:
        async def call() -> None:
            function()

        self.run(call())

    # -- what a trace asks of it ---

    def hold(self, held: bool) -> None:
        """Misses are answered later, or from now on."""

        def change() -> None:
            self.misses.held = held
            self.misses.answer()

        self._on_loop(change)

    def begin_commit(self, hold: str | None = None, failing: str | None = None) -> Future[Any]:
        """A cycle that runs to its end, or until it is held at a point of the gate."""
        self.gate.hold, self.gate.failing = hold, failing
        return asyncio.run_coroutine_threadsafe(self.cache.commit(), self._loop)

    def quiet(self, *, cycle_held: bool) -> None:
        """Until the daemon does nothing by itself any more: no fill, eviction or cycle of its own, unless one
        is held that others wait behind."""
        deadline = time.monotonic() + TIMEOUT_S
        quiet: list[bool] = []

        def look() -> None:
            self.upkeep._on_events()
            idle = self.engine.stats()["fills"] == 0 and not self.upkeep._evicting_slots
            quiet.append(idle and (cycle_held or len(self.upkeep._tasks) == 2))  # the timer's, the sums'

        while not quiet or not quiet[-1]:
            assert time.monotonic() < deadline, f"it does not come to rest: {self.engine.stats()}"
            self._on_loop(look)
            threading.Event().wait(0 if not quiet or quiet[-1] else 0.001)

    def sealed_pages(self) -> dict[int, bytes]:
        """Page number of the volume -> its bytes, of what is sealed."""
        deadline_s = time.monotonic() + TIMEOUT_S
        found: list[Sealed] = []

        def collect() -> None:
            if self.volume.collect(1):
                found.extend(self.volume.sealed(1000))
                done.set()

        done = threading.Event()
        while not done.is_set():
            assert time.monotonic() < deadline_s, "the epoch is never complete"
            self._on_loop(collect)
        slots, pages = self.host.content("slots"), dict[int, bytes]()
        for each in found:
            for page in range(16):
                if each.dirty >> page & 1:
                    at = each.slot * BLOCK_BYTES + page * PAGE_BYTES
                    data = bytes(PAGE_BYTES) if each.zero >> page & 1 else slots[at : at + PAGE_BYTES]
                    pages[each.block * 16 + page] = data
        return pages

    def check(self) -> list[Any]:
        """The runnable invariants, on the loop, with nothing under way."""
        found: list[Any] = []
        self._on_loop(lambda: found.extend(self.cache.check()))
        return found

    def stop(self, *, clean: bool) -> None:
        """As a daemon ends: doors, upkeep, cache."""
        self.gate.open, self.gate.failing = True, None
        self.hold(False)
        self.door.drain()
        self.door.quit()
        self.door.close()
        try:
            self.run(self.upkeep.stop())
            self.run(self.cache.close(clean))
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        with suppress(RuntimeError):
            self._loop.close()
