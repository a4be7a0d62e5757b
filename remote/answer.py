"""What the answer to a range request must look like, and what is wrong with it when it does not. No I/O.

For a body that goes straight into the caller's buffer the checks run in the protocol, before the first byte
lands there (I6); the client runs them for all others, and raises what they find. The table of verdicts is in
http.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Self

from tierblk.errors import RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.source import REPIN_HINT

REDIRECTS = frozenset({301, 302, 303, 307, 308})
WORTH_RETRYING = frozenset({408, 429})  # and every 5xx

_CONTENT_RANGE = re.compile(r"bytes +(\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII | re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes +\*/(\d{1,19})", re.ASCII | re.IGNORECASE)
_STRONG_ETAG = re.compile(r'"[\x20\x21\x23-\x7e]*"')
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,1024}")

NO_RANGES_HINT = (
    "put the file on a server that answers range requests (nginx, Apache and every object store do), "
    "or download it and use file:///PATH"
)

_CLIENT_ERRORS: dict[int, tuple[str, str | None]] = {
    401: ("the server wants to know who asks (401)", "put the credentials into the table [remote.headers]"),
    403: ("the server denies access (403)", "check its permissions, or that a signed URL has not expired"),
    404: ("the server has nothing at this address (404)", "check the address"),
    410: ("the file is gone for good (410)", "check the address"),
}


@dataclass(frozen=True)
class Pin:
    """The version of an object, as one answer described it; etag as it was sent, a leading W/ included."""

    size_bytes: int
    etag: str | None
    last_modified: str | None

    @cached_property  # asked for several times a request
    def strong_etag(self) -> str | None:
        """The ETag when equal ETags promise equal bytes; a weak one does not, nor does one without quotes."""
        return self.etag if self.etag and _STRONG_ETAG.fullmatch(self.etag) else None

    @property
    def validator(self) -> str:
        """The strongest sign of the version, as Identity.validator wants it."""
        if self.strong_etag:
            return f"etag:{self.strong_etag}"
        if self.last_modified:
            return f"last-modified:{self.last_modified}"
        return f"size:{self.size_bytes}"

    @classmethod
    def of_identity(cls, size_bytes: int, validator: str) -> Self:
        """The pin whose `validator` this was: what is left of a version that was pinned in an earlier run."""
        kind, _, value = validator.partition(":")
        return cls(size_bytes, value if kind == "etag" else None, value if kind == "last-modified" else None)

    @cached_property
    def conditions(self) -> dict[str, str]:
        """Request headers that make the server itself refuse another version (412)."""
        # If-Match compares strongly: a weak ETag never matches itself, so it is not sent.
        if self.strong_etag:
            return {"If-Match": self.strong_etag}
        if self.last_modified:
            return {"If-Unmodified-Since": self.last_modified}
        return {}

    def describe(self) -> str:
        """For messages: `ETag "…", 1048576 bytes`."""
        if self.etag:
            return f"ETag {self.etag}, {self.size_bytes} bytes"
        if self.last_modified:
            return f"Last-Modified {self.last_modified}, {self.size_bytes} bytes"
        return f"{self.size_bytes} bytes"

    def same_version(self, other: Pin) -> bool:
        """Whether an answer that is described by other belongs to this version."""
        if self.size_bytes != other.size_bytes:
            return False
        if self.strong_etag:
            # Equal strong ETags promise equal bytes, so a newer Last-Modified (the same image uploaded again,
            # a replica) is no change.
            return other.etag == self.strong_etag
        if self.etag and other.etag and _opaque(self.etag) != _opaque(other.etag):
            return False
        return self.last_modified == other.last_modified


def _opaque(etag: str) -> str:
    """The ETag without its weakness: some servers call a file's ETag weak only while the file is fresh."""
    return etag.removeprefix("W/")


@dataclass(frozen=True, slots=True)
class Want:
    """One range request: length_bytes (> 0) from offset_bytes of the pinned version; pin None: the first
    look.

    url is for messages only (no password, no query).
    """

    url: str
    offset_bytes: int
    length_bytes: int
    pin: Pin | None = None

    @property
    def last_byte(self) -> int:
        return self.offset_bytes + self.length_bytes - 1

    @property
    def asked(self) -> str:
        """How every message begins."""
        return f"{self.url}: asked for bytes {self.offset_bytes}-{self.last_byte}"

    def headers(self) -> dict[str, str]:
        """Identity coding: ranges of a compressed representation are ranges of something else."""
        conditions = self.pin.conditions if self.pin else {}
        return {
            "Range": f"bytes={self.offset_bytes}-{self.last_byte}",
            "Accept-Encoding": "identity",
            **conditions,
        }


def quoted(text: str) -> str:
    """What a server sent, safe for one line of a message."""
    return repr(text if len(text) <= 120 else text[:120] + "…")


def check_partial(status: int, headers: Mapping[str, str], want: Want) -> Pin:
    """Return the version that an answer's head describes; raise unless the answer is exactly what was asked
    for.

    headers: looked up without regard to case. Raises RemoteUnavailable or RemoteRefused. Passing says all
    about the body except that it is complete.
    """
    if status != 206:
        raise _status_error(status, headers, want)
    coding = headers.get("Content-Encoding", "identity").strip()
    if coding.lower() not in ("", "identity"):
        raise RemoteMismatch(
            f"{want.asked} as they are, but they came with Content-Encoding {quoted(coding)}",
            "switch compression off for this file on the server",
        )
    if headers.get("Content-Type", "").strip().lower().startswith("multipart/byteranges"):
        raise RemoteMismatch(f"{want.asked}, one range, but got a multipart/byteranges answer")
    now = Pin(_check_range(headers, want), _printable(headers, "ETag"), _printable(headers, "Last-Modified"))
    if want.pin is not None and not want.pin.same_version(now):
        raise changed(want, now, RemoteMismatch)  # with If-Match it should have been a 412
    length = headers.get("Content-Length")
    if length is not None and length.strip() != str(want.length_bytes):
        raise RemoteMismatch(
            f"{want.asked}, {want.length_bytes} bytes, but got an answer with Content-Length {quoted(length)}"
        )
    return now


def is_exact_length(headers: Mapping[str, str], want: Want) -> bool:
    """Whether the head itself says how long the body is, so that its bytes may be used as they arrive."""
    return headers.get("Content-Length") == str(want.length_bytes) and "Transfer-Encoding" not in headers


def changed(want: Want, now: Pin | None, kind: type[RemoteRefused] = RemoteRefused) -> RemoteRefused:
    """The error that names both versions; now None: the server did not say what it has."""
    opened = want.pin.describe() if want.pin else "another version"
    has = f"has {now.describe()}" if now else "does not have that version any more (412)"
    return kind(f"{want.url} has changed: it was opened as {opened}, and the server now {has}", REPIN_HINT)


def _check_range(headers: Mapping[str, str], want: Want) -> int:
    """The object's total size, once the Content-Range proved to be the range asked for."""
    text = headers.get("Content-Range")
    if text is None:
        raise RemoteMismatch(f"{want.asked}, but the 206 answer has no Content-Range")
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        raise RemoteMismatch(
            f"{want.asked}, but the answer's Content-Range {quoted(text)} does not say which it has"
        )
    first, last, total = map(int, match.groups())
    if (first, last) != (want.offset_bytes, want.last_byte) or total <= last:
        raise RemoteMismatch(f"{want.asked}, but got Content-Range {quoted(text)}")
    return total


def _printable(headers: Mapping[str, str], name: str) -> str | None:
    """A header that is to be sent back later: anything but plain text counts as absent (I12)."""
    text = headers.get(name, "").strip()
    return text if _PRINTABLE.fullmatch(text) else None


def _status_error(status: int, headers: Mapping[str, str], want: Want) -> TierblkError:
    if status in WORTH_RETRYING or 500 <= status <= 599:
        return RemoteUnavailable(
            f"{want.asked}, but the server cannot answer now (status {status})",
            retry_after_s=retry_after_of(headers),
        )
    if _is_empty(status, headers, want):
        return RemoteRefused(
            f"{want.url} is empty (0 bytes)", "an image has at least one sector of 512 bytes"
        )
    if status == 200:
        return RemoteMismatch(
            f"{want.asked}, but the server ignored the range and answered 200 with the whole file",
            NO_RANGES_HINT,
        )
    if status == 412:
        return changed(want, None)
    if status == 416:
        text = headers.get("Content-Range", "no Content-Range")
        size, has = _UNSATISFIED.fullmatch(text.strip()), quoted(text)
        if size is not None and want.pin is not None and int(size[1]) != want.pin.size_bytes:
            return changed(want, Pin(int(size[1]), _printable(headers, "ETag"), None))
        return RemoteMismatch(
            f"{want.asked}, but the server says that the file does not reach so far (416, {has})"
        )
    if status in _CLIENT_ERRORS:
        what, hint = _CLIENT_ERRORS[status]
        return RemoteRefused(f"{want.asked}, but {what}", hint)
    kind = RemoteRefused if status >= 400 else RemoteMismatch
    return kind(f"{want.asked} and expected 206, but got status {status}")


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """What Retry-After says: seconds, or a date. None when it is absent or says neither."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000": UTC, somewhere
            date = date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _is_empty(status: int, headers: Mapping[str, str], want: Want) -> bool:
    """Whether the first look met an object without a byte: no range of it exists."""
    if want.pin is not None:
        return False
    if status == 416:
        return headers.get("Content-Range", "").strip().lower() == "bytes */0"
    return status == 200 and headers.get("Content-Length", "").strip() == "0"
