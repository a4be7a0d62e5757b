"""Whom a session believes after the last one (R1, R8), against a model of what can come between."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.cache.start import StartMode, begun, confirmed, is_current, start_mode
from tierblk.cache.superblock import Superblock, choose, pack

NEW = Superblock(UUID(int=1), 256, 0, sequence=1, session=0, confirmed=0)
RUN_DIRS = 2


@dataclass
class Stamped:
    """An index or a map: the session that it names, and the opening that really wrote it."""

    session: int = 0
    opening: int = 0


@dataclass
class World:
    """A cache directory, backups of its index, and its maps in several run directories."""

    copies: list[bytes] = field(default_factory=lambda: [pack(replace(NEW, sequence=0)), pack(NEW)])
    index: Stamped = field(default_factory=Stamped)
    backup: Stamped = field(default_factory=Stamped)
    maps: list[Stamped | None] = field(default_factory=lambda: [None] * RUN_DIRS)
    openings: int = 0
    wrote_slots: int = 0  # the last opening that did

    def open(self, run_dir: int, steps: int, torn: bool) -> None:
        """An opening by start.py, killed after so many of its four steps, or in the middle of the last."""
        self.openings += 1
        found, _ = choose(self.copies, "slots")
        self.judge(found)
        now = begun(found)
        for step in range(1, steps + 1):
            half = torn and step == steps
            if step in (1, 4):
                superblock = now if step == 1 else confirmed(now)
                self.copies[superblock.sequence % 2] = b"torn" * 1024 if half else pack(superblock)
            elif not half and step == 2:
                self.index = Stamped(now.session, self.openings)
            elif not half:
                self.maps[run_dir] = Stamped(now.session, self.openings)
        if steps == 4 and not torn:
            self.wrote_slots = self.openings

    def judge(self, superblock: Superblock) -> None:
        """What is older than the slots is not believed; an index that is as new as they are, is."""
        assert is_current(self.index.session, superblock) == (self.index.opening >= self.wrote_slots)
        for stamped in self.maps:
            if stamped is not None and is_current(stamped.session, superblock):
                assert stamped.opening >= self.wrote_slots


OPEN = st.tuples(st.integers(0, RUN_DIRS - 1), st.integers(0, 4), st.booleans())


@given(st.lists(OPEN | st.sampled_from(["backup", "restore"]), max_size=25))
def test_only_what_is_as_new_as_the_slots_is_believed(
    events: list[tuple[int, int, bool] | str],
) -> None:
    world = World()
    for event in events:
        if event == "backup":
            world.backup = world.index
        elif event == "restore":
            world.index = world.backup
        else:
            assert isinstance(event, tuple)
            world.open(*event)
    world.judge(choose(world.copies, "slots")[0])


def test_the_killed_daemons_own_map_is_believed() -> None:
    """R1: kill, start again: the map is the truth, also when the kill came in the middle of an opening."""
    world = World()
    for steps, torn in [(4, False), (3, False), (1, True), (4, True), (3, False)]:
        found = choose(world.copies, "slots")[0]
        if world.maps[0] is not None:
            assert is_current(world.maps[0].session, found)
        world.open(0, steps, torn)


def test_openings_that_fail_cost_nothing() -> None:
    superblock = NEW
    for _ in range(10):
        superblock = begun(superblock)
    assert is_current(NEW.session, superblock)


def test_an_index_of_the_session_before_is_not_believed() -> None:
    """One step behind is enough: its slots may have been given to others in the session that it misses."""
    superblock = confirmed(begun(confirmed(begun(NEW))))
    assert not is_current(superblock.session - 1, superblock)
    assert not is_current(superblock.session - 2, superblock)
    assert not is_current(superblock.session + 1, superblock)
    assert is_current(superblock.session, superblock)


@pytest.mark.parametrize(
    ("index_session", "clean", "has_map", "mode"),
    [
        (9, True, [], StartMode.CLEAN),
        (9, True, [False], StartMode.CLEAN),
        (9, False, [True, True], StartMode.WARM),
        (9, False, [True, False], StartMode.UNCLEAN),
        (9, False, [False], StartMode.UNCLEAN),
        (8, True, [True], StartMode.DISCARDED),
        (10, False, [True], StartMode.DISCARDED),
    ],
)
def test_the_mode_of_a_start(index_session: int, clean: bool, has_map: list[bool], mode: StartMode) -> None:
    superblock = replace(NEW, session=9, confirmed=9)
    assert start_mode(superblock, index_session, clean, has_map) is mode
