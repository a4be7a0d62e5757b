"""One try of a fetch: a read into the caller's buffer, watched by a timer, and at most one read beside it.

The second read goes into memory of its own (R5). It is begun when the first one is among the slowest
hundredth, as far as the budget and the places go, or when the source is silent and it is this fetch's
turn to ask again. As soon as the second is ahead, the first is cancelled, and it has ended before
anything of the second is copied into the caller's buffer. The first runs in the caller's own task: most
reads never see more than a timer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tierblk.errors import RemoteMismatch, RemoteUnavailable
from tierblk.extent import PAGE_BYTES
from tierblk.remote.hedge import Budget, Latencies
from tierblk.remote.outage import Outage
from tierblk.remote.pace import Places, Ticket
from tierblk.remote.source import Progress

HEDGE_AGAIN_S = 0.25
SECOND_BYTES_MAX = 1024 * 1024  # what a second read brings at most, and so what its memory costs


class Read(Protocol):
    """Source.read_into, or one like it."""

    async def __call__(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None: ...


@dataclass
class FetchCounters:
    """What a fetcher did so far.

    requests: reads begun, retries and second ones included; answers that a redirect added are not seen here.
    fetched_bytes: bytes that arrived, each counted once. wasted_bytes: bytes that a second read brought and
    nobody used. retries: reads that continued one that failed or fell silent. errors: fetches that were given
    up. in_flight: reads that run now. hedges: second reads for slow answers; hedges_won: those whose bytes
    were used. waiting: fetches that wait for a place.
    """

    requests: int = 0
    fetched_bytes: int = 0
    wasted_bytes: int = 0
    retries: int = 0
    errors: int = 0
    in_flight: int = 0
    hedges: int = 0
    hedges_won: int = 0
    waiting: int = 0

    def __iadd__(self, other: FetchCounters) -> FetchCounters:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


@dataclass
class Desk:
    """What all fetches of a source share. read_anew: a read on a new connection; None: it has none, so a
    second read would make no difference."""

    read: Read
    read_anew: Read | None
    clock: Callable[[], float]
    places: Places
    outage: Outage
    latencies: Latencies
    budget: Budget
    counters: FetchCounters = field(default_factory=FetchCounters)


class Job:
    """One fetch: what is wanted, and how much of it is there. patience_s: how long a read of it may be silent
    until it is replaced when others are answered; it grows with each time, so that a slow source is not
    asked for ever without being listened to."""

    __slots__ = ("_counters", "_progress", "arrived_bytes", "offset_bytes", "patience_s", "ticket", "view")

    def __init__(
        self,
        offset_bytes: int,
        view: memoryview,
        progress: Progress,
        ticket: Ticket | None,
        counters: FetchCounters,
    ) -> None:
        self.offset_bytes = offset_bytes
        self.view = view
        self.ticket = ticket
        self.arrived_bytes = 0
        self.patience_s = 0.0
        self._progress = progress
        self._counters = counters

    @property
    def missing_bytes(self) -> int:
        return len(self.view) - self.arrived_bytes

    def arrive(self, count: int) -> None:
        """The first count bytes of the view are there and right."""
        if count > self.arrived_bytes:
            self._counters.fetched_bytes += count - self.arrived_bytes
            self.arrived_bytes = count
            self._progress(count)


class Replaced(Exception):
    """A try was given up for a new one, to be made at once and on a new connection."""


class _Second:
    """The read beside: into scratch memory, from where the first one was."""

    def __init__(self, begin_bytes: int, length_bytes: int, begun_s: float, *, hedge: bool) -> None:
        self.begin_bytes = begin_bytes
        self.scratch = memoryview(bytearray(length_bytes))
        self.arrived_bytes = 0
        self.last_s = begun_s
        self.hedge = hedge  # else it asks whether the source lives
        self.task: asyncio.Task[None] | None = None
        self.used_bytes = 0

    @property
    def end_bytes(self) -> int:
        return self.begin_bytes + self.arrived_bytes


class Race:
    """A try. Made, run once, thrown away."""

    __slots__ = (
        "_anew",
        "_begin_bytes",
        "_begun_s",
        "_desk",
        "_first_byte",
        "_job",
        "_last_s",
        "_over",
        "_second",
        "_silent",
        "_stall_s",
        "_task",
        "_timer",
        "_verdict",
        "tries",
    )

    def __init__(self, desk: Desk, job: Job, *, anew: bool) -> None:
        """anew: on a new connection, if the source has such a thing."""
        self._desk = desk
        self._job = job
        self._anew = anew
        self._begin_bytes = job.arrived_bytes
        self._begun_s = self._last_s = desk.clock()
        self._first_byte = False
        self._over = False  # the first read has ended
        self._second: _Second | None = None
        self._silent = False  # registered with the outage
        self._stall_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._verdict: Literal["second", "replace"] | None = None  # why the first read was cancelled
        self.tries = 1

    async def run(self) -> None:
        """Returns when every byte is there. Raises what the read raised, or Replaced."""
        desk, job = self._desk, self._job
        self._task = asyncio.current_task()
        assert self._task is not None
        cancelling = self._task.cancelling()
        read = desk.read
        if desk.read_anew is not None:
            if self._anew:
                read = desk.read_anew
            self._stall_s = desk.latencies.stall_s(job.missing_bytes)
            job.patience_s = max(job.patience_s, self._stall_s)
            self._look_later(min(self._stall_s, desk.latencies.slow_first_byte_s(job.missing_bytes)))
        desk.counters.requests += 1
        desk.counters.in_flight += 1
        try:
            error: RemoteUnavailable | None = None
            try:
                begin = self._begin_bytes
                await read(job.offset_bytes + begin, job.view[begin:] if begin else job.view, self._arrive)
            except RemoteUnavailable as caught:
                error = caught
            except asyncio.CancelledError:
                if self._verdict is None or self._task.cancelling() > cancelling + 1:
                    raise
            finally:
                self._over = True
                desk.counters.in_flight -= 1
                if self._verdict is not None:
                    self._task.uncancel()
            if job.missing_bytes:
                await self._without_first(error, cancelling)
            elif self._verdict is None and error is None:
                desk.latencies.whole(len(job.view) - self._begin_bytes, desk.clock() - self._begun_s)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._silent:
                desk.outage.leave(self)
            if self._second is not None:
                await self._drop_second()

    async def _without_first(self, error: RemoteUnavailable | None, cancelling: int) -> None:
        """The first read has ended before its end. If there is a second, it takes over."""
        second = self._second
        if self._verdict == "replace" or second is None or second.task is None:
            raise error or Replaced
        self._copy(second)
        try:
            await second.task
        except asyncio.CancelledError:
            assert self._task is not None
            if self._task.cancelling() > cancelling:
                raise
            # It stalled, and _look ended it. The first one's failure counts, or a source that is silent for
            # good would be asked for ever.
            raise (error or Replaced) from None
        except RemoteMismatch as wrong:
            raise (error or wrong) from None
        if self._job.missing_bytes:
            raise Replaced  # a second read is no longer than its memory

    # --- what comes ---

    def _arrive(self, count: int) -> None:
        """The first read brought count bytes."""
        desk = self._desk
        self._last_s = desk.clock()
        if not self._first_byte:
            self._first_byte = True
            length = len(self._job.view) - self._begin_bytes
            desk.latencies.first_byte(length, self._last_s - self._begun_s)
        if self._silent:
            self._silent = False
            desk.outage.leave(self)
        self._job.arrive(self._begin_bytes + count)
        if count >= PAGE_BYTES or not self._job.missing_bytes:
            desk.outage.alive()

    def _second_arrives(self, second: _Second, count: int) -> None:
        second.arrived_bytes = count
        second.last_s = self._desk.clock()
        if self._over:
            self._copy(second)
        elif self._verdict is None and second.end_bytes > self._job.arrived_bytes:
            self._give_up_first("second")
        if count >= PAGE_BYTES or count == len(second.scratch):
            self._desk.outage.alive()

    def _give_up_first(self, verdict: Literal["second", "replace"]) -> None:
        assert self._task is not None
        self._verdict = verdict
        if self._second is not None and self._second.hedge and verdict == "second":
            # It would have taken even longer, and to forget it would make the slow ones look fast. One that
            # was silent for too long is no latency but a broken connection.
            waited_s = self._desk.clock() - self._begun_s
            length = len(self._job.view) - self._begin_bytes
            if not self._first_byte:
                self._desk.latencies.first_byte(length, waited_s)
            self._desk.latencies.whole(length, waited_s)
        self._task.cancel()

    def _copy(self, second: _Second) -> None:
        """Put what the second read has into the caller's buffer, to which nobody else writes now."""
        job, begin, end = self._job, self._job.arrived_bytes, second.end_bytes
        if end > begin:
            if second.hedge and not second.used_bytes:
                self._desk.counters.hedges_won += 1
            second.used_bytes += end - begin
            job.view[begin:end] = second.scratch[begin - second.begin_bytes : second.arrived_bytes]
            job.arrive(end)

    # --- what does not come ---

    def _look_later(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        """The timer: is the answer slow, is it silent?"""
        now_s = self._desk.clock()
        if self._over:
            next_s = self._look_at_second(now_s)
        else:
            next_s = min(self._look_at_speed(now_s), self._look_at_silence(now_s))
        self._look_later(max(next_s - now_s, 0.001))

    def _look_at_second(self, now_s: float) -> float:
        """The second read is all there is. When to look again."""
        second = self._second
        if second is None or second.task is None:
            return now_s + self._stall_s
        if now_s - second.last_s >= self._stall_s:
            second.task.cancel()
        return max(second.last_s, now_s - self._stall_s / 2) + self._stall_s

    def _look_at_speed(self, now_s: float) -> float:
        """A second read if this is one of the slowest hundredth: slow to begin, later slow to end. When to
        look again."""
        latencies, length = self._desk.latencies, len(self._job.view) - self._begin_bytes
        slow_s = (latencies.slow_whole_s if self._first_byte else latencies.slow_first_byte_s)(length)
        at_s = self._begun_s + slow_s
        if self._second is not None or now_s < at_s:
            return at_s if now_s < at_s else math.inf
        self._hedge()
        return now_s + max(slow_s, HEDGE_AGAIN_S)  # the budget may have had no room for it

    def _look_at_silence(self, now_s: float) -> float:
        """Register a read to which nothing comes. When to look again."""
        if not self._silent and now_s - self._last_s >= self._job.patience_s:
            self._silent = True
            self._desk.outage.join(self)
        if self._silent:
            return now_s + self._stall_s
        return self._last_s + self._job.patience_s

    def _hedge(self) -> None:
        length = min(self._job.missing_bytes, SECOND_BYTES_MAX)
        desk = self._desk
        if self._job.ticket is not None and self._job.ticket.priority:
            return  # nobody waits for it: the budget is for those who do
        if desk.outage.down or not desk.budget.may() or not desk.places.try_take(length):
            return
        desk.budget.spend()
        desk.counters.hedges += 1
        self._begin_second(length, desk.read, hedge=True)

    def probe(self) -> None:
        """See outage.Stalled: ask again beside the read that is silent. It comes on top of the places."""
        second, now_s = self._second, self._desk.clock()
        if self._verdict is not None or self._over or self._desk.read_anew is None:
            return
        if second is not None and second.task is not None:
            if now_s - second.last_s < self._stall_s / 2:
                return
            second.task.cancel()  # nobody waits for its end: its memory is its own
            self._settle(second)
        self._desk.counters.retries += 1
        self.tries += 1
        length = min(self._job.missing_bytes, SECOND_BYTES_MAX)
        self._begin_second(length, self._desk.read_anew, hedge=False)

    def answered(self) -> None:
        """See outage.Stalled."""
        self._silent = False
        silent_s = self._desk.clock() - self._last_s
        if self._verdict is None and not self._over and silent_s >= self._job.patience_s:
            if self._second is not None and self._second.arrived_bytes:
                return  # the sign of life came to this very fetch
            self._job.patience_s *= 2
            self._give_up_first("replace")

    def _begin_second(self, length_bytes: int, read: Read, *, hedge: bool) -> None:
        second = _Second(self._job.arrived_bytes, length_bytes, self._desk.clock(), hedge=hedge)
        second.task = asyncio.create_task(self._run_second(second, read), name="a second read")
        second.task.add_done_callback(self._second_ended)
        self._second = second

    async def _run_second(self, second: _Second, read: Read) -> None:
        counters = self._desk.counters
        counters.requests += 1
        counters.in_flight += 1
        try:
            at = self._job.offset_bytes + second.begin_bytes
            await read(at, second.scratch, lambda count: self._second_arrives(second, count))
        finally:
            counters.in_flight -= 1

    def _second_ended(self, task: asyncio.Task[None]) -> None:
        second = self._second
        if not task.cancelled():
            task.exception()  # seen: as long as the first read runs, it is no failure
        if second is not None and second.task is task and not self._over and self._verdict is None:
            self._second = None  # it failed, or was overtaken at its very end
            self._settle(second)

    def _settle(self, second: _Second) -> None:
        self._desk.counters.wasted_bytes += second.arrived_bytes - second.used_bytes
        if second.hedge:
            self._desk.places.give(None, len(second.scratch) - second.arrived_bytes)

    async def _drop_second(self) -> None:
        """End the second read and see it end, however often this is cancelled meanwhile."""
        second, self._second = self._second, None
        if second is None or second.task is None:
            return
        second.task.cancel()
        cancelled: asyncio.CancelledError | None = None
        while not second.task.done():
            try:
                await asyncio.wait([second.task])
            except asyncio.CancelledError as error:
                cancelled = error
        self._settle(second)
        if cancelled is not None:
            raise cancelled
