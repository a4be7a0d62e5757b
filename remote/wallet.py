"""What a store pays with: credentials that are renewed before they expire, wherever they come from.

Temporary ones are asked for anew while they still hold: with less than RENEW_BEFORE_S left, or with less than
a third of their life where that is shorter. One renewal serves all that wait; while it fails, the old ones
serve as long as they hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tierblk.errors import RemoteUnavailable

RENEW_BEFORE_S = 300.0
RETRY_S = 5.0  # after a renewal that failed, while the old ones hold

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)

log = logging.getLogger(__name__)


class Wallet(Protocol[C]):
    """Where credentials come from. Both may raise RemoteUnavailable or RemoteRefused."""

    async def current(self) -> C:
        """Those that hold now, renewed before they expire."""

    async def renewed(self, refused: C) -> C | None:
        """Others than those which were refused; None when there are none."""


@dataclass(frozen=True, slots=True)
class Lease(Generic[C_co]):
    """Credentials and until when they hold (Unix time); None: for good."""

    credentials: C_co
    until_unix_s: float | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """Who has it may ask (OAuth). It is never shown."""

    text: str = field(repr=False)


class FixedWallet(Generic[C]):
    """Credentials that nobody renews. See Wallet for what its methods promise."""

    def __init__(self, credentials: C) -> None:
        self._credentials = credentials

    async def current(self) -> C:
        """The same each time."""
        return self._credentials

    async def renewed(self, refused: C) -> C | None:
        """There are no others."""
        return None


class RenewingWallet(Generic[C]):
    """See Wallet for what its methods promise."""

    def __init__(self, fetch: Callable[[], Lease[C]], *, clock: Callable[[], float] = time.time) -> None:
        """fetch: asks for credentials; blocks, so it runs in a thread. clock: Unix time."""
        self._fetch = fetch
        self._clock = clock
        self._lease: Lease[C] | None = None
        self._renew_at_unix_s = 0.0
        self._renewal: asyncio.Task[None] | None = None

    async def current(self) -> C:
        """Those that hold now. RemoteRefused when there are none, RemoteUnavailable when those that there
        were have expired and new ones cannot be had now."""
        now = self._clock()
        if self._lease is None or self._is_over(now):
            await self._renew()
        elif now >= self._renew_at_unix_s and self._renewal is None:
            self._begin()  # nobody waits for it: the old ones hold
        assert self._lease is not None
        return self._lease.credentials

    async def renewed(self, refused: C) -> C | None:
        """Others than the refused ones; None when there are no others to be had."""
        if self._lease is None or self._lease.credentials == refused:
            await self._renew()
        assert self._lease is not None
        return None if self._lease.credentials == refused else self._lease.credentials

    def _is_over(self, now: float) -> bool:
        until = self._lease.until_unix_s if self._lease else None
        return until is not None and now >= until

    def _begin(self) -> asyncio.Task[None]:
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._take(), name="renew credentials")
            self._renewal.add_done_callback(self._ended)
        return self._renewal

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._renewal = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._renew_at_unix_s = self._clock() + RETRY_S
            log.warning("%s", error)

    async def _renew(self) -> None:
        """Whoever leaves early leaves the others their renewal."""
        await asyncio.shield(self._begin())

    async def _take(self) -> None:
        lease = await asyncio.to_thread(self._fetch)
        now = self._clock()
        if lease.until_unix_s is None:
            self._renew_at_unix_s = float("inf")
        elif lease.until_unix_s <= now:
            raise RemoteUnavailable(
                "the credentials that the chain gives have expired",
                "look at what provides them, and the clock",
            )
        else:
            left_s = lease.until_unix_s - now
            self._renew_at_unix_s = lease.until_unix_s - min(RENEW_BEFORE_S, left_s / 3)
        self._lease = lease
