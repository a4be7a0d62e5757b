"""How fast writes may take new slots while few are free. Pure.

What was freed is of use after a commit only (I4), so what is free has to last that long. Below the low
watermark the pace is what would use up PART of the free slots in the time that a commit takes: while there
are many that is more than anybody writes, and as they become fewer writers slow down little by little to the
speed at which commits free slots. Without it they run into an empty free list at full speed and wait for a
whole commit.
"""

from __future__ import annotations

from tierblk.cache.evict import Watermarks

PART = 2.0
"""Of the slots that are free now, in a commit's time: e to the minus 2 of them are left then, a seventh."""
LEAST_PER_S = 64.0
LOOK_MIN_S, LOOK_MAX_S = 0.005, 0.05
_WEIGHT = 0.3


class Throttle:
    """Learns how long a commit takes and says what the pace is."""

    def __init__(self, marks: Watermarks) -> None:
        self._low_slots = marks.low_slots
        self._commit_s: float | None = None

    def committed(self, duration_s: float) -> None:
        """A commit has freed slots."""
        before = duration_s if self._commit_s is None else self._commit_s
        self._commit_s = before + _WEIGHT * (duration_s - before)

    @property
    def look_s(self) -> float:
        """When to look again while few are free: several times in a commit."""
        return min(max((self._commit_s or 0) / 10, LOOK_MIN_S), LOOK_MAX_S)

    def blocks_per_s(self, *, free: int, coming: int) -> float | None:
        """None: no pacing. coming: slots in quarantine or being evicted; with none there is nothing to wait
        for, and writes may have the rest.
        """
        if free >= self._low_slots or not coming or not self._commit_s:
            return None
        return max(LEAST_PER_S, PART * free / self._commit_s)
