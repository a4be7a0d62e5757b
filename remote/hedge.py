"""When an answer is slow enough for a second request, and how many of those there may be. No I/O."""

from __future__ import annotations

import math

STEPS = 4  # of the histogram, per doubling
LEAST_S = 1e-4  # what is faster counts as this
DOUBLINGS = 22  # up to seven minutes
GENERATION = 512  # the quantiles are those of the last one to two generations
RECOUNT = 32  # additions after which the quantiles are worked out anew
SAMPLES_MIN = 100  # fewer do not tell what the slowest hundredth is
SLOW = 0.99

HEDGE_MIN_S = 0.02  # no answer is called slow sooner: a busy loop of ours is late by as much
STALL_FACTOR = 20  # times the median: connections that die must not make dying look usual
STALL_MIN_S = 1.0

SMALL_BYTES = 128 * 1024
MEDIUM_BYTES = 1024 * 1024

CREDIT_MAX = 4.0


class Histogram:
    """Durations, rounded up by at most a fifth; old ones are forgotten."""

    def __init__(self) -> None:
        self._counts = [0] * (STEPS * DOUBLINGS + 1)
        self._before = list(self._counts)
        self._count = 0
        self.total = 0  # ever
        self._worked_out: tuple[int, float, float] = (0, 0.0, 0.0)  # at which total, median, slow

    def add(self, duration_s: float) -> None:
        """One more."""
        step = 0 if duration_s <= LEAST_S else math.ceil(STEPS * math.log2(duration_s / LEAST_S))
        self._counts[min(step, STEPS * DOUBLINGS)] += 1
        self.total += 1
        self._count += 1
        if self._count == GENERATION:
            self._before, self._counts = self._counts, [0] * len(self._counts)
            self._count = 0

    def median_s(self) -> float:
        """What half of them stay below; 0 of none."""
        return self._quantiles()[1]

    def slow_s(self) -> float:
        """What all but the slowest hundredth stay below; of less than a hundred the slowest; 0 of none."""
        return self._quantiles()[2]

    def _quantiles(self) -> tuple[int, float, float]:
        known = self._worked_out
        if self.total - known[0] >= RECOUNT or (self.total < SAMPLES_MIN and self.total != known[0]):
            known = self._worked_out = self.total, self._work_out(0.5), self._work_out(SLOW)
        return known

    def _work_out(self, quantile: float) -> float:
        counts = [one + other for one, other in zip(self._counts, self._before, strict=True)]
        beyond = int(sum(counts) * (1 - quantile))
        for step in range(len(counts) - 1, -1, -1):
            beyond -= counts[step]
            if beyond < 0:
                return LEAST_S * math.pow(2.0, step / STEPS)
        return 0.0


class Latencies:
    """How long this source's answers take: to the first byte and as a whole, by how much was asked for."""

    def __init__(self, read_timeout_s: float) -> None:
        self._read_timeout_s = read_timeout_s
        self._first = tuple(Histogram() for _ in range(3))
        self._whole = tuple(Histogram() for _ in range(3))

    @staticmethod
    def _size_class(length_bytes: int) -> int:
        return 0 if length_bytes <= SMALL_BYTES else 1 if length_bytes <= MEDIUM_BYTES else 2

    def first_byte(self, length_bytes: int, duration_s: float) -> None:
        """The first byte came after this long, or had not come when a second request was faster."""
        self._first[self._size_class(length_bytes)].add(duration_s)

    def whole(self, length_bytes: int, duration_s: float) -> None:
        """The last byte came after this long, or had not come when a second request was faster."""
        self._whole[self._size_class(length_bytes)].add(duration_s)

    def slow_first_byte_s(self, length_bytes: int) -> float:
        """From when on an answer without a byte is one of the slowest hundredth; inf while unknown."""
        return self._slow_s(self._first[self._size_class(length_bytes)])

    def slow_whole_s(self, length_bytes: int) -> float:
        """From when on an answer that still goes on is one of the slowest hundredth; inf while unknown."""
        return self._slow_s(self._whole[self._size_class(length_bytes)])

    def stall_s(self, length_bytes: int) -> float:
        """After how long without a byte something is wrong: a few times the usual, at most read_timeout."""
        usual_s = self._first[self._size_class(length_bytes)].median_s()
        return min(max(STALL_MIN_S, STALL_FACTOR * usual_s), self._read_timeout_s)

    @staticmethod
    def _slow_s(histogram: Histogram) -> float:
        return max(histogram.slow_s(), HEDGE_MIN_S) if histogram.total >= SAMPLES_MIN else math.inf


class Budget:
    """Second requests for slow answers: at most so many percent of all requests, whatever happens."""

    def __init__(self, percent: float) -> None:
        self._share = percent / 100
        self._credit = 0.0

    def earn(self) -> None:
        """A request went out."""
        self._credit = min(self._credit + self._share, CREDIT_MAX)

    def may(self) -> bool:
        """Whether there may be a second request now."""
        return self._credit >= 1

    def spend(self) -> None:
        """There is one."""
        self._credit -= 1
