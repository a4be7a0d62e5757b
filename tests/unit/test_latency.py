"""Latency buckets: what they mean, and what percentiles they give."""

from __future__ import annotations

import itertools

import pytest

from tierblk.core._core import lib
from tierblk.latency import TIERS, Latencies, lower_bound_ticks


def test_buckets_rise_without_gaps_by_at_most_a_quarter() -> None:
    bounds = [lower_bound_ticks(bucket) for bucket in range(lib.TB_LATENCY_BUCKETS + 1)]
    assert bounds[:9] == [0, 5, 6, 7, 8, 10, 12, 14, 16]
    assert all(low < high <= low * 1.25 for low, high in itertools.pairwise(bounds[1:]))
    assert len(TIERS) == lib.TB_TIERS


def test_percentiles_are_never_too_short_and_at_most_a_quarter_too_long() -> None:
    counts = [0] * lib.TB_LATENCY_BUCKETS
    counts[40], counts[60] = 99, 1
    found = Latencies(counts, tick_s=1e-9)
    assert found.total == 100
    low, high = lower_bound_ticks(40) * 1e-9, lower_bound_ticks(41) * 1e-9
    assert found.percentile_s(50) == found.percentile_s(99) == pytest.approx(high)
    assert high <= low * 1.25
    assert found.percentile_s(99.9) == pytest.approx(lower_bound_ticks(61) * 1e-9)


def test_without_requests_there_is_no_percentile() -> None:
    assert Latencies([0] * 8, 1.0).to_dict() == {
        "requests": 0,
        "p50_us": None,
        "p99_us": None,
        "p99.9_us": None,
    }
