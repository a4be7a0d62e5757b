"""How a wait for a fill ends when several things meet: late readers, a remote that is back, short runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_rig import TIMEOUT_S, Rig
from tests.unit.test_core_waiting import prefetch, window
from tierblk.core import BLOCK_BYTES, FAIL, FILL, FILL_WHOLE_MORE, GIVE_UP, PAGE_BYTES, Record

RANDOM = random.Random(8).randbytes(BLOCK_BYTES)
IMAGE = RANDOM + bytes(BLOCK_BYTES) + RANDOM * 10


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 30)
    yield rig
    rig.close()


def test_who_parks_on_readahead_that_is_just_given_up_looks_again(rig: Rig) -> None:
    prefetch(rig, 0, 1)
    rig.until(lambda: 0 in rig.asked)
    read = rig.read(0, PAGE_BYTES)
    rig.until(lambda: len(rig.told) == 1)
    token = rig.asked[0].token
    rig.engine.push([Record(FAIL, token=token, result=-5, pages=1)])
    rig.until(lambda: 0 in rig.asked and rig.asked[0].token != token)
    assert not read.done()
    rig.finish(read)
    assert read.result() == rig.expect(0, PAGE_BYTES)


def test_a_fail_fast_reader_gets_what_is_staged_though_the_fill_was_given_up_once(rig: Rig) -> None:
    prefetch(rig, 0, 2)
    rig.until(lambda: len(rig.asked) == 2)
    rig.engine.push([Record(GIVE_UP, token=rig.asked[0].token, result=-5)])
    window(rig, 0, 1, 3, last_more=True)
    rig.obeyed()
    rig.door.set_patience(0)
    assert rig.read(0, BLOCK_BYTES).result(TIMEOUT_S) == rig.expect(0, BLOCK_BYTES)
    rig.settle_all()


def test_a_block_of_zeros_ends_the_run_before_it(rig: Rig) -> None:
    """Nothing follows at that place any more, so the run is written at once: without a tick having passed."""
    prefetch(rig, 0, 2)
    rig.until(lambda: len(rig.asked) == 2)
    places = {0: 4, 1: 5}
    for block, place in places.items():
        at = place * BLOCK_BYTES
        rig.engine.staging[at : at + BLOCK_BYTES] = rig.expect(block * BLOCK_BYTES, BLOCK_BYTES)
    rig.finals |= {0, 1}
    rig.engine.push(
        Record(
            FILL,
            layer=1,
            token=rig.asked[block].token,
            block=block,
            value=place * BLOCK_BYTES,
            result=FILL_WHOLE_MORE,
            pages=0xFFFF,
        )
        for block, place in places.items()
    )
    rig.obeyed()
    assert rig.engine.stats()["slot_write_calls"] == 1
    rig.settle_all()
    assert rig.read(0, 2 * BLOCK_BYTES).result(TIMEOUT_S) == rig.expect(0, 2 * BLOCK_BYTES)
