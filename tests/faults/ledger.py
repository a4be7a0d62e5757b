"""What a server was asked and what it gave: a log of requests, and how often each byte went out."""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

LOG_MAX = 200_000


@dataclass(slots=True)
class Entry:
    """One request. first, last: the range that was asked for (both -1: none). sent_bytes: how much of the
    right body went out so far. at_s: of time.monotonic(). ended: the answer is over, however it ended."""

    n: int
    connection: int
    method: str
    path: str
    first: int
    last: int
    at_s: float
    fault: str | None = None
    status: int = 0
    sent_bytes: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often bytes occur in a set of ranges. repeated: (first, last, times) of the first few that do more
    than once."""

    total_bytes: int
    distinct_bytes: int
    most_often: int
    repeated: tuple[tuple[int, int, int], ...]

    @property
    def repeated_bytes(self) -> int:
        """Bytes that were one too many."""
        return self.total_bytes - self.distinct_bytes


def coverage(ranges: Iterable[tuple[int, int]], shown: int = 10) -> Coverage:
    """ranges: (first byte, count), in any order, with any overlap."""
    edges: Counter[int] = Counter()
    total = 0
    for first, count in ranges:
        if count > 0:
            total += count
            edges[first] += 1
            edges[first + count] -= 1
    depth = distinct = most = at = 0
    repeated: list[tuple[int, int, int]] = []
    for edge in sorted(edges):
        if depth > 0:
            distinct += edge - at
        if depth > 1 and len(repeated) < shown:
            repeated.append((at, edge - 1, depth))
        at, depth = edge, depth + edges[edge]
        most = max(most, depth)
    return Coverage(total, distinct, most, tuple(repeated))


@dataclass
class Ledger:
    """Everything since it was made, or since `forget`. entries: the newest LOG_MAX; the rest is complete."""

    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=LOG_MAX))
    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    head_requests: int = 0
    redirects: int = 0
    sent_bytes: int = 0
    useless_bytes: int = 0  # bodies that nobody may use
    _asked: array[int] = field(default_factory=lambda: array("q"))
    _sent: array[int] = field(default_factory=lambda: array("q"))

    def open(self, entry: Entry) -> Entry:
        """A request came."""
        self.entries.append(entry)
        self.requests += 1
        self.head_requests += entry.method == "HEAD"
        if entry.first >= 0:
            self._asked.extend((entry.first, entry.last + 1 - entry.first))
        return entry

    def sent(self, entry: Entry, first: int, count: int) -> None:
        """So many right bytes from `first` on went out."""
        entry.sent_bytes += count
        self.sent_bytes += count
        if self._sent and self._sent[-2] + self._sent[-1] == first:
            self._sent[-1] += count
        else:
            self._sent.extend((first, count))

    def asked(self) -> Coverage:
        """Of the ranges that were asked for."""
        return coverage(_pairs(self._asked))

    def served(self) -> Coverage:
        """Of the right bytes that went out."""
        return coverage(_pairs(self._sent))

    def forget(self) -> None:
        """Begin anew. Requests that run are not seen again."""
        self.__init__()  # type: ignore[misc]  # the same as a new one, for those who hold this one

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "requests": self.requests,
            "head_requests": self.head_requests,
            "redirects": self.redirects,
            "sent_bytes": self.sent_bytes,
            "useless_bytes": self.useless_bytes,
            "faults": dict(self.faults),
            "asked": _plain(self.asked()),
            "served": _plain(self.served()),
        }

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        """The entries from number n = since on, for JSON."""
        return [asdict(entry) for entry in self.entries if entry.n >= since]


def now_s() -> float:
    """The clock of the log."""
    return time.monotonic()


def _pairs(flat: array[int]) -> Iterator[tuple[int, int]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _plain(cover: Coverage) -> dict[str, Any]:
    return asdict(cover) | {"repeated_bytes": cover.repeated_bytes}
