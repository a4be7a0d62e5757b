"""Crashes at every point, on real files: kills that leave the maps, power cuts that lose what was not synced.

A power cut is composed: every page of `slots` and `sums` that was written since the last sync is there or
not, at random; the index is as its last transaction left it. What the cache then serves must be right, and
what was committed must be there.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cache_rig import CACHE_BYTES, CacheRig, copy_cache, image_bytes, layer_rows
from tierblk.cache.index import NO_VOLUMES
from tierblk.cache.rows import entries_of
from tierblk.cache.start import StartMode
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.units import MIB

IMAGES = {"a": image_bytes(1, 200), "b": image_bytes(2, 130)}
POINTS = ["before the cycle", "rows taken", "slots synced", "sums synced", "rows written", "after the cycle"]
Crash = Literal["kill", "cut"]
SIZES = [16 * MIB, 17 * MIB, 24 * MIB]
Cached = dict[tuple[int, int], int]
T = TypeVar("T")


class Machine:
    """A host: a disk with a cache directory, a memory that a kill leaves alone, and one daemon on them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.boot = 0
        self.size_bytes = CACHE_BYTES
        self.durable: dict[str, bytes] = {"slots": b"", "sums": b""}
        self.point: str | None = None  # where the next cycle is to be crashed
        self.crashed: Callable[[], None] = lambda: None

    @property
    def directory(self) -> Path:
        return self.path / f"cache-{self.boot}"

    @property
    def run_dir(self) -> Path:
        return self.path / f"run-{self.boot}"

    async def start(self) -> CacheRig:
        rig = await CacheRig.open(self.directory, self.run_dir, self.size_bytes)
        self._synced("slots")  # the superblock's sync covers the whole file
        committer, index = rig.cache.committer, rig.cache._index
        write_rows = index.write_rows

        def sync(name: str) -> Callable[[int], None]:
            def sync_file(descriptor: int) -> None:
                if name == "slots":
                    self._reached("rows taken")
                os.fsync(descriptor)
                self._synced(name)
                self._reached(f"{name} synced")

            return sync_file

        def write(rows: Any, journaled: int | None = None, volumes: Any = NO_VOLUMES) -> tuple[int, int]:
            result = write_rows(rows, journaled, volumes)
            self._reached("rows written")
            return result

        committer.sync_slots, committer.sync_sums = sync("slots"), sync("sums")
        index.write_rows = write  # type: ignore[method-assign]
        return rig

    def _synced(self, name: str) -> None:
        self.durable[name] = (self.directory / name).read_bytes()

    def _reached(self, point: str) -> None:
        if self.point == point:
            self.point = None
            self.crashed()

    def crash(self, crash: Crash, dice: random.Random) -> None:
        """The host as the crash leaves it; the daemon goes on in the old one until it is closed."""
        old_directory, old_run_dir = self.directory, self.run_dir
        durable = dict(self.durable)
        self.boot += 1
        copy_cache(old_directory, self.directory)
        if crash == "kill":
            shutil.copytree(old_run_dir, self.run_dir)
            return
        for name, synced in durable.items():
            path = self.directory / name
            path.write_bytes(_some_pages(synced, path.read_bytes(), dice))


def _some_pages(synced: bytes, written: bytes, dice: random.Random) -> bytes:
    """The file with some of the pages that were written since the sync."""
    synced = synced.ljust(len(written), b"\0")
    pages = (slice(at, at + PAGE_BYTES) for at in range(0, len(written), PAGE_BYTES))
    return b"".join(dice.choice((synced, written))[page] for page in pages)


def cached(rig: CacheRig) -> Cached:
    """(layer, block) -> slot of all that is in slots."""
    return {
        (layer.layer_id, row * 64 + i): entry.slot
        for layer in layer_rows(rig.cache)
        for row, packed in layer.rows.items()
        for i, entry in enumerate(entries_of(packed))
        if entry.cached
    }


async def end_after_crash(rig: CacheRig) -> None:
    """The daemon that the test crashed: its own directory has been left behind."""
    await rig.end(clean=False)


async def read_all(rig: CacheRig, name: str) -> None:
    """Reads an image from end to end and compares."""
    layer, image = await rig.base(IMAGES[name], name), IMAGES[name]
    assert await rig.read(layer, 0, len(image) // BLOCK_BYTES) == image
    await rig.settle()


@pytest.mark.parametrize("crash", ["kill", "cut"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_in_the_middle_of_a_commit(tmp_path: Path, point: str, crash: Crash) -> None:
    machine = Machine(tmp_path)
    rig = await machine.start()
    layer = await rig.base(IMAGES["a"], "a")
    await rig.fill(layer, *range(100))
    await rig.cache.commit()
    committed = cached(rig)
    await rig.evict(20)
    await rig.fill(layer, *range(100, 200))
    now = cached(rig)
    dice = random.Random(point)
    machine.point, machine.crashed = point, lambda: machine.crash(crash, dice)
    if point == "before the cycle":
        machine._reached(point)
    await rig.cache.commit()
    machine._reached("after the cycle")
    assert machine.boot == 1
    await end_after_crash(rig)

    rig = await machine.start()
    assert rig.cache.start_mode is (StartMode.WARM if crash == "kill" else StartMode.UNCLEAN)
    if crash == "kill" or point in ("rows written", "after the cycle"):
        assert cached(rig) == now
    else:
        assert cached(rig) == committed
    assert rig.violations() == []
    await read_all(rig, "a")
    assert rig.violations() == []
    await rig.end(clean=True)


class CacheMachine(RuleBasedStateMachine):
    """Reads, evictions and commits, with kills, power cuts and restarts among them."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.path = Path(tempfile.mkdtemp(prefix="tierblk-test-"))
        self.machine = Machine(self.path)
        self.committed: Cached = {}
        self.rig = self.run(self.machine.start())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.rig.end(clean=True))
        self.runner.close()
        shutil.rmtree(self.path)

    @rule(name=st.sampled_from("ab"), at=st.integers(0, 190), count=st.integers(1, 60))
    def read(self, name: str, at: int, count: int) -> None:
        image = IMAGES[name]
        count = min(count, max(0, len(image) // BLOCK_BYTES - at))

        async def read() -> None:
            layer = await self.rig.base(image, name)
            data = await self.rig.read(layer, at, count)
            assert data == image[at * BLOCK_BYTES : (at + count) * BLOCK_BYTES]  # I1
            await self.rig.settle()

        if count:
            self.run(read())

    @rule(count=st.integers(1, 120))
    def evict(self, count: int) -> None:
        assert self.run(self.rig.evict(count)) <= count

    @rule()
    def commit(self) -> None:
        self.run(self.rig.cache.commit())
        self.committed = cached(self.rig)
        assert self.rig.cache.stats()["quarantined"] == 0
        assert not self.rig.cache.changed()

    @rule(clean=st.booleans(), size_bytes=st.sampled_from(SIZES))
    def restart(self, clean: bool, size_bytes: int) -> None:
        before = cached(self.rig)
        self.run(self.rig.end(clean))
        self.machine.size_bytes = size_bytes
        self.rig = self.run(self.machine.start())
        assert cached(self.rig) == self.still(before)  # nothing is lost (R1) but what has no place any more
        self.committed = self.still(before if clean else self.committed)

    def still(self, blocks: Cached) -> Cached:
        """Those that a cache of this size has the slots for."""
        return {
            block: slot for block, slot in blocks.items() if slot < self.machine.size_bytes // BLOCK_BYTES
        }

    @rule(
        crash=st.sampled_from(["kill", "cut"]),
        seed=st.integers(0, 2**32),
        size_bytes=st.sampled_from(SIZES),
    )
    def crash(self, crash: Crash, seed: int, size_bytes: int) -> None:
        expected = cached(self.rig) if crash == "kill" else self.committed
        self.machine.crash(crash, random.Random(seed))
        self.machine.size_bytes = size_bytes
        self.committed = self.still(self.committed)
        self.begin_again(self.still(expected))

    @precondition(lambda self: self.rig.cache.changed())
    @rule(
        point=st.sampled_from(POINTS[1:-1]),
        crash=st.sampled_from(["kill", "cut"]),
        seed=st.integers(0, 2**32),
    )
    def crash_in_a_commit(self, point: str, crash: Crash, seed: int) -> None:
        now = cached(self.rig)
        kept = now if crash == "kill" or point == "rows written" else self.committed
        self.committed = now if point == "rows written" else self.committed
        self.machine.point = point
        self.machine.crashed = lambda: self.machine.crash(crash, random.Random(seed))
        self.run(self.rig.cache.commit())
        self.begin_again(kept)

    def begin_again(self, expected: Cached) -> None:
        """A daemon on what the crash has left; the old one is closed where nobody looks any more."""
        old = self.rig
        self.run(end_after_crash(old))
        self.rig = self.run(self.machine.start())
        assert cached(self.rig) == expected

    @invariant()
    def nothing_is_violated(self) -> None:
        assert self.rig.violations() == []


@pytest.mark.timeout(300)
class TestCacheMachine(CacheMachine.TestCase):  # type: ignore[misc, valid-type]  # made at run time
    settings = settings(
        max_examples=12, stateful_step_count=16, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
