"""What counts as slow, and how many second requests there may be."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tierblk.remote.hedge import (
    GENERATION,
    HEDGE_MIN_S,
    LEAST_S,
    SAMPLES_MIN,
    STALL_MIN_S,
    Budget,
    Histogram,
    Latencies,
)


@given(st.lists(st.floats(0, 300, allow_nan=False), min_size=1, max_size=GENERATION))
def test_quantiles_are_right_up_to_a_fifth(durations: list[float]) -> None:
    histogram = Histogram()
    for duration_s in durations:
        histogram.add(duration_s)
    durations.sort()
    known = len(durations) - histogram._worked_out[0]
    assert known == len(durations), "nothing is worked out before somebody asks"
    for value, quantile in ((histogram.median_s(), 0.5), (histogram.slow_s(), 0.99)):
        exact = durations[len(durations) - 1 - int(len(durations) * (1 - quantile))]
        assert exact <= value * 1.000001
        assert value <= max(exact, LEAST_S) * 1.2


def test_old_ones_are_forgotten() -> None:
    histogram = Histogram()
    for _ in range(GENERATION):
        histogram.add(10.0)
    for _ in range(2 * GENERATION):
        histogram.add(0.01)
    assert histogram.slow_s() < 0.02
    assert histogram.total == 3 * GENERATION


def test_slow_is_unknown_at_first_and_never_tiny() -> None:
    latencies = Latencies(30.0)
    for _ in range(SAMPLES_MIN - 1):
        latencies.first_byte(4096, 0.001)
    assert latencies.slow_first_byte_s(4096) == math.inf
    latencies.first_byte(4096, 0.001)
    assert latencies.slow_first_byte_s(4096) == HEDGE_MIN_S
    assert latencies.slow_first_byte_s(8 << 20) == math.inf, "long answers are another class"
    assert latencies.slow_whole_s(4096) == math.inf


def test_a_stall_is_a_few_times_the_usual_within_limits() -> None:
    latencies = Latencies(30.0)
    assert latencies.stall_s(4096) == STALL_MIN_S
    for _ in range(1000):
        latencies.first_byte(4096, 0.2)
    assert 4.0 <= latencies.stall_s(4096) <= 4.8
    for _ in range(1000):
        latencies.first_byte(4096, 10.0)
    assert latencies.stall_s(4096) == 30.0, "it is never more than read_timeout"


def test_dying_connections_do_not_make_dying_usual() -> None:
    latencies = Latencies(30.0)
    for n in range(1000):
        latencies.first_byte(4096, 5.0 if n % 10 == 0 else 0.01)
    assert latencies.stall_s(4096) == STALL_MIN_S


@given(st.floats(0, 10), st.integers(0, 2000))
def test_the_budget_is_a_share_of_the_requests(percent: float, requests: int) -> None:
    budget, spent = Budget(percent), 0
    for _ in range(requests):
        budget.earn()
        if budget.may():
            budget.spend()
            spent += 1
    assert spent <= requests * percent / 100 + 1e-6
    assert spent >= math.floor(requests * percent / 100 - 1e-6) - 1
