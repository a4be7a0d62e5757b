"""What a server was asked for, as its log says: the truth about amplification. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Get:
    """One request for bytes. `sent_bytes`: how many of them left the server; `at_s`: when it was asked, by a
    clock that all of a log share."""

    offset_bytes: int
    sent_bytes: int
    at_s: float


@dataclass(frozen=True)
class Asked:
    """A log in numbers. `repeated_pages`: how many pages (4 KiB) were sent once too often, wholly or in
    part."""

    gets: int
    sent_bytes: int
    repeated_pages: int


def pages_of(offset_bytes: int, length_bytes: int) -> range:
    """The pages that a piece touches; none when it is empty."""
    if length_bytes <= 0:
        return range(0)
    return range(offset_bytes // PAGE_BYTES, -(-(offset_bytes + length_bytes) // PAGE_BYTES))


def summary(gets: Iterable[Get]) -> Asked:
    """Of a whole log."""
    count = sent = 0
    times: Counter[int] = Counter()
    for get in gets:
        count += 1
        sent += get.sent_bytes
        if get != Get(0, 1, get.at_s):  # the question how large the image is
            times.update(pages_of(get.offset_bytes, get.sent_bytes))
    return Asked(count, sent, sum(times.values()) - len(times))


def since(gets: Sequence[Get], at_s: float) -> list[Get]:
    """Those that were asked for then or later."""
    return [get for get in gets if get.at_s >= at_s]
