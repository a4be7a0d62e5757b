"""Latencies as the core counts them: buckets of ticks, four to an octave (cdef.h, TB_LATENCY_BUCKETS).
Pure.

A bucket is never wider than a quarter of its lower bound, so a percentile is right to 25 %, and to half of
that on average."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

TIERS = ("hit", "zero", "miss", "memory", "write", "flush")
"""memory: hits in the memory tier, without the driver's copy into the request; hit: the others."""


OPERATIONS = ("read", "write", "flush", "discard", "zeroes", None, None, "other")
"""What a request asks for, as the core numbers it (cdef.h, TB_OP_*); zeroes: WRITE_ZEROES."""

LATENCY_BUCKETS = 160
"""As many as the core has (cdef.h)."""


def bucket_of(ticks: int) -> int:
    """Where a latency counts."""
    if ticks < 4:
        return 0
    octave = ticks.bit_length() - 3
    return 4 * octave + (ticks >> octave & 3)


def lower_bound_ticks(bucket: int) -> int:
    """The shortest latency that counts in a bucket; the first one also has all that is shorter."""
    return (4 + bucket % 4) << (bucket // 4) if bucket else 0


def bounds_s() -> tuple[float, ...]:
    """Upper bounds of the buckets that others see, seconds, from a microsecond to 100 s, three a decade: the
    core's own lie elsewhere on every machine, and are too many for others to keep."""
    return (*(float(f"{step}e{decade}") for decade in range(-6, 2) for step in (1, 2, 5)), 100.0)


@lru_cache(maxsize=8)
def _begins(tick_s: float, buckets: int) -> tuple[int, ...]:
    """For each bound the first of the core's buckets that may have something longer."""
    tops_s = [lower_bound_ticks(bucket + 1) * tick_s for bucket in range(buckets - 1)]
    return tuple(bisect_right(tops_s, bound_s * (1 + 1e-9)) for bound_s in bounds_s())


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one tier. counts: by bucket; tick_s: how long a tick is; ticks: of all requests together."""

    counts: Sequence[int]
    tick_s: float
    ticks: int = 0

    @property
    def total(self) -> int:
        """How many requests."""
        return sum(self.counts)

    @property
    def sum_s(self) -> float:
        """How long all of them took together, seconds."""
        return self.ticks * self.tick_s

    def cumulative(self) -> list[int]:
        """For each of `bounds_s` how many requests certainly took no longer; one of the core's buckets that
        reaches beyond a bound counts at the next. With the same tick_s no number ever falls."""
        so_far = list(accumulate(self.counts, initial=0))
        return [so_far[begin] for begin in _begins(self.tick_s, len(self.counts))]

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


def by_tier(found: Iterable[tuple[Sequence[int], int]], tick_s: float) -> dict[str, Latencies]:
    """What a door says, (counts, ticks) a tier, by the tier's name."""
    return {
        tier: Latencies(counts, tick_s, ticks) for tier, (counts, ticks) in zip(TIERS, found, strict=False)
    }
