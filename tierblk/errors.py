"""The errors a user can meet, sorted by what the one who gets them must do.

Every error has one exit code (part of the command line's interface) and one errno (what a block request ends
with), so nobody maps errors twice. A message is one sentence that names the thing, a hint is the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EINVAL, EIO, ENODEV, EROFS


class TierblkError(Exception):
    """Base of all expected errors; raised itself only where no kind below fits."""

    exit_code: int = 1
    errno: int = EIO

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, str | int | None]:
        """The error as JSON can carry it between the daemon and the command line."""
        return {
            "kind": next(kind.__name__ for kind in type(self).__mro__ if kind.__name__ in KINDS),
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class ConfigError(TierblkError):
    """A setting or a config file is wrong: the user changes it."""

    exit_code = 3
    errno = EINVAL


class RemoteUnavailable(TierblkError):
    """The remote did not answer or answered that it cannot now: the same request is worth trying again.

    retry_after_s: how long the remote asked us to wait before that, if it did.
    """

    exit_code = 4

    def __init__(self, message: str, hint: str | None = None, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class RemoteRefused(TierblkError):
    """The remote's answer is final: 4xx, no ranges, another identity than the pinned one, wrong bytes."""

    exit_code = 5


class RemoteMismatch(RemoteRefused):
    """The answer does not fit the request, as no working server answers but a broken middle box does: worth
    one more try on another connection. For users and on the wire it is a RemoteRefused."""


class Fenced(RemoteRefused):
    """Another host writes the volume now: nothing that is here reaches it any more (R19). For users and on
    the wire it is a RemoteRefused."""

    errno = EROFS


class CacheError(TierblkError):
    """The cache directory is full, damaged, locked by another daemon, or of a newer version."""

    exit_code = 6


class TooMuch(CacheError):
    """What is asked is more than the cache has room for: nothing was done, and nothing is wrong with it. For
    users and on the wire it is a CacheError."""


class DeviceError(TierblkError):
    """The ublk driver or a device: no module, no permission, no such device, still in use."""

    exit_code = 7
    errno = ENODEV


class UnknownDevice(DeviceError):
    """No device has this name. For users and on the wire it is a DeviceError."""


class DaemonError(TierblkError):
    """The daemon does not answer, or what is asked conflicts with what it already does."""

    exit_code = 8


KINDS: dict[str, type[TierblkError]] = {
    kind.__name__: kind
    for kind in (
        TierblkError,
        ConfigError,
        RemoteUnavailable,
        RemoteRefused,
        CacheError,
        DeviceError,
        DaemonError,
    )
}


def from_dict(fields: object) -> TierblkError:
    """The error that `to_dict` made; anything unexpected becomes a plain TierblkError, this never raises."""
    if not isinstance(fields, Mapping):
        return TierblkError(f"an error of unknown shape was reported: {fields!r:.200}")
    kind = KINDS.get(str(fields.get("kind")), TierblkError)
    hint = fields.get("hint")
    return kind(
        str(fields.get("message") or "an error without a message"), None if hint is None else str(hint)
    )
