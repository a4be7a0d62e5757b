"""What `tierblk top` is told about the upload of a volume: what is being sent, and a store that takes
nothing."""

from __future__ import annotations

import asyncio

import pytest

from bench.top import LOADS, device
from tests.integration.far_world import World, until, world
from tierblk import sample, upload
from tierblk.core import BLOCK_BYTES, PAGE_BYTES

__all__ = ["world"]


async def test_an_epoch_under_way_says_how_much_of_it_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "INLINE_PAGES", 0)
    a = await world.attached("a")
    shown = a.volumes.shown(a.far)
    assert shown is not None
    assert (shown["sealed_bytes"], shown["sent_bytes"], shown["sending"]) == (0, 0, 0)
    await a.write(0, b"1" * BLOCK_BYTES)
    await a.write(3 * BLOCK_BYTES, b"1" * PAGE_BYTES)
    world.store.go.clear()
    syncing = asyncio.create_task(a.sync())

    def its_record_is_being_sent() -> bool:
        found = a.volumes.shown(a.far)
        return found is not None and bool(found["sending"]) and found["uploaded_bytes"] > 0

    await until(its_record_is_being_sent)
    await a.write(5 * BLOCK_BYTES, b"2" * PAGE_BYTES)
    shown = a.volumes.shown(a.far)
    assert shown is not None
    assert shown["uploading"]
    assert (shown["sealed_bytes"], shown["sent_bytes"]) == (BLOCK_BYTES + PAGE_BYTES,) * 2
    assert shown["dirty_bytes"] == BLOCK_BYTES + 2 * PAGE_BYTES
    assert 0 < shown["fullness"] < 1
    # the make-believe host of bench/top.py says nothing that a real one does not
    example = device(next(load for load in LOADS[0] if load.far), 0, 1.0)["write_back"]
    assert set(example) <= set(shown)
    world.store.go.set()
    await syncing
    shown = a.volumes.shown(a.far)
    assert shown is not None
    assert (shown["sealed_bytes"], shown["sent_bytes"]) == (0, 0)
    assert shown["uploaded_bytes"] == BLOCK_BYTES + PAGE_BYTES
    await world.stop(a)


async def test_a_store_that_takes_nothing_is_a_remote_in_trouble(world: World) -> None:
    a = await world.attached("a")
    (store,) = sample.remotes(a.stacks)
    assert (store["kind"], store["url"], store["state"]) == ("store", a.far.shown, "ok")
    assert store["devices"] == [a.far.name]
    await a.write(0, b"1" * PAGE_BYTES)
    world.store.down = True
    syncing = asyncio.create_task(a.sync())
    await until(lambda: a.volumes.store_trouble(a.far) is not None)
    (store,) = sample.remotes(a.stacks)
    assert (store["state"], store["reason"]) == ("degraded", f"{world.store.shown} does not answer")
    assert store["since"] > 0
    assert store["next_try_s"] is not None
    world.store.down = False
    async with asyncio.timeout(20):
        await syncing
    (store,) = sample.remotes(a.stacks)
    assert (store["state"], store["next_try_s"]) == ("ok", None)
    await world.stop(a)


async def test_writes_that_are_slowed_say_by_what(world: World) -> None:
    a = await world.attached("a", max_dirty="1MiB")
    assert not a.upkeep.throttle
    world.store.go.clear()
    for block in range(15):
        await a.write(block * BLOCK_BYTES, b"1" * BLOCK_BYTES)
    a.upkeep.look_at_dirt()
    throttle = a.upkeep.throttle or {}
    assert throttle.get("reason") == "upload"
    assert throttle["bytes_per_s"] > 0
    world.store.go.set()
    await a.sync()
    await until(lambda: a.upkeep.throttle is None)
    await world.stop(a)
