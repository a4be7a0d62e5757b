"""How many slots to free, and when, so that a miss finds a free slot waiting. Pure.

Eviction runs ahead of demand, between two watermarks: below the low one slots are freed up to the high one. A
freed slot is of use only after the commit that unmaps it (I4), so slots in quarantine count as coming, not as
free.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Self

BURST_SLOTS = 64  # 4 MiB


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Slots that should be free: below `low_slots` eviction begins, at `high_slots` it ends."""

    low_slots: int
    high_slots: int

    @classmethod
    def of(cls, total_slots: int, low_percent: float, high_percent: float) -> Self:
        """Rounded up, and never so many that nothing could be cached.

        A burst of misses takes free slots faster than a commit brings new ones, whatever the cache's size:
        small caches keep the same few MiB free as larger ones, at most an eighth and a quarter of themselves.
        """
        most = max(total_slots - 1, 0)
        low = max(1, ceil(total_slots * low_percent / 100), min(BURST_SLOTS, total_slots // 8))
        high = max(low, ceil(total_slots * high_percent / 100), min(2 * BURST_SLOTS, total_slots // 4))
        return cls(min(low, most), min(high, most))


def slots_to_evict(marks: Watermarks, *, total: int, free: int, quarantined: int, evicting: int = 0) -> int:
    """How many blocks to evict now; 0 when enough is free or coming.

    total: slots that can hold blocks; free: of use at once; quarantined: freed, waiting for a commit;
    evicting: asked for earlier and not answered yet.
    """
    coming = free + quarantined + evicting
    if coming >= marks.low_slots:
        return 0
    return max(0, min(marks.high_slots, total) - coming)


def commit_is_due(marks: Watermarks, *, free: int, quarantined: int) -> bool:
    """Whether a commit should not wait for its timer: few slots are free and some only wait for it."""
    return quarantined > 0 and free < marks.low_slots
