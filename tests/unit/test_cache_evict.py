"""How many blocks go, decided from numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.cache import Watermarks, commit_is_due, slots_to_evict

PERCENT = st.floats(0.1, 50)


@given(st.integers(1, 10**9), PERCENT, PERCENT)
def test_watermarks_leave_room_to_cache(total: int, a: float, b: float) -> None:
    marks = Watermarks.of(total, min(a, b), max(a, b))
    assert 0 <= marks.low_slots <= marks.high_slots <= max(total - 1, 0)
    assert marks.low_slots >= min(1, total - 1)


@pytest.mark.parametrize(
    ("total", "low", "high"), [(255, 31, 63), (1000, 64, 128), (65535, 1311, 2622), (2, 1, 1), (1, 0, 0)]
)
def test_watermarks_are_rounded_up_and_leave_room_for_a_burst(total: int, low: int, high: int) -> None:
    assert Watermarks.of(total, 2.0, 4.0) == Watermarks(low, high)


@given(st.data())
def test_one_decision_is_enough(data: st.DataObject) -> None:
    """What is asked for is there, brings the level up to the high mark, and nothing is asked for twice."""
    total = data.draw(st.integers(1, 10**6))
    marks = Watermarks.of(total, 2.0, 4.0)
    free = data.draw(st.integers(0, total))
    quarantined = data.draw(st.integers(0, total - free))
    evicting = data.draw(st.integers(0, total - free - quarantined))
    count = slots_to_evict(marks, total=total, free=free, quarantined=quarantined, evicting=evicting)
    coming = free + quarantined + evicting
    assert 0 <= count <= total - coming
    if coming >= marks.low_slots:
        assert count == 0
    else:
        assert coming + count == marks.high_slots
    again = slots_to_evict(marks, total=total, free=free, quarantined=quarantined, evicting=evicting + count)
    assert again == 0


def test_a_commit_is_due_when_freed_slots_are_needed() -> None:
    marks = Watermarks(6, 11)
    assert commit_is_due(marks, free=5, quarantined=1)
    assert not commit_is_due(marks, free=6, quarantined=100)
    assert not commit_is_due(marks, free=0, quarantined=0)
