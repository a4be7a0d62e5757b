"""An engine with a pipe in the place of its slots, so that a test says when a write to a slot lands."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.engine_rig import TIMEOUT_S
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Engine, LocalDoor, map_bytes

SLOTS = 400
SIZE_BYTES = 600 * BLOCK_BYTES
UNWRITTEN = 599
CALLS = 12


class PipeRig:
    """A volume whose slots take no byte before `land`."""

    def __init__(self, folder: Path) -> None:
        self._from, self._to = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._sums = (folder / "sums").open("w+b")
        self._map = (folder / "volume.map").open("w+b")
        self._map.truncate(map_bytes(SIZE_BYTES))
        self._sums.truncate(SLOTS * 64)
        self.engine = Engine(
            slots_fd=self._to, slot_count=SLOTS, sums_fd=self._sums.fileno(), staging_bytes=64 * BLOCK_BYTES
        )
        self.volume = self.engine.open_layer(1, self._map.fileno(), SIZE_BYTES, kind="local")
        self.engine.finish_load()
        self.door = LocalDoor(self.engine, None, volume=self.volume, queue_depth=CALLS)
        self._pool = ThreadPoolExecutor(CALLS)
        self._calls: list[Future[None]] = []
        self.fill()

    def fill(self) -> None:
        """No room any more."""
        with suppress(BlockingIOError):
            while True:
                os.write(self._to, bytes(PAGE_BYTES))

    def write(self, block: int) -> Future[None]:
        self._calls.append(self._pool.submit(self.door.write, block * BLOCK_BYTES, b"w" * PAGE_BYTES))
        return self._calls[-1]

    def begin(self, block: int, page: int) -> Future[None]:
        """A write that may fail."""
        return self._pool.submit(self.door.write, block * BLOCK_BYTES + page * PAGE_BYTES, b"w" * PAGE_BYTES)

    def begin_discard(self, block: int, page: int) -> Future[None]:
        return self._pool.submit(self.door.discard, block * BLOCK_BYTES + page * PAGE_BYTES, PAGE_BYTES)

    def read(self) -> None:
        """Of what was never written: no slot is asked."""
        assert self.door.read(UNWRITTEN * BLOCK_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)

    def land(self) -> None:
        """Room for a page."""
        os.read(self._from, PAGE_BYTES)

    def land_until(self, calls: list[Future[None]]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not all(call.done() for call in calls) and time.monotonic() < deadline_s:
            with suppress(BlockingIOError):
                self.land()
            threading.Event().wait(0.001)
        for call in calls:
            call.result(TIMEOUT_S)

    @property
    def yielded(self) -> int:
        return self.door.stats()["yielded"]

    def close(self) -> None:
        self.land_until(self._calls)
        self.door.drain()
        self.door.quit()
        self.door.close()
        self.engine.close()
        self._pool.shutdown()
        for descriptor in (self._from, self._to):
            os.close(descriptor)
        self._sums.close()
        self._map.close()


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)
