"""The one place through which all reads of a source go: how many at once, and what happens when one fails."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierblk.errors import RemoteUnavailable, TierblkError
from tierblk.remote.source import Progress, Source

if TYPE_CHECKING:
    from tierblk.config import RemoteSettings

log = logging.getLogger(__name__)

DELAY_MAX_S = 30.0


def plan_windows(blocks: Sequence[int], max_blocks: int) -> list[range]:
    """The requests that fetch these blocks: neighbours together, at most max_blocks (>= 1) in one.

    blocks: any order, repetitions allowed. The ranges are sorted, do not overlap, and hold exactly these
    blocks.
    """
    if max_blocks < 1:
        raise ValueError(f"a window has at least one block, not {max_blocks}")
    windows: list[range] = []
    for block in sorted(set(blocks)):
        last = windows[-1] if windows else None
        if last is not None and block == last.stop and len(last) < max_blocks:
            windows[-1] = range(last.start, block + 1)
        else:
            windows.append(range(block, block + 1))
    return windows


def backoff_s(attempt: int, first_s: float, chance: float) -> float:
    """How long to wait before retry number attempt (from 0): doubling, capped, and spread over its upper
    half.

    chance: in [0, 1). The spread keeps clients that failed together from coming back together.
    """
    longest_s = min(first_s * 2.0 ** min(attempt, 64), DELAY_MAX_S)
    return longest_s * (0.5 + 0.5 * chance)


@dataclass
class FetchCounters:
    """What a fetcher did so far.

    requests: reads begun, retries included; answers that a redirect added are not seen here. fetched_bytes:
    bytes that arrived, each counted once. retries: reads that continued a failed one. errors: fetches that
    were given up. in_flight: reads that run now.
    """

    requests: int = 0
    fetched_bytes: int = 0
    retries: int = 0
    errors: int = 0
    in_flight: int = 0


class Fetcher:
    """Reads of one source: at most max_requests at once, first come first served, with bounded retries."""

    def __init__(
        self,
        source: Source,
        settings: RemoteSettings,
        *,
        rng: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """rng: uniform in [0, 1). sleep: waits that many seconds. Arguments, so that tests need no clock."""
        self.source = source
        self.counters = FetchCounters()
        self._slots = asyncio.Semaphore(settings.max_requests)
        self._retries = settings.retries
        self._retry_delay_s = settings.retry_delay
        self._rng = rng
        self._sleep = sleep

    async def fetch(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """Fill the buffer with the source's bytes from offset_bytes on; see Source.read_into for the
        promises.

        A read that fails with RemoteUnavailable goes on behind the bytes that it brought, after a pause in
        which its place is free for others. Raises the last error when the retries are used up, RemoteRefused
        at once.
        """
        arrived_bytes = 0

        def arrive(count: int) -> None:
            nonlocal arrived_bytes
            self.counters.fetched_bytes += count - arrived_bytes
            arrived_bytes = count
            progress(count)

        for attempt in range(self._retries + 1):
            try:
                await self._attempt(offset_bytes, buffer, arrived_bytes, arrive)
                return
            except RemoteUnavailable as error:
                if arrived_bytes == len(buffer):
                    return  # it failed behind the last byte
                if attempt == self._retries:
                    self.counters.errors += 1
                    raise
                delay_s = backoff_s(attempt, self._retry_delay_s, self._rng())
                log.info("%s; trying again in %.1f s", error, delay_s)
            except TierblkError:
                self.counters.errors += 1
                raise
            await self._sleep(delay_s)
            self.counters.retries += 1

    async def _attempt(
        self, offset_bytes: int, buffer: memoryview, arrived_bytes: int, arrive: Progress
    ) -> None:
        """Read what is still missing. arrive(n): the first n bytes of the whole buffer are there."""
        async with self._slots:
            self.counters.requests += 1
            self.counters.in_flight += 1
            try:
                await self.source.read_into(
                    offset_bytes + arrived_bytes,
                    buffer[arrived_bytes:],
                    lambda count: arrive(arrived_bytes + count),
                )
            finally:
                self.counters.in_flight -= 1
