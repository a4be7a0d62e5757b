"""Seals beside writes that are under way: those are the epoch's, and it waits for them (R11)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipe_rig import PipeRig, wait_for


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[PipeRig]:
    rig = PipeRig(tmp_path)
    yield rig
    rig.close()


def test_an_epoch_is_not_complete_before_the_writes_that_its_seal_met(rig: PipeRig) -> None:
    call = rig.write(3)
    wait_for(lambda: rig.door.stats()["active"] == 1)
    rig.volume.seal()
    assert rig.volume.collect(100) is None
    assert rig.volume.sealed(10) == []
    rig.land_until([call])
    wait_for(lambda: rig.volume.collect(100) is True)
    (block,) = rig.volume.sealed(10)
    assert (block.block, block.dirty, block.zero) == (3, 1, 0)
    assert block.slot > 0
    rig.volume.end_epoch()


def test_a_write_after_the_seal_waits_for_those_of_before(rig: PipeRig) -> None:
    """Or what is saved of the block would lack them. Then it moves the block, which a pipe cannot."""
    before = rig.write(3)
    wait_for(lambda: rig.door.stats()["active"] == 1)
    rig.volume.seal()
    after = rig.begin(3, page=5)
    wait_for(lambda: rig.door.stats()["waiting"] == 1)
    discard = rig.begin_discard(3, page=7)
    wait_for(lambda: rig.door.stats()["waiting"] == 2)
    rig.land_until([before])
    assert after.exception(20) is not None, "no slot can be read here"
    discard.result(20)
    wait_for(lambda: rig.volume.collect(100) is True)
    assert [(each.block, each.dirty) for each in rig.volume.sealed(10)] == [(3, 1)]
    rig.volume.end_epoch()
