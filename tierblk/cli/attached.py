"""Reads a device that a daemon has, through that daemon: only there it is known at every moment where a page
of a volume in object storage is. What is fetched for that is cached, like what anybody else reads."""

from __future__ import annotations

import asyncio
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from tierblk.cli.client import Daemon, DeadSocket, device_path
from tierblk.errors import DaemonError, RemoteUnavailable, TierblkError
from tierblk.reader import Tally

ANSWER_TIMEOUT_S = 600.0
"""A window of many misses, with all their retries."""

_PAUSE_S = 1.0


class AttachedReader:
    """As DeviceReader."""

    def __init__(
        self,
        daemon: Daemon,
        name: str,
        size_bytes: int,
        patience_s: float,
        on_trouble: Callable[[TierblkError], None],
        parts: Callable[[], Iterator[tuple[int, int]]],
    ) -> None:
        """patience_s: how long a remote that does not answer is borne. parts: its windows, see
        reader.windows."""
        self.size_bytes = size_bytes
        self.tally = Tally()
        self._daemon = daemon
        self._name = name
        self._patience_s = patience_s
        self._on_trouble = on_trouble
        self._parts = parts

    def windows(self) -> Iterator[tuple[int, int]]:
        """See DeviceReader.windows."""
        return self._parts()

    async def read(self, offset_bytes: int, length_bytes: int, buffer: mmap.mmap) -> None:
        """See DeviceReader.read."""
        path = f"{device_path(self._name)}/content?offset={offset_bytes}&length={length_bytes}"
        since_s = time.monotonic()
        while True:
            try:
                content = await _in_thread(partial(self._daemon.read, path, ANSWER_TIMEOUT_S))
                break
            except DeadSocket:
                raise DaemonError(f"{self._daemon} ended while it was asked") from None
            except RemoteUnavailable as error:
                if time.monotonic() - since_s >= self._patience_s:
                    raise
                self._on_trouble(error)
            await asyncio.sleep(_PAUSE_S)
        if len(content) != length_bytes:
            raise DaemonError(f"{self._daemon} gave {len(content)} bytes instead of {length_bytes}")
        buffer[:length_bytes] = content


async def _in_thread(ask: Callable[[], bytes]) -> bytes:
    """In one that nobody waits for behind a Ctrl-C, as the end of a program waits for asyncio.to_thread's."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def settle(content: bytes | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(content or b"")

    def work() -> None:
        content, failure = None, None
        try:
            content = ask()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, content, failure)

    threading.Thread(target=work, daemon=True).start()
    return await answer
