"""Latencies as the core counts them: buckets of ticks, four to an octave (cdef.h, TB_LATENCY_BUCKETS).
Pure.

A bucket is never wider than a quarter of its lower bound, so a percentile is right to 25 %, and to half of
that on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TIERS = ("hit", "zero", "miss", "memory", "write", "flush")
"""memory: hits in the memory tier, without the driver's copy into the request; hit: the others."""


def lower_bound_ticks(bucket: int) -> int:
    """The shortest latency that counts in a bucket; the first one also has all that is shorter."""
    return (4 + bucket % 4) << (bucket // 4) if bucket else 0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one tier. counts: by bucket; tick_s: how long a tick is."""

    counts: Sequence[int]
    tick_s: float

    @property
    def total(self) -> int:
        """How many requests."""
        return sum(self.counts)

    def percentile_s(self, percent: float) -> float | None:
        """The latency that so many percent of the requests did not exceed, seconds, at most a quarter too
        long; None when there was none."""
        left = self.total * percent / 100
        for bucket, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                return lower_bound_ticks(bucket + 1) * self.tick_s
        return None

    def to_dict(self) -> dict[str, float | int | None]:
        """As `status --json` shows it."""
        shown: dict[str, float | int | None] = {"requests": self.total}
        for percent in (50, 99, 99.9):
            latency_s = self.percentile_s(percent)
            shown[f"p{percent:g}_us"] = None if latency_s is None else round(latency_s * 1e6, 1)
        return shown
