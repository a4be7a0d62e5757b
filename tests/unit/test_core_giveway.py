"""Writes give way to reads: how many are under way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipe_rig import CALLS, PipeRig, wait_for

WRITES_BESIDE_READS = 4
NEAR_WRITES = 256


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[PipeRig]:
    rig = PipeRig(tmp_path)
    yield rig
    rig.close()


def test_beside_reads_few_writes_are_under_way_and_each_that_ends_lets_the_next_go(rig: PipeRig) -> None:
    rig.read()
    calls = [rig.write(block) for block in range(CALLS)]
    wait_for(lambda: rig.yielded == CALLS - WRITES_BESIDE_READS)
    rig.land()
    wait_for(lambda: sum(call.done() for call in calls) == 1)
    rig.land_until(calls)
    assert rig.yielded == CALLS - WRITES_BESIDE_READS, "who waited waits once"


def test_a_queue_that_never_read_has_no_limit(rig: PipeRig) -> None:
    calls = [rig.write(block) for block in range(CALLS)]
    wait_for(lambda: rig.door.stats()["active"] == CALLS)
    assert rig.yielded == 0
    rig.land_until(calls)


def test_without_reads_as_many_are_under_way_as_come(rig: PipeRig) -> None:
    """And the writes that follow a read forget it."""
    rig.read()
    for number in range(NEAR_WRITES):
        rig.land_until([rig.write(number)])
    assert rig.yielded == 0
    rig.fill()
    calls = [rig.write(block) for block in range(CALLS)]
    wait_for(lambda: rig.door.stats()["active"] == CALLS)
    rig.land_until(calls)
    assert rig.yielded == 0


def test_what_gives_way_is_through_before_the_door_is(rig: PipeRig) -> None:
    rig.read()
    calls = [rig.write(block) for block in range(CALLS)]
    wait_for(lambda: rig.yielded == CALLS - WRITES_BESIDE_READS)
    rig.door.drain()
    rig.land_until(calls)
    assert rig.door.stats()["active"] == 0
