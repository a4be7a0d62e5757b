"""Where the credentials of an S3 store come from: the usual chain, as botocore knows it.

Environment, shared profile (with a process, a role or SSO), web identity, container, instance metadata
(IMDSv2): in the order and by the rules of botocore's own documentation. It blocks and takes long to import,
so it is loaded when the first store is opened and runs in threads. When they are renewed, wallet.py says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.sigv4 import Credentials
from tierblk.remote.wallet import Lease, RenewingWallet


class ChainWallet(RenewingWallet[Credentials]):
    """Renews from the chain."""

    def __init__(
        self,
        profile: str | None = None,
        *,
        fetch: Callable[[str | None], Lease[Credentials]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """profile: of the shared files; None: as the environment says. fetch: what asks the chain; blocks.
        clock: Unix time. Arguments, so that tests decide."""
        ask = fetch or from_chain
        super().__init__(lambda: ask(profile), clock=clock)


def from_chain(profile: str | None) -> Lease[Credentials]:
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
