"""Traces that random steps do not come by, or that once found something."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_rig import Rig
from tests.property.images import HOT, IMAGES
from tests.property.world import World
from tierblk.core import BLOCK_BYTES, MAP_HEADER_BYTES


@pytest.fixture
def world() -> Iterator[World]:
    world = World(slots=8)
    yield world
    world.close()


def cache_blocks(world: World, door: str, blocks: range) -> None:
    world.daemon.read(door, blocks.start * BLOCK_BYTES, len(blocks) * BLOCK_BYTES)
    world.settle()
    world.finish()


def test_r6_a_slot_freed_when_the_rows_were_taken_waits_for_the_next_commit(world: World) -> None:
    cache_blocks(world, "a'", HOT["a"][6:10])
    world.commit()
    layer, gone = world.daemon.layers["a"], list[int]()
    take = layer.take_changed

    def take_and_evict(max_rows: int) -> list[tuple[int, bytes]]:
        rows = take(max_rows)
        if not gone:
            gone.append(world.evict(2))
        return rows

    layer.take_changed = take_and_evict  # type: ignore[method-assign]
    layer.put_back([0])  # or there would be nothing to take
    world.commit()
    assert gone == [2]
    assert world.daemon.engine.quarantined_slots() == 2
    world.check()
    cache_blocks(world, "b", HOT["b"][:6])  # more than there are free slots
    world.check()
    world.crash(kill=False, seed=1)
    world.check()


@pytest.mark.parametrize("count_at", [20, 22], ids=["reader", "writer"])
def test_r2_a_block_with_something_in_flight_keeps_its_slot(tmp_path: Path, count_at: int) -> None:
    """A slot read takes microseconds, so the count is put into the map as a read under way would have put it
    there."""
    rig = Rig(tmp_path, IMAGES["a"], slots=9)
    rig.finish(rig.read(6 * BLOCK_BYTES, 3 * BLOCK_BYTES))
    with rig.map_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as entries:
        at = MAP_HEADER_BYTES + 7 * 32 + count_at
        entries[at] += 1
        assert rig.evict(3) == 2
        assert set(rig.entries()) == {7}
        entries[at] -= 1
        assert rig.evict(3) == 1
    rig.close()
