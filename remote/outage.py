"""What is done while a source is silent or down: nobody hammers it, and nobody misses its return.

A source is *down* once a fetch has used up its retries. Fetches then wait here. A source is *silent* as far
as a read knows that has had no byte for a while; it goes on waiting, and registers here too. As long as
anybody is registered, one of them is told to ask, on a new connection, about once a second: the answer to a
request that was swallowed yesterday may never come, a new connection finds the server within a second of
its return. The first sign of life releases all.

There is no task here and nobody holds a role that could get lost: a timer picks the next one each time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from tierblk.errors import RemoteUnavailable
from tierblk.remote.pace import Priority, Ticket
from tierblk.remote.retry import retry_after_s

log = logging.getLogger(__name__)

PROBE_S = 1.0


class Stalled(Protocol):
    """A read in flight to which nothing comes."""

    def probe(self) -> None:
        """Ask once more, on a new connection, beside the old one."""

    def answered(self) -> None:
        """The source answers others: what is silent now has lost its connection."""


class Outage:
    """The state of one source. All of it runs on the event loop."""

    def __init__(self, name: str, rng: Callable[[], float], clock: Callable[[], float]) -> None:
        """name: of the source, for the log. clock: seconds, the same that the running loop counts."""
        self._name = name
        self._rng = rng
        self._clock = clock
        self._gate: dict[asyncio.Future[RemoteUnavailable | None], Ticket | None] = {}
        self._stalled: dict[Stalled, None] = {}
        self._silent_since: float | None = None  # Unix time
        self._timer: asyncio.TimerHandle | None = None
        self._next_s = 0.0  # when somebody may ask
        self.error: RemoteUnavailable | None = None  # why the source is down
        self._down_since: float | None = None  # Unix time

    @property
    def down(self) -> bool:
        """Whether a fetch has to wait for its `turn`."""
        return self.error is not None

    @property
    def since(self) -> float | None:
        """Unix time since when something is wrong; None: nothing is."""
        return self._down_since or self._silent_since

    @property
    def waiting(self) -> int:
        """How many fetches wait for the source to come back."""
        return len(self._gate) + len(self._stalled)

    @property
    def next_probe_s(self) -> float | None:
        """In how many seconds the source is asked again; None when nobody would ask."""
        return max(0.0, self._next_s - self._clock()) if self.waiting else None

    def alive(self) -> None:
        """The source gave a sign of life."""
        if self.error is None and not self._stalled:
            return
        if self.error is not None:
            log.info("%s answers again", self._name)
        self.error = self._down_since = self._silent_since = None
        gate, self._gate = self._gate, {}
        stalled, self._stalled = self._stalled, {}
        self._arm()
        for turn in gate:
            if not turn.done():
                turn.set_result(None)
        for read in stalled:
            read.answered()

    def failed(self, error: RemoteUnavailable) -> None:
        """A fetch has used up its retries, or a probe failed."""
        now_s = self._clock()
        if self.error is None:
            log.info("%s; it is down until it answers again", error)
            self._down_since = self._silent_since or time.time()
            self._next_s = max(self._next_s, now_s + self._pause_s())
        self.error = error
        self._next_s = max(self._next_s, now_s + retry_after_s(error))
        gate, self._gate = self._gate, {}
        for turn in gate:
            if not turn.done():
                turn.set_result(error)
        self._arm()

    async def turn(self, ticket: Ticket | None) -> RemoteUnavailable | None:
        """While the source is down: wait until the caller may ask (None), or somebody asked in vain."""
        turn: asyncio.Future[RemoteUnavailable | None] = asyncio.get_running_loop().create_future()
        self._gate[turn] = ticket
        self._arm()
        try:
            return await turn
        finally:
            self._gate.pop(turn, None)
            self._arm()

    def join(self, read: Stalled) -> None:
        """This read has had no byte for too long."""
        if self._silent_since is None:
            self._silent_since = time.time()
        self._stalled[read] = None
        self._arm()

    def leave(self, read: Stalled) -> None:
        """It is over, or it moves again."""
        self._stalled.pop(read, None)
        if not self._stalled:
            self._silent_since = None
        self._arm()

    def _pause_s(self) -> float:
        return PROBE_S * (0.75 + 0.25 * self._rng())  # clients that failed together do not ask together

    def _arm(self) -> None:
        """The timer runs while somebody is registered."""
        if bool(self.waiting) == (self._timer is not None):
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        else:
            delay_s = max(0.0, self._next_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._probe)

    def _probe(self) -> None:
        """Tell one to ask. Those in flight first: they have their place, the others may have to wait for
        one."""
        self._timer = None
        if self._next_s <= self._clock():
            self._next_s = self._clock() + self._pause_s()
            if self._stalled:
                read = next(iter(self._stalled))
                self._stalled[read] = self._stalled.pop(read)  # to the end
                read.probe()
            else:
                turn = min(self._gate, key=self._urgency)
                del self._gate[turn]
                if not turn.done():
                    turn.set_result(None)
        self._arm()

    def _urgency(self, turn: asyncio.Future[RemoteUnavailable | None]) -> Priority:
        ticket = self._gate[turn]
        return Priority.DEMAND if ticket is None else ticket.priority
