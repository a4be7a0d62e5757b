"""Whether a read that failed is tried again, and when. No I/O."""

from __future__ import annotations

from collections.abc import Callable

from tierblk.errors import RemoteMismatch, RemoteUnavailable, TierblkError
from tierblk.extent import PAGE_BYTES

DELAY_MAX_S = 1.5  # a server that is back is noticed within 2 s
RETRY_AFTER_MAX_S = 60.0  # a server may ask for patience, not for ever


def backoff_s(attempt: int, first_s: float, chance: float) -> float:
    """How long to wait before retry number attempt (from 0): doubling, capped, and spread over its upper
    half.

    chance: in [0, 1). The spread keeps clients that failed together from coming back together. A first_s
    above the cap is what somebody configured, so it counts.
    """
    longest_s = min(first_s * 2.0 ** min(attempt, 64), max(DELAY_MAX_S, first_s))
    return longest_s * (0.5 + 0.5 * chance)


def retry_after_s(error: TierblkError) -> float:
    """For how long the server asked not to be asked again; 0 when it did not say."""
    wanted_s = error.retry_after_s if isinstance(error, RemoteUnavailable) else None
    return min(max(wanted_s or 0.0, 0.0), RETRY_AFTER_MAX_S)


class Retries:
    """What one fetch has left: `retries` failures in a row, and one answer that does not fit.

    A try that brought a page is a success as far as this counts: a window of 8 MiB through a middle box that
    cuts every answer is slow, not impossible. Less than a page is not, or a server that sends one byte at a
    time would hold a reader for hours.
    """

    def __init__(self, retries: int, first_s: float, rng: Callable[[], float]) -> None:
        self._retries = retries
        self._first_s = first_s
        self._rng = rng
        self._failures = 0
        self._mismatches = 0

    def after(self, error: TierblkError, brought_bytes: int, tries: int = 1) -> float | None:
        """The seconds to wait until the next try; None: there is none.

        brought_bytes: what the try brought before it failed. tries: how many requests it was.
        """
        if brought_bytes >= PAGE_BYTES:
            self._failures = self._mismatches = 0
        if isinstance(error, RemoteMismatch):
            self._mismatches += 1
            return 0.0 if self._mismatches == 1 else None
        if not isinstance(error, RemoteUnavailable):
            return None
        self._failures += tries
        if self._failures > self._retries:
            return None
        return max(backoff_s(self._failures - 1, self._first_s, self._rng()), retry_after_s(error))
