"""Who may ask the remote now: places in flight, requests and bytes a second, and whose turn it is.

Demand goes strictly before readahead, in three ways: in the queue; in flight, where readahead never holds the
last quarter of the places; and under a cap, where what readahead already took delays readahead alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum

BURST_S = 0.25  # how much of a cap can be saved up
ROUNDING_S = 1e-6  # a debt that is paid off sooner is none


class Priority(IntEnum):
    """Whose turn it is when not all can go: lower first."""

    DEMAND = 0  # somebody waits for the bytes
    READAHEAD = 1  # somebody may want them soon


class Ticket:
    """The handle of one fetch: its priority, which may change at any time."""

    __slots__ = ("_priority", "moved")

    def __init__(self, priority: Priority = Priority.DEMAND) -> None:
        self._priority = priority
        self.moved: Callable[[], None] | None = None  # set by the Places that the holder waits for or has

    @property
    def priority(self) -> Priority:
        return self._priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        self._priority = priority
        if self.moved is not None:
            self.moved()


class TokenBucket:
    """rate_per_s tokens come in a second, and BURST_S of them can be kept. Who goes pays afterwards: going is
    allowed while nothing is owed, whatever it costs, so no request is too large to ever go."""

    def __init__(self, rate_per_s: float, clock: Callable[[], float]) -> None:
        self._rate_per_s = rate_per_s
        self._most = rate_per_s * BURST_S
        self._level = self._most
        self._clock = clock
        self._at_s = clock()

    def delay_s(self) -> float:
        """How long until somebody may go."""
        now_s = self._clock()
        self._level = min(self._level + (now_s - self._at_s) * self._rate_per_s, self._most)
        self._at_s = now_s
        delay_s = -self._level / self._rate_per_s
        return delay_s if delay_s > ROUNDING_S else 0.0

    def take(self, count: float) -> None:
        """Pay; a negative count gives back."""
        self._level -= count


class Cap:
    """A limit that all traffic keeps in the long run, and that demand never waits for because of readahead:
    demand looks at a bucket from which demand alone takes, readahead at one from which all take."""

    def __init__(self, rate_per_s: float, clock: Callable[[], float]) -> None:
        self._buckets = TokenBucket(rate_per_s, clock), TokenBucket(rate_per_s, clock)

    def delay_s(self, priority: Priority) -> float:
        """How long until a request of this priority may go."""
        return self._buckets[priority].delay_s()

    def take(self, count: float, priority: Priority) -> None:
        """A request of this priority went."""
        for bucket in self._buckets[priority:]:
            bucket.take(count)


class _Waiter:
    __slots__ = ("future", "length_bytes", "priority", "ticket")

    def __init__(self, length_bytes: int, ticket: Ticket | None, priority: Priority) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.length_bytes = length_bytes
        self.ticket = ticket
        self.priority = priority


class Places:
    """Lets at most `places` requests be in flight, and no more a second than the caps allow; waiting ones go
    in their order, demand first. clock: seconds, the same that the
    running loop counts."""

    def __init__(
        self,
        places: int,
        clock: Callable[[], float],
        *,
        request_rate: float | None = None,
        bandwidth: float | None = None,
    ) -> None:
        self._free = places
        self._ahead_most = max(1, places - max(1, places // 4))
        self._ahead: set[Ticket] = set()  # who is in flight as readahead
        self._queues: tuple[deque[_Waiter], ...] = tuple(deque() for _ in Priority)
        self._requests = None if request_rate is None else Cap(request_rate, clock)
        self._bytes = None if bandwidth is None else Cap(bandwidth, clock)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues))

    def try_take(self, length_bytes: int, ticket: Ticket | None = None) -> bool:
        """Take a place if one can be had at once, without passing anybody."""
        priority = Priority.DEMAND if ticket is None else ticket.priority
        if not self._free or any(self._queues[: priority + 1]) or self._delay_s(priority):
            return False
        if priority and len(self._ahead) >= self._ahead_most:
            return False
        self._enter(length_bytes, ticket, priority)
        return True

    async def take(self, length_bytes: int, ticket: Ticket | None = None) -> None:
        """Wait for a place in flight for a request of so many bytes; `give` it back when it is over."""
        if self.try_take(length_bytes, ticket):
            return
        waiter = _Waiter(length_bytes, ticket, Priority.DEMAND if ticket is None else ticket.priority)
        self._queues[waiter.priority].append(waiter)
        if ticket is not None:
            ticket.moved = lambda: self._move(waiter)
        self._advance()
        try:
            await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():
                self.give(ticket, length_bytes)  # it came, but nobody is here any more
            else:
                with suppress(ValueError):  # _advance has met it already
                    self._queues[waiter.priority].remove(waiter)
                self._advance()  # the timer may have been for this one
            raise

    def give(self, ticket: Ticket | None = None, unused_bytes: int = 0) -> None:
        """The request is over; unused_bytes of it never came."""
        self._free += 1
        if ticket is not None:
            self._ahead.discard(ticket)
            ticket.moved = None
        if self._bytes is not None and unused_bytes:
            self._bytes.take(-unused_bytes, Priority.DEMAND if ticket is None else ticket.priority)
        self._advance()

    def close(self) -> None:
        """Forget the timer; who waits is cancelled by whoever owns it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _enter(self, length_bytes: int, ticket: Ticket | None, priority: Priority) -> None:
        self._free -= 1
        if self._requests is not None:
            self._requests.take(1, priority)
        if self._bytes is not None:
            self._bytes.take(length_bytes, priority)
        if ticket is not None:
            ticket.moved = None
            if priority:
                self._ahead.add(ticket)
                ticket.moved = lambda: self._raised(ticket)

    def _raised(self, ticket: Ticket) -> None:
        """Readahead in flight for which somebody waits now is readahead no longer."""
        if ticket.priority is Priority.DEMAND:
            self._ahead.discard(ticket)
            self._advance()

    def _move(self, waiter: _Waiter) -> None:
        """A waiting ticket's priority changed: it goes to the end of its new queue."""
        assert waiter.ticket is not None
        if waiter.ticket.priority != waiter.priority and not waiter.future.done():
            self._queues[waiter.priority].remove(waiter)
            waiter.priority = waiter.ticket.priority
            self._queues[waiter.priority].append(waiter)
            self._advance()

    def _delay_s(self, priority: Priority) -> float:
        delay_s = 0.0 if self._requests is None else self._requests.delay_s(priority)
        return delay_s if self._bytes is None else max(delay_s, self._bytes.delay_s(priority))

    def _advance(self) -> None:
        """Let go whoever may."""
        self.close()
        for priority, queue in zip(Priority, self._queues, strict=True):
            while queue:
                if queue[0].future.done():  # cancelled, and its task has not run yet
                    queue.popleft()
                    continue
                if not self._free or (priority and len(self._ahead) >= self._ahead_most):
                    return  # the next `give` comes here again
                if delay_s := self._delay_s(priority):
                    self._timer = asyncio.get_running_loop().call_later(delay_s, self._advance)
                    return
                waiter = queue.popleft()
                self._enter(waiter.length_bytes, waiter.ticket, priority)
                waiter.future.set_result(None)
