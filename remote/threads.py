"""Threads for calls to a filesystem that may never return."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from tierblk.errors import TierblkError

THREADS_MAX = 4

T = TypeVar("T")


class Threads:
    """A few threads for what may hang. Not those of an executor: Python's end would wait for them."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any], Callable[[Any], None]] | None]
        self._work = SimpleQueue()
        self._waiting: set[asyncio.Future[Any]] = set()
        self._undone = 0  # handed to the threads and not come back, waited for or not
        self._count = 0
        self._ended = 0  # of the threads, under the lock
        self._lock = threading.Lock()
        self._last: Callable[[], None] = lambda: None

    async def run(self, function: Callable[[], T], drop: Callable[[T], None] = lambda result: None) -> T:
        """What the function returns or raises. drop: what to do with a result that comes too late."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._undone += 1
        if self._undone > self._count < THREADS_MAX:
            self._count += 1
            threading.Thread(target=self._serve, args=(loop,), name="tierblk-file", daemon=True).start()
        self._waiting.add(future)
        self._work.put((future, function, drop))
        try:
            return await future
        finally:
            self._waiting.discard(future)

    def end(self, error: TierblkError, last: Callable[[], None]) -> None:
        """Who waits gets the error. last: called when no thread runs any more, which may be never."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._last = last
        if not self._count:
            last()
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread."""
        while (item := self._work.get()) is not None:
            future, function, drop = item
            result, error = None, None
            if not future.done():
                try:
                    result = function()
                except BaseException as caught:
                    error = caught
            with suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(self._come_back, future, result, error, drop)
        with self._lock:
            self._ended += 1
            is_last = self._ended == self._count
        if is_last:
            self._last()

    def _come_back(
        self,
        future: asyncio.Future[Any],
        result: Any,
        error: BaseException | None,
        drop: Callable[[Any], None],
    ) -> None:
        self._undone -= 1
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
        elif error is None and result is not None:
            drop(result)
