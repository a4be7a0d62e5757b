"""Volumes in object storage on hosts that share a store in a folder: what comes back, who may write, and what
is kept through kills, lost answers and outages."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tests.integration.far_world import World, changed, until, world
from tierblk import upload
from tierblk.claim import Wishes
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Layer, LocalDoor
from tierblk.errors import CacheError, RemoteUnavailable
from tierblk.units import MIB

__all__ = ["world"]

SIZE = 8 * MIB


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_what_was_written_comes_back_on_another_host(world: World, compression: str) -> None:
    rng = random.Random(1)
    content = bytearray(SIZE)
    a = await world.attached("a", compression=compression)
    for _ in range(4):
        for at, data in changed(content, rng, 40):
            await a.write(at, data)
        at = rng.randrange(0, SIZE // BLOCK_BYTES - 4) * BLOCK_BYTES
        a.door.discard(at, 3 * BLOCK_BYTES)
        content[at : at + 3 * BLOCK_BYTES] = bytes(3 * BLOCK_BYTES)
        await a.write(0, b"compress me " * 10_240)
        content[:122_880] = b"compress me " * 10_240
        await a.sync()
    assert await a.content() == content
    assert await a.detach() is None
    b = await world.attached("b")
    assert await b.content() == content
    await b.evict()
    assert await b.content() == content
    asked = world.store.asked["read_into"]
    assert asked
    assert await b.content() == content
    assert world.store.asked["read_into"] == asked, "what was read is cached"


async def test_an_epoch_is_what_was_there_at_its_seal(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"1" * BLOCK_BYTES)
    await a.write(BLOCK_BYTES, b"1" * PAGE_BYTES)
    world.store.go.clear()
    before = world.store.asked["create"]
    syncing = asyncio.create_task(a.sync())
    await until(lambda: world.store.asked["create"] > before)
    await a.write(0, b"2" * PAGE_BYTES)
    a.door.discard(BLOCK_BYTES, PAGE_BYTES)
    world.store.go.set()
    await syncing
    assert await a.read(0, 2 * PAGE_BYTES) == b"2" * PAGE_BYTES + b"1" * PAGE_BYTES
    await world.kill(a)
    b = await world.attached("b", Wishes(take_over=True))
    assert await b.read(0, BLOCK_BYTES) == b"1" * BLOCK_BYTES
    assert await b.read(BLOCK_BYTES, PAGE_BYTES) == b"1" * PAGE_BYTES


async def test_an_idle_volume_sends_nothing_and_a_small_epoch_is_one_put(world: World) -> None:
    a = await world.attached("a")
    before = world.store.asked.total()
    await a.sync()
    await asyncio.sleep(0)
    assert world.store.asked.total() == before
    for page in range(100):
        await a.write(page * 3 * PAGE_BYTES, random.randbytes(PAGE_BYTES))
    sent = world.store.created_bytes
    await a.sync()
    assert world.store.asked.total() == before + 1
    assert world.store.created_bytes - sent < 1.1 * 100 * PAGE_BYTES
    await a.sync()
    assert world.store.asked.total() == before + 1


async def test_an_epoch_under_way_answers_whoever_asks_for_what_it_has(world: World) -> None:
    """Also a second one who asks is no reason for an empty epoch."""
    a = await world.attached("a")
    await a.write(0, b"1" * PAGE_BYTES)
    world.store.go.clear()
    before = world.store.asked["create"]
    first = asyncio.create_task(a.sync())
    await until(lambda: world.store.asked["create"] > before)
    second = asyncio.create_task(a.sync())
    await asyncio.sleep(0)
    world.store.go.set()
    await asyncio.gather(first, second)
    assert world.store.asked["create"] == before + 1


async def test_a_killed_daemon_goes_on_with_its_map(world: World) -> None:
    rng = random.Random(2)
    content = bytearray(SIZE)
    a = await world.attached("a")
    for at, data in changed(content, rng, 30):
        await a.write(at, data)
    await a.sync()
    for at, data in changed(content, rng, 30):
        await a.write(at, data)
    await world.kill(a)
    world.store.down = True
    a = await world.host("a")
    await a.attach(goes_on=True)  # without the network
    written = random.Random(3).randbytes(BLOCK_BYTES)
    await a.write(5 * BLOCK_BYTES, written)
    content[5 * BLOCK_BYTES : 6 * BLOCK_BYTES] = written
    world.store.down = False
    assert await a.content() == content
    await until(lambda: a.far.lineage is not None)
    await a.sync()
    await world.stop(a)
    b = await world.attached("b")
    assert await b.content() == content


@pytest.mark.parametrize("where", ["before", "after"])
async def test_a_kill_around_the_record_loses_nothing(world: World, where: str) -> None:
    """Before the record is created, or when it is and nobody here knows (R16: adopted, R13: replayed)."""
    a = await world.attached("a")
    await a.write(0, b"1" * BLOCK_BYTES)
    await a.sync()
    head = a.far.extents.head.epoch
    await a.write(0, b"2" * 2 * PAGE_BYTES)

    def fail(method: str, name: str) -> None:
        if method == "create" and name.startswith("epoch/"):
            raise RemoteUnavailable("the answer is lost")

    setattr(world.store, where, fail)
    syncing = asyncio.create_task(a.sync())
    await until(lambda: a.volumes.trouble is not None)
    await a.write(PAGE_BYTES, b"3" * PAGE_BYTES)
    await world.kill(a)
    syncing.cancel()
    await asyncio.gather(syncing, return_exceptions=True)
    world.store.before = world.store.after = None
    assert (await world.record(head + 1) is not None) == (where == "after")
    a = await world.host("a")
    await a.attach(goes_on=True)
    expected = b"2" * PAGE_BYTES + b"3" * PAGE_BYTES + b"1" * (BLOCK_BYTES - 2 * PAGE_BYTES)
    assert await a.read(0, BLOCK_BYTES) == expected
    await until(lambda: a.far.lineage is not None)
    await a.sync()
    assert await a.read(0, BLOCK_BYTES) == expected
    await world.stop(a)
    b = await world.attached("b")
    assert await b.read(0, BLOCK_BYTES) == expected


async def test_an_answer_that_is_lost_is_no_foreign_writer(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"1" * BLOCK_BYTES)
    lost = iter([True, True, False])

    def lose(method: str, name: str) -> None:
        if method == "create" and next(lost, False):
            raise RemoteUnavailable("the answer is lost")

    world.store.after = lose
    await a.sync()
    assert not a.far.standing.fenced
    assert a.far.layer.dirty_pages() == 0
    assert a.far.extents.head.epoch == 2


async def test_the_store_may_be_gone_for_a_while(world: World) -> None:
    a = await world.attached("a")
    content = bytearray(SIZE)
    rng = random.Random(6)
    for _ in range(3):
        world.store.down = True
        for at, data in changed(content, rng, 20):
            await a.write(at, data)
        syncing = asyncio.create_task(a.sync())
        await until(lambda: a.volumes.trouble is not None)
        for at, data in changed(content, rng, 20):
            await a.write(at, data)
        assert "does not answer" in str(a.upkeep.trouble)
        world.store.down = False
        await syncing
        assert a.volumes.trouble is None
    assert await a.content() == content
    await a.detach()
    b = await world.attached("b")
    assert await b.content() == content


async def test_more_is_written_than_the_cache_holds(world: World) -> None:
    """Slots come free by uploading; no write fails, and what was evicted comes back."""
    size = 48 * MIB
    a = await world.attached("a", size=size)
    rng = random.Random(7)
    blocks = {block: rng.randbytes(BLOCK_BYTES) for block in range(size // BLOCK_BYTES)}
    for block, data in blocks.items():
        await a.write(block * BLOCK_BYTES, data)
    for block in rng.sample(sorted(blocks), 100):
        assert await a.read(block * BLOCK_BYTES, BLOCK_BYTES) == blocks[block], block
    for block in rng.sample(sorted(blocks), 100):
        blocks[block] = rng.randbytes(PAGE_BYTES) + blocks[block][PAGE_BYTES:]
        await a.write(block * BLOCK_BYTES, blocks[block][:PAGE_BYTES])
    assert await a.content() == b"".join(blocks.values())
    await a.detach()
    b = await world.attached("b", size=size)
    assert await b.content() == b"".join(blocks.values())


async def test_a_flush_waits_for_the_store_where_it_is_to(world: World) -> None:
    a = await world.attached("a", durability="remote")
    await a.write(0, b"1" * PAGE_BYTES)
    world.store.go.clear()
    before = world.store.asked["create"]
    flushing = asyncio.create_task(a.flush())
    await until(lambda: world.store.asked["create"] > before)
    assert not flushing.done()
    world.store.go.set()
    await flushing
    assert a.far.extents.head.epoch == 2
    await a.flush()
    assert a.far.extents.head.epoch == 2


async def test_uploads_give_way_to_readers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One goes on; the others when nobody waits for bytes any more."""
    a = await world.attached("a", size=80 * MIB, upload_requests=4)
    reading = True
    a.volumes.demand = lambda: reading
    world.store.holds = "data/"
    world.store.go.clear()
    monkeypatch.setattr(upload, "OBJECT_PAGES", 512)
    for block in range(96):
        await a.write(block * BLOCK_BYTES, random.randbytes(BLOCK_BYTES))
    before = world.store.asked["create"]
    syncing = asyncio.create_task(a.sync())
    await until(lambda: world.store.asked["create"] > before)
    for _ in range(50):
        await asyncio.sleep(0)
    assert world.store.asked["create"] == before + 1
    reading = False
    await until(lambda: world.store.asked["create"] == before + 3)
    world.store.go.set()
    await syncing


async def test_zeros_that_only_the_store_knows_are_no_others_bytes(world: World) -> None:
    """Over nothing the extent map has no zeros, and a power cut takes what the block map knew of clean pages:
    what comes then is a hole, read into memory in which another block was."""
    a = await world.attached("a")
    content = bytearray(b"1" * SIZE)
    await a.write(0, bytes(content))
    await a.sync()
    for at in range(0, SIZE, 3 * BLOCK_BYTES):
        a.door.discard(at, 5 * PAGE_BYTES)
        content[at : at + 5 * PAGE_BYTES] = bytes(5 * PAGE_BYTES)
    await a.sync()
    a.far.layer.mark_all()
    await a.upkeep.commit()
    await world.cut_power(a)
    a = await world.attached("a")
    assert await a.content() == content
    await a.evict()
    assert await a.content() == content


async def test_a_write_under_way_at_the_seal_is_synced_before_the_record(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13: it is in the epoch, so the commit cycle of the epoch begins behind it. Else a power cut could take
    from here what the store has and a FLUSH was told."""
    a = await world.attached("a")
    await a.write(0, b"1" * PAGE_BYTES)
    collect, cycle = Layer.collect, a.cache.committer._cycle
    events, looked = list[str](), 0

    def under_way(layer: Layer, map_pages: int) -> bool | None:
        nonlocal looked
        looked += 1
        if looked <= 20:
            return None
        events.append("ended")
        return collect(layer, map_pages)

    async def watched() -> Any:
        events.append("cycle")
        return await cycle()

    monkeypatch.setattr(Layer, "collect", under_way)
    monkeypatch.setattr(a.cache.committer, "_cycle", watched)
    world.store.before = lambda method, name: events.append(method)
    await a.sync()
    assert events == ["ended", "cycle", "create"]


async def test_what_other_volumes_keep_for_good_slows_no_write_down(world: World) -> None:
    """A local volume's slots are dirty for ever, and no upload makes room of them."""
    a = await world.attached("a")
    local = await a.cache.volume_layer("local", "local", SIZE * 2, None)
    door = LocalDoor(a.cache.engine, None, volume=local, size_bytes=SIZE * 2, queue_depth=4)
    try:
        for block in range(170):  # of 255 slots, of which 191 may be dirty
            await asyncio.to_thread(door.write, block * BLOCK_BYTES, b"l" * PAGE_BYTES)
        await a.write(0, b"1" * PAGE_BYTES)
        stats = a.cache.engine.stats()
        assert stats["dirty_slots"] == 171
        assert a.volumes.pace_per_s(stats) is None
        for block in range(64):
            await a.write(block * BLOCK_BYTES, b"1" * PAGE_BYTES)
        assert a.volumes.pace_per_s(a.cache.engine.stats()) is not None, (
            "of what is left most is to be uploaded"
        )
    finally:
        door.drain()
        door.quit()
        await asyncio.to_thread(door.close)


async def test_a_write_back_that_dies_of_a_bug_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    a = await world.attached("a")
    monkeypatch.setattr(upload, "split", lambda _: 1 // 0)
    await a.write(0, b"1" * PAGE_BYTES)
    await a.volumes.sync(a.far, wait=False)
    await until(lambda: a.volumes.trouble is not None)
    assert "ended by an internal error: ZeroDivisionError" in str(a.upkeep.trouble)
    with pytest.raises(CacheError, match="internal error"):  # also who asks later
        await a.sync()
    assert "internal error" in str(await a.detach())


async def test_who_waits_for_a_write_back_that_dies_of_a_bug_hears_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await world.attached("a", durability="remote")
    monkeypatch.setattr(upload, "split", lambda _: 1 // 0)
    await a.write(0, b"1" * PAGE_BYTES)
    with pytest.raises(OSError, match="Input/output error"):
        await a.flush()
    with pytest.raises(CacheError, match="internal error"):
        await a.sync()
