"""A set of page numbers, kept as ranges: all of a volume may be zeros without a cost per page. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """Half-open ranges [first, end) of whole numbers; in order, apart from each other, never empty."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []
        self.touched = set[int]()
        """Where ranges began that came, changed or went; whoever looks at it empties it."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._firsts, self._ends, strict=True)

    def __len__(self) -> int:
        return len(self._firsts)

    def copy(self) -> Ranges:
        """The same numbers in a set of its own, of which nothing is touched."""
        other = Ranges()
        other._firsts, other._ends = self._firsts.copy(), self._ends.copy()
        return other

    def add(self, first: int, end: int) -> None:
        """All of [first, end) is in the set from here on."""
        if first >= end:
            return
        low, high = bisect_left(self._ends, first), bisect_right(self._firsts, end)  # touching ones join
        if low < high:
            first, end = min(first, self._firsts[low]), max(end, self._ends[high - 1])
        self.touched.update(self._firsts[low:high], (first,))
        self._firsts[low:high], self._ends[low:high] = [first], [end]

    def remove(self, first: int, end: int) -> None:
        """Nothing of [first, end) is in the set from here on."""
        low, high = bisect_right(self._ends, first), bisect_left(self._firsts, end)
        if first >= end or low >= high:
            return
        kept = []
        if self._firsts[low] < first:
            kept.append((self._firsts[low], first))
        if self._ends[high - 1] > end:
            kept.append((end, self._ends[high - 1]))
        self.touched.update(self._firsts[low:high], (a for a, _ in kept))
        self._firsts[low:high], self._ends[low:high] = [a for a, _ in kept], [b for _, b in kept]

    def end_of(self, first: int) -> int | None:
        """Where the range that begins there ends; None: none does."""
        at = bisect_left(self._firsts, first)
        return self._ends[at] if at < len(self._firsts) and self._firsts[at] == first else None

    def overlap(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """What of [first, end) is in the set, in order."""
        at = bisect_right(self._ends, first)
        while at < len(self._firsts) and self._firsts[at] < end:
            yield max(first, self._firsts[at]), min(end, self._ends[at])
            at += 1
