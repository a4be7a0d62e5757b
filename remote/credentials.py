"""Where the credentials of an S3 store come from: the usual chain, as botocore knows it.

Environment, shared profile (with a process, a role or SSO), web identity, container, instance metadata
(IMDSv2): in the order and by the rules of botocore's own documentation. It blocks and takes long to import,
so it is loaded when the first store is opened and runs in threads.

Temporary ones are asked for anew while they still hold: with less than RENEW_BEFORE_S left, or with less than
a third of their life where that is shorter. One renewal serves all that wait; while it fails, the old ones
serve as long as they hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.sigv4 import Credentials

RENEW_BEFORE_S = 300.0
RETRY_S = 5.0  # after a renewal that failed, while the old ones hold

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lease:
    """Credentials and until when they hold (Unix time); None: for good."""

    credentials: Credentials
    until_unix_s: float | None = None


class ChainWallet:
    """See s3.Wallet for what its methods promise."""

    def __init__(
        self,
        profile: str | None = None,
        *,
        fetch: Callable[[str | None], Lease] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """profile: of the shared files; None: as the environment says. fetch: what asks the chain; blocks.
        clock: Unix time. Arguments, so that tests decide."""
        self._profile = profile
        self._fetch = fetch or from_chain
        self._clock = clock
        self._lease: Lease | None = None
        self._renew_at_unix_s = 0.0
        self._renewal: asyncio.Task[None] | None = None

    async def current(self) -> Credentials:
        """Those that hold now. RemoteRefused when there are none, RemoteUnavailable when those that there
        were have expired and new ones cannot be had now."""
        now = self._clock()
        if self._lease is None or self._is_over(now):
            await self._renew()
        elif now >= self._renew_at_unix_s and self._renewal is None:
            self._begin()  # nobody waits for it: the old ones hold
        assert self._lease is not None
        return self._lease.credentials

    async def renewed(self, refused: Credentials) -> Credentials | None:
        """Others than the refused ones; None when the chain has no others."""
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
        lease = await asyncio.to_thread(self._fetch, self._profile)
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


def from_chain(profile: str | None) -> Lease:
    """What botocore's chain gives now. Blocks. RemoteRefused: it gives nothing; RemoteUnavailable: it cannot
    now."""
    import botocore.exceptions
    import botocore.session

    try:
        # A new session each time: what it would keep are the credentials that are to be replaced.
        found = botocore.session.Session(profile=profile).get_credentials()
        if found is None:
            raise RemoteRefused(
                "there are no credentials for S3",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, or give this machine a role",
            )
        frozen = found.get_frozen_credentials()
    except (botocore.exceptions.ProfileNotFound, botocore.exceptions.ConfigParseError) as error:
        raise RemoteRefused(f"the credentials for S3 cannot be read: {error}") from None
    except TierblkError:
        raise
    except Exception as error:
        # Not its words: a provider's program or server may have said anything, secrets included.
        raise RemoteUnavailable(f"credentials for S3 cannot be had now ({_named(error)})") from None
    if not frozen.access_key or not frozen.secret_key:
        raise RemoteRefused("the credentials for S3 are empty")
    return Lease(Credentials(frozen.access_key, frozen.secret_key, frozen.token), _expiry_unix_s(found))


def _named(error: Exception) -> str:
    provider = getattr(error, "kwargs", {}).get("provider")
    return f"{type(error).__name__}, from {provider}" if provider else type(error).__name__


def _expiry_unix_s(found: Any) -> float | None:
    """A private name of botocore's; a test notices when it goes."""
    expiry = getattr(found, "_expiry_time", None)
    return None if expiry is None else float(expiry.timestamp())
