"""How writes slow down while what is dirty waits for its upload."""

from __future__ import annotations

import pytest

from tierblk.cache import dirt

SLOTS = 10_000


def test_nothing_is_slowed_down_while_there_is_room() -> None:
    share = dirt.fullness(dirty_slots=5000, slots=SLOTS)
    assert dirt.HURRY < share < dirt.SLOW
    assert dirt.blocks_per_s(share, slots=SLOTS, epoch_s=5.0) is None


def test_the_pace_falls_to_what_the_upload_frees() -> None:
    """It uses up a part of the room in the time of an epoch, so it falls as the room does."""
    paces = []
    for dirty in range(5700, 7600, 50):
        share = dirt.fullness(dirty_slots=dirty, slots=SLOTS)
        pace = dirt.blocks_per_s(share, slots=SLOTS, epoch_s=4.0)
        assert pace is not None
        paces.append(pace)
    assert paces == sorted(paces, reverse=True)
    assert paces[0] == pytest.approx(2 * 1800 / 4)
    assert paces[-1] == dirt.TRICKLE_PER_S


def test_an_upload_that_takes_longer_slows_writers_more() -> None:
    share = dirt.fullness(dirty_slots=6500, slots=SLOTS)
    quick, slow = (dirt.blocks_per_s(share, slots=SLOTS, epoch_s=epoch_s) for epoch_s in (1.0, 10.0))
    assert quick == pytest.approx(2000)
    assert slow == pytest.approx(200)


def test_the_limit_in_bytes_counts_where_it_is_nearer() -> None:
    assert dirt.fullness(dirty_slots=10, slots=SLOTS, dirty_bytes=90, max_dirty_bytes=100) == 0.9
    assert dirt.fullness(dirty_slots=7500, slots=SLOTS, dirty_bytes=1, max_dirty_bytes=100) == 1.0
