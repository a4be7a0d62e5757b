"""What a volume sends to its store: asked again until there is an answer, no faster than allowed, and behind
those who read."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.far import FarVolume
from tierblk.remote import RECORD_BYTES_MAX, Store, TokenBucket

log = logging.getLogger(__name__)

T = TypeVar("T")

DELAY_MOST_S = 15.0
_DELAY_S = 0.2
_GIVE_WAY_S = 0.02


class Sender:
    """All of it belongs to the event loop. trouble, trouble_since: why nothing gets through at present, and
    since when (Unix time). puts, stored_bytes: so far."""

    def __init__(
        self,
        volume: FarVolume,
        *,
        bytes_per_s: float | None = None,
        demand: Callable[[], bool] = lambda: False,
        rng: Callable[[], float] = random.random,
    ) -> None:
        """demand: whether anybody waits for bytes of any remote. rng: uniform in [0, 1)."""
        self.trouble: TierblkError | None = None
        self.trouble_since: float | None = None
        self._try_at_s: float | None = None  # of the loop's clock
        self.puts = self.stored_bytes = 0
        self._volume = volume
        self._demand = demand
        self._rng = rng
        self._sending = 0
        clock = asyncio.get_running_loop().time
        self._bucket = TokenBucket(bytes_per_s, clock) if bytes_per_s else None

    @property
    def store(self) -> Store:
        """The volume's own."""
        assert self._volume.lineage is not None
        return self._volume.lineage.store

    async def create(self, name: str, pieces: Sequence[bytes | memoryview]) -> bool:
        """Store.create, until there is an answer."""
        length_bytes = sum(map(len, pieces))

        async def once() -> bool:
            await self._turn(length_bytes)
            self._sending += 1
            self.puts += 1
            try:
                return await self.store.create(name, pieces)
            finally:
                self._sending -= 1

        made = await self.persist(once)
        self.stored_bytes += length_bytes
        return made

    async def read_record(self, name: str) -> bytes | None:
        """Store.read of an epoch's record, until there is an answer."""
        return await self.persist(lambda: self.store.read(name, RECORD_BYTES_MAX))

    async def _turn(self, length_bytes: int) -> None:
        """Until it may go. Those who read have the link; one upload goes on beside them, or a busy reader
        would stop all writers."""
        delay_s = self._bucket.delay_s() if self._bucket is not None else 0.0
        while delay_s or (self._sending and self._demand()):
            await asyncio.sleep(delay_s or _GIVE_WAY_S)
            delay_s = self._bucket.delay_s() if self._bucket is not None else 0.0
        if self._bucket is not None:
            self._bucket.take(length_bytes)

    async def persist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks until there is an answer. What is refused is asked again too, later each time: credentials
        and permissions are mended while we wait, and what is dirty stays safe here."""
        delay_s = _DELAY_S
        volume = self._volume
        while True:
            try:
                answer = await ask()
            except (RemoteUnavailable, RemoteRefused) as error:
                if self.trouble is None:
                    log.warning("%s: %s; what is written is kept here until it is back", volume.name, error)
                self.failed(error)
                if isinstance(error, RemoteUnavailable) and error.retry_after_s:
                    delay_s = max(delay_s, min(error.retry_after_s, DELAY_MOST_S))
                pause_s = delay_s * (0.5 + self._rng() / 2)
                self._try_at_s = asyncio.get_running_loop().time() + pause_s
                await asyncio.sleep(pause_s)
                delay_s = min(2 * delay_s, DELAY_MOST_S)
            else:
                if self.trouble is not None:
                    log.warning("%s: %s takes what is written again", volume.name, volume.shown)
                self.trouble = self.trouble_since = self._try_at_s = None
                return answer

    @property
    def sending(self) -> int:
        """How many objects are on their way."""
        return self._sending

    @property
    def next_try_s(self) -> float | None:
        """In how many seconds what did not get through is sent again; None: nothing waits for that."""
        if self.trouble is None or self._try_at_s is None:
            return None
        return max(0.0, self._try_at_s - asyncio.get_running_loop().time())

    def failed(self, error: TierblkError) -> None:
        """Nothing gets through, for this reason."""
        self.trouble_since = self.trouble_since or time.time()
        self.trouble = error
