"""How a session begins: whom to believe after the last one (R1, R8). Pure.

The order of an opening, each step durable before the next:

    1. superblock: session = last + 1, confirmed as before
    2. journal: the records to come are of that session (those of the last one are in the index by then)
    3. index: that session, and the unclean mark
    4. maps: every layer's map is complete, then stamped with that session
    5. superblock: confirmed = session; only now may a slot be written

So `confirmed` is the last session that may have changed slots, and an index or a map is as new as the slots
exactly when its session is from `confirmed` to `session`. An index from a backup is older than that; openings
that failed, however many, are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum

from tierblk.cache.superblock import FORMAT_VERSION, Superblock


class StartMode(Enum):
    """What the last session left, and so what this one begins with."""

    CLEAN = "clean"  # it stopped in order: the index is exact
    WARM = "warm"  # it was killed and the maps outlived it: they are the truth, nothing is lost (R1)
    UNCLEAN = "unclean"  # a power cut, or maps are missing: what the index names is kept
    DISCARDED = "discarded"  # index and slots are not of the same time: nothing cached is trusted (R8)


def is_current(session: int, superblock: Superblock) -> bool:
    """Whether an index or map of this session is as new as the slots."""
    return superblock.confirmed <= session <= superblock.session


def begun(superblock: Superblock) -> Superblock:
    """The superblock of step 1."""
    return replace(
        superblock,
        sequence=superblock.sequence + 1,
        session=superblock.session + 1,
        version=FORMAT_VERSION,
    )


def confirmed(superblock: Superblock) -> Superblock:
    """The superblock of step 5."""
    return replace(superblock, sequence=superblock.sequence + 1, confirmed=superblock.session)


def start_mode(
    superblock: Superblock, index_session: int, index_clean: bool, has_map_by_layer: Iterable[bool]
) -> StartMode:
    """How to start. `has_map_by_layer`: of every layer that has rows or a current map, whether it has the
    map.
    """
    if not is_current(index_session, superblock):
        return StartMode.DISCARDED
    if index_clean:
        return StartMode.CLEAN
    return StartMode.WARM if all(has_map_by_layer) else StartMode.UNCLEAN
