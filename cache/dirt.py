"""How fast writes may make new slots dirty while the way out of them, an upload, is slower. Pure.

Nothing is held up below SLOW of the limit. From there on the pace is what would use up PART of the room that
is left in the time that an epoch takes: writers slow down little by little to the speed of the upload, and an
outage lets them trickle until it is over, instead of stopping them dead at a wall.
"""

from __future__ import annotations

from tierblk.cache.throttle import LEAST_PER_S, PART

LIMIT = 0.75
"""Of all slots: how many may be dirty; the rest is for what is read, and for moves."""
HURRY, SLOW = 0.5, 0.75
"""Of the limit: from where on epochs follow each other without a pause, and writes are slowed down."""
TRICKLE_PER_S = 1.0


def fullness(
    *, dirty_slots: int, slots: int, dirty_bytes: int = 0, max_dirty_bytes: int | None = None
) -> float:
    """How much of what may be dirty is: 1.0 at the limit, whichever is nearer, that of slots or of bytes."""
    share = dirty_slots / max(1.0, slots * LIMIT)
    return max(share, dirty_bytes / max_dirty_bytes) if max_dirty_bytes else share


def blocks_per_s(share: float, *, slots: int, epoch_s: float) -> float | None:
    """None: no pacing. share: of the limit, see fullness. epoch_s: how long an epoch takes at present."""
    if share < SLOW:
        return None
    room = (1 - share) * slots * LIMIT
    return max(TRICKLE_PER_S if room < 1 else LEAST_PER_S, PART * room / max(epoch_s, 0.001))
