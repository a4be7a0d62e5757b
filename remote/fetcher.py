"""The one place through which all reads of a source go: how many at once, and what happens when one fails.

pace.py says who may go, race.py makes a try, retry.py says whether there is another, outage.py what happens
while the source is away.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal, TypedDict

from tierblk.errors import RemoteUnavailable, TierblkError
from tierblk.remote.hedge import Budget, Latencies
from tierblk.remote.outage import Outage
from tierblk.remote.pace import Places, Ticket
from tierblk.remote.race import Desk, FetchCounters, Job, Race, Replaced
from tierblk.remote.retry import Retries
from tierblk.remote.source import Progress, Renewable, Source

if TYPE_CHECKING:
    from tierblk.config import RemoteSettings

log = logging.getLogger(__name__)

TELL_S = 1.0  # how often a fetch says that it is in trouble
WARN_S = 1.0  # how often a wrong answer, or another try, is worth a line


class Health(TypedDict):
    """How a source does, for status. since: Unix time. next_try_s: in how many seconds it is asked again;
    None: at the next miss. waiting: fetches that wait for it to come back."""

    state: Literal["ok", "degraded", "refused"]
    since: float | None
    reason: str | None
    next_try_s: float | None
    waiting: int


def _never() -> bool:
    return False


class Fetcher:
    """Reads of one source, as many at once and as fast as the settings allow, demand before readahead."""

    def __init__(
        self,
        source: Source,
        settings: RemoteSettings,
        *,
        rng: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rng: uniform in [0, 1). sleep: waits that many seconds. clock: the time that the running loop
        counts. Arguments, so that tests decide what time it is."""
        self.source = source
        self._settings = settings
        self._rng = rng
        self._sleep = sleep
        self._clock = clock
        self._outage = Outage(source.identity.shown, rng, clock)
        self._places = Places(
            settings.max_requests,
            clock,
            request_rate=settings.max_request_rate,
            bandwidth=settings.max_bandwidth,
        )
        self._desk = Desk(
            read=source.read_into,
            read_anew=source.read_anew if isinstance(source, Renewable) else None,
            clock=clock,
            places=self._places,
            outage=self._outage,
            latencies=Latencies(settings.read_timeout),
            budget=Budget(settings.hedge_percent),
        )
        self._refused: tuple[float, TierblkError] | None = None  # since when (Unix time), why
        self._pausing = 0
        self._warned_s = -math.inf
        self._retry_told_s = -math.inf

    @property
    def counters(self) -> FetchCounters:
        """What it did so far."""
        self._desk.counters.waiting = self._places.waiting
        return self._desk.counters

    def health(self) -> Health:
        """How the source does, as far as the fetches know."""
        outage, waiting = self._outage, self._outage.waiting + self._pausing
        next_s = outage.next_probe_s
        if outage.since is not None:
            reason = str(outage.error or f"{self.source.identity.shown} is silent")
            return Health(
                state="degraded", since=outage.since, reason=reason, next_try_s=next_s, waiting=waiting
            )
        if self._refused is not None:
            since, error = self._refused
            reason = f"{error} ({error.hint})" if error.hint else str(error)
            return Health(state="refused", since=since, reason=reason, next_try_s=None, waiting=waiting)
        return Health(state="ok", since=None, reason=None, next_try_s=None, waiting=waiting)

    async def fetch(
        self,
        offset_bytes: int,
        buffer: memoryview,
        progress: Progress,
        *,
        ticket: Ticket | None = None,
        on_trouble: Callable[[TierblkError], None] | None = None,
        keep_on: Callable[[], bool] = _never,
    ) -> None:
        """Fill the buffer with the source's bytes from offset_bytes on; see Source.read_into for the
        promises, which hold over all tries.

        ticket: how urgent it is; without one somebody waits for it. A read that fails with
        RemoteUnavailable goes on behind the bytes that it brought, on a new connection, after a pause in
        which its place is free for others. When the retries are used up, on_trouble(error) is called, now
        and then again (at most once a second), and as long as keep_on() is true it goes on trying,
        together with all others that wait for the source (outage.py); else it raises the last error. An
        answer that does not fit is asked for once more. RemoteRefused is raised at once.
        """
        job = Job(offset_bytes, buffer.cast("B"), progress, ticket, self._desk.counters)
        retries: Retries | None = None  # most fetches need none
        told_s, tries, outage = -math.inf, 0, self._outage
        while job.missing_bytes:
            error: TierblkError | None = None
            delay_s: float | None = None
            if outage.down:
                error = await outage.turn(ticket)
            if error is None:
                begin, race = job.arrived_bytes, Race(self._desk, job, anew=tries > 0 or outage.down)
                self._desk.counters.retries += tries > 0
                tries += 1
                try:
                    await self._try(race, job)
                    break
                except Replaced:
                    delay_s = 0.0
                except TierblkError as caught:
                    if not job.missing_bytes:
                        break  # it failed behind the last byte
                    error = caught
                    retries = retries or Retries(
                        self._settings.retries, self._settings.retry_delay, self._rng
                    )
                    delay_s = retries.after(caught, job.arrived_bytes - begin, race.tries)
                    if isinstance(caught, RemoteUnavailable):
                        delay_s = self._count_failure(caught, delay_s)
                    else:
                        self._warn(caught, final=delay_s is None)
            if delay_s is None:
                assert error is not None
                now_s = self._clock()
                waits = isinstance(error, RemoteUnavailable)
                if waits and on_trouble is not None and now_s - told_s >= TELL_S:
                    told_s = now_s
                    on_trouble(error)
                if not waits or not keep_on():
                    self._desk.counters.errors += 1
                    raise type(error)(error.message, error.hint) from error
            elif delay_s:
                self._tell_retry(error, delay_s)
                await self._pause(delay_s)
        self._refused = None

    async def _try(self, race: Race, job: Job) -> None:
        """One try in a place of its own."""
        length_bytes, begin = job.missing_bytes, job.arrived_bytes
        if not self._places.try_take(length_bytes, job.ticket):
            await self._places.take(length_bytes, job.ticket)
        self._desk.budget.earn()
        try:
            await race.run()
        finally:
            self._places.give(job.ticket, length_bytes - (job.arrived_bytes - begin))

    def _count_failure(self, error: RemoteUnavailable, delay_s: float | None) -> float | None:
        """What it means for all; the pause until the next try, None: wait for a turn."""
        if delay_s is None or self._outage.down:
            self._outage.failed(error)
            return None
        return delay_s

    def _warn(self, error: TierblkError, *, final: bool) -> None:
        """The source answered, and wrongly: loudly, but not for each of a thousand blocks."""
        self._outage.alive()
        if final and self._refused is None:
            self._refused = time.time(), error
        elif final and self._refused is not None:
            self._refused = self._refused[0], error
        now_s = self._clock()
        if now_s - self._warned_s >= WARN_S:
            self._warned_s = now_s
            log.warning("%s%s", error, "" if final else "; asking once more on a new connection")

    def _tell_retry(self, error: TierblkError | None, delay_s: float) -> None:
        """For all to see once a second: a server that fails one answer in ten would fill the log."""
        now_s = self._clock()
        level = logging.DEBUG
        if now_s - self._retry_told_s >= WARN_S:
            self._retry_told_s, level = now_s, logging.INFO
        log.log(level, "%s; trying again in %.1f s", error, delay_s)

    async def _pause(self, delay_s: float) -> None:
        self._pausing += 1
        try:
            await self._sleep(delay_s)
        finally:
            self._pausing -= 1
