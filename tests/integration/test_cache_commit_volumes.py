"""What volumes in object storage make durable beside their rows: in which cycle, and what becomes of it when
that fails (R6, R13)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import CacheRig, changed_index, copy_cache, image_bytes
from tests.integration.test_cache_commit import Gate, committed_blocks, failing
from tierblk.cache import commit as commit_module
from tierblk.cache.index import Index
from tierblk.cache.layers import VolumeChange
from tierblk.core import Layer
from tierblk.errors import CacheError

IMAGE = image_bytes(1, 200)
SIZE_BYTES = 1 << 24
Extents = list[tuple[bytes, bytes]]


@dataclass
class Source:
    """A volume that has one thing more to say for each name that it is told."""

    changed: list[bytes] = field(default_factory=list)
    taken: Callable[[], None] = lambda: None
    state: int = 0

    def say(self, *names: bytes) -> None:
        self.changed += names

    def is_changed(self) -> bool:
        return bool(self.changed)

    def take(self) -> VolumeChange | None:
        self.taken()
        if not self.changed:
            return None
        self.state += 1
        extents = tuple((name, b"at %d" % self.state) for name in self.changed)
        self.changed.clear()
        return VolumeChange(b"%d" % self.state, extents)

    def put_back(self, change: VolumeChange) -> None:
        self.changed[:0] = [name for name, _ in change.extents]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[CacheRig]:
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    yield rig
    await rig.end(clean=False)


async def volume(rig: CacheRig, name: str = "v") -> tuple[Layer, Source]:
    layer = await rig.cache.volume_layer(name, "local", SIZE_BYTES, None)
    source = Source()
    rig.cache.set_volume_source(layer.layer_id, source)
    return layer, source


def durable(tmp_path: Path, layer: Layer) -> tuple[bytes | None, Extents]:
    """State and extents as a power cut at this instant would leave them."""
    with changed_index(copy_cache(tmp_path / "cache", tmp_path / "copy")) as index:
        return index.volume_state(layer.layer_id), index.extents(layer.layer_id)


async def test_what_a_volume_says_is_written_without_rows_too(rig: CacheRig, tmp_path: Path) -> None:
    layer, source = await volume(rig)
    await rig.cache.commit()
    assert not rig.cache.changed()
    assert await rig.cache.volume_state("v") is None
    source.say(b"b", b"a")
    assert rig.cache.changed()
    report = await rig.cache.commit()
    assert (report.rows_written, report.rows_deleted) == (0, 0)
    assert not rig.cache.changed()
    expected = (b"1", [(b"a", b"at 1"), (b"b", b"at 1")])
    assert durable(tmp_path, layer) == expected
    found = await rig.cache.volume_state("v"), await rig.cache.volume_extents(layer.layer_id)
    assert found == expected
    assert await rig.cache.volume_state("another") is None
    await rig.cache.commit()
    assert source.state == 1
    rig.cache.set_volume_source(layer.layer_id, None)
    source.say(b"c")
    assert not rig.cache.changed()
    await rig.cache.commit()
    assert durable(tmp_path, layer) == expected


async def test_an_end_in_order_writes_what_volumes_still_say(tmp_path: Path) -> None:
    rig = await CacheRig.open(tmp_path / "cache", tmp_path / "run")
    layer, source = await volume(rig)
    source.say(b"a")
    await rig.end(clean=True)
    assert durable(tmp_path, layer) == (b"1", [(b"a", b"at 1")])


async def test_r13_volumes_are_asked_behind_the_last_row(
    rig: CacheRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch calls pages clean when the extents have them: so what came later has both, or neither."""
    monkeypatch.setattr(commit_module, "FIRST_ROWS", 1)
    monkeypatch.setattr(commit_module, "BATCH_ROWS", 1)
    steps: list[str] = []
    for name in ("a", "b"):
        layer = await rig.base(IMAGE, name)
        await rig.fill(layer, 0, 64, 130)
        monkeypatch.setattr(layer, "take_changed", noting(steps, "rows", layer.take_changed))
        _, source = await volume(rig, name)
        source.taken = lambda: steps.append("volume")
        source.say(b"a")
    engine = rig.cache.engine
    monkeypatch.setattr(engine, "commit_taken", noting(steps, "taken", engine.commit_taken))
    assert (await rig.cache.commit()).rows_written == 6
    assert steps == ["rows"] * 6 + ["volume"] * 2 + ["taken"]


def noting(steps: list[str], step: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        steps.append(step)
        return call(*arguments)

    return noted


async def test_r6_a_power_cut_leaves_old_rows_with_old_extents(rig: CacheRig, tmp_path: Path) -> None:
    base = await rig.base(IMAGE)
    layer, source = await volume(rig)
    await rig.fill(base, 0)
    source.say(b"a")
    await rig.cache.commit()
    old = {0}, (b"1", [(b"a", b"at 1")])
    await rig.fill(base, 100)
    source.say(b"a", b"b")
    rig.cache.committer.sync_slots = gate = Gate()
    cycle = asyncio.create_task(rig.cache.commit())
    await gate.reached()
    source.say(b"c")  # of the next cycle
    assert (committed_blocks(tmp_path), durable(tmp_path, layer)) == old
    gate.release()
    await cycle
    assert committed_blocks(tmp_path) == {0, 100}
    assert durable(tmp_path, layer) == (b"2", [(b"a", b"at 2"), (b"b", b"at 2")])
    assert rig.cache.changed()
    await rig.cache.commit()
    assert durable(tmp_path, layer) == (b"3", [(b"a", b"at 2"), (b"b", b"at 2"), (b"c", b"at 3")])


async def test_r7_a_cycle_that_fails_puts_back_what_volumes_said(
    rig: CacheRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = await rig.base(IMAGE)
    layer, source = await volume(rig)
    second_layer, second = await volume(rig, "w")
    await rig.fill(base, 0)
    source.say(b"a")
    second.say(b"x")

    def fails(*_: object) -> None:
        source.say(b"b")  # while the cycle runs
        raise CacheError("the index is full")

    with monkeypatch.context() as patch:
        patch.setattr(Index, "write_rows", fails)
        with pytest.raises(CacheError, match="is full"):
            await rig.cache.commit()
    assert (source.changed, second.changed, base.changed()) == ([b"a", b"b"], [b"x"], True)
    assert durable(tmp_path, layer) == (None, [])
    assert (await rig.cache.commit()).rows_written == 1
    assert durable(tmp_path, layer) == (b"2", [(b"a", b"at 2"), (b"b", b"at 2")])
    assert durable(tmp_path, second_layer) == (b"2", [(b"x", b"at 2")])


async def test_a_volume_that_cannot_say_it_fails_the_cycle_and_takes_nobody_s_away(rig: CacheRig) -> None:
    base = await rig.base(IMAGE)
    await rig.fill(base, 0)
    _, source = await volume(rig)
    _, broken = await volume(rig, "w")
    source.say(b"a")

    def fails() -> None:
        raise OSError(EIO, "a bug")

    broken.taken = fails
    with pytest.raises(OSError, match="a bug"):
        await rig.cache.commit()
    assert (source.changed, base.changed()) == ([b"a"], True)
    broken.taken = lambda: None
    assert (await rig.cache.commit()).rows_written == 1
    assert not source.is_changed()


async def test_r7_after_a_failed_sync_it_stays_with_the_volume(rig: CacheRig, tmp_path: Path) -> None:
    layer, source = await volume(rig)
    source.say(b"a")
    rig.cache.committer.sync_slots = failing(OSError(EIO, "gone"))
    for _ in range(2):
        with pytest.raises(CacheError, match="could not be synced"):
            await rig.cache.commit()
        assert source.changed == [b"a"]
    assert durable(tmp_path, layer) == (None, [])


async def test_a_volume_that_is_dropped_is_not_asked_and_leaves_nothing(
    rig: CacheRig, tmp_path: Path
) -> None:
    layer, source = await volume(rig)
    source.say(b"a")
    await rig.cache.commit()
    source.say(b"b")
    await rig.cache.drop_volume("v")
    source.say(b"c")
    assert not rig.cache.changed()
    await rig.cache.commit()
    assert durable(tmp_path, layer) == (None, [])
    again, _ = await volume(rig)
    assert again.layer_id == layer.layer_id
    assert await rig.cache.volume_state("v") is None
