"""Volumes in object storage on hosts that share a store in a folder: what comes back, who may write, and what
is kept through kills, lost answers and outages."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from errno import EROFS
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import TIMEOUT_S, Host, config_of
from tests.far_store import FarStore
from tierblk import claim, upload
from tierblk.claim import Wishes
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Layer
from tierblk.errors import CacheError, Fenced, RemoteRefused, RemoteUnavailable
from tierblk.remote import RECORD_BYTES_MAX, EpochName, decode_record
from tierblk.remote.store import Bytes
from tierblk.units import MIB

SIZE = 8 * MIB


class World:
    """A store and any number of hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}/store"
        self.store = FarStore(self.url)
        self.hosts: list[Host] = []

    async def host(self, name: str = "a", **volume: Any) -> Host:
        """Started; the same name again is the same cache directory."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        host = await Host.start(config_of(folder, self.url, **volume), self.folder / "run")
        self.hosts.append(host)
        return host

    async def attached(self, name: str = "a", wishes: Wishes | None = None, **volume: Any) -> Host:
        host = await self.host(name, **volume)
        await host.attach(wishes or Wishes())
        return host

    async def stop(self, host: Host) -> None:
        self.hosts.remove(host)
        await host.stop()

    async def kill(self, host: Host) -> None:
        self.hosts.remove(host)
        await host.kill()

    async def cut_power(self, host: Host) -> None:
        """Killed, and the maps are gone. Of what was written to the disk nothing is lost."""
        await self.kill(host)
        for path in (self.folder / "run").iterdir():
            shutil.rmtree(path)

    async def record(self, epoch: int) -> Any:
        name = str(EpochName(epoch))
        data = await self.store.inner.read(name, RECORD_BYTES_MAX)
        return None if data is None else decode_record(data, name=name)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    with run_directory(tmp_path) as run:
        world = World(tmp_path)
        (tmp_path / "run").symlink_to(run)

        async def open_store(*_: object) -> FarStore:
            return world.store

        monkeypatch.setattr(claim, "open_store", open_store)
        yield world
        world.store.down = False
        world.store.before = world.store.after = None
        world.store.go.set()
        for host in list(world.hosts):
            await world.kill(host)


async def until(condition: Callable[[], bool]) -> None:
    """The loop does what it has to meanwhile."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def changed(content: bytearray, rng: random.Random, count: int) -> list[tuple[int, bytes]]:
    """Writes of all alignments, made in `content` too."""
    writes = []
    for _ in range(count):
        length = rng.choice([512, 1024, 4096, 8192, 65536, 100 * 512])
        at = rng.randrange(0, (len(content) - length) // 512) * 512
        data = rng.randbytes(length)
        content[at : at + length] = data
        writes.append((at, data))
    return writes


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


async def test_another_host_is_refused_until_it_takes_over(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await a.sync()
    b = await world.host("b")
    with pytest.raises(RemoteRefused, match=r"is held by .*, which made its epoch 2") as refused:
        await b.attach()
    assert "--take-over" in str(refused.value.hint)
    await b.attach(Wishes(take_over=True))
    assert await b.read(0, PAGE_BYTES) == b"a" * PAGE_BYTES
    await b.write(0, b"b" * PAGE_BYTES)
    await b.sync()
    # The old one does not know yet.
    await a.write(PAGE_BYTES, b"x" * PAGE_BYTES)
    with pytest.raises(Fenced, match=r"epoch 3 was made by .*: another host has taken it over"):
        await a.sync()
    with pytest.raises(OSError) as error:  # noqa: PT011
        await a.write(0, b"y" * PAGE_BYTES)
    assert error.value.errno == EROFS
    with pytest.raises(OSError):  # noqa: PT011
        await a.flush()
    assert await a.read(0, 2 * PAGE_BYTES) == b"a" * PAGE_BYTES + b"x" * PAGE_BYTES
    assert await b.read(0, 2 * PAGE_BYTES) == b"b" * PAGE_BYTES + bytes(PAGE_BYTES)
    await world.stop(a)
    # It comes back: what is dirty there is of another history (R18).
    a = await world.host("a")
    for wishes in (Wishes(), Wishes(take_over=True)):
        with pytest.raises((RemoteRefused, CacheError)):
            await a.attach(wishes)
    await b.detach()
    with pytest.raises(CacheError, match=r"4 KiB were written to vol here, and then another host took"):
        await a.attach()
    await a.attach(Wishes(discard_local=True))
    assert await a.read(0, 2 * PAGE_BYTES) == b"b" * PAGE_BYTES + bytes(PAGE_BYTES)


async def test_a_take_over_that_fails_half_way_leaves_no_page_that_is_older_than_the_extents(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loser of a race for an epoch reads of the log is kept by a commit only with what it means for
    the pages that are cached (R18)."""
    a = await world.attached("a")
    await a.write(0, b"a" * BLOCK_BYTES)
    await a.detach()
    b = await world.attached("b")
    head = b.far.extents.head.epoch
    read = world.store.read
    is_over = False

    async def reading(name: str, limit_bytes: int) -> bytes | None:
        nonlocal is_over
        if name == str(EpochName(head + 2)) and is_over:
            await a.upkeep.commit()
            raise RemoteUnavailable("gone in the middle of the log")
        return await read(name, limit_bytes)

    commit = a.cache.commit

    async def committed() -> Any:
        """Between what a has read of the log and its claim b makes an epoch."""
        nonlocal is_over
        if not is_over:
            is_over = True
            await b.write(0, b"b" * PAGE_BYTES)
            await b.sync()
        return await commit()

    monkeypatch.setattr(a.cache, "commit", committed)
    world.store.read = reading  # type: ignore[method-assign]
    with pytest.raises(RemoteUnavailable, match="in the middle of the log"):
        await a.attach(Wishes(take_over=True))
    world.store.read = read  # type: ignore[method-assign]
    await a.attach(Wishes(take_over=True))
    assert await a.read(0, BLOCK_BYTES) == b"b" * PAGE_BYTES + b"a" * (BLOCK_BYTES - PAGE_BYTES)


async def test_an_attach_survives_a_request_of_each_kind_that_fails(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await a.detach()
    failed: set[tuple[str, str]] = set()

    def fail_once(method: str, name: str) -> None:
        kind = (method, name.partition("/")[0])
        if kind not in failed:
            failed.add(kind)
            raise RemoteUnavailable("busy")

    world.store.before = fail_once
    b = await world.attached("b")
    assert await b.read(0, PAGE_BYTES) == b"a" * PAGE_BYTES
    assert {("create", "proof"), ("read", "volume.json"), ("read", "epoch"), ("create", "epoch")} <= failed


async def test_a_long_log_is_read_although_one_request_in_five_fails(world: World) -> None:
    a = await world.attached("a")
    for number in range(30):
        await a.write(number * PAGE_BYTES, bytes([number + 1]) * PAGE_BYTES)
        await a.sync()
    await a.detach()
    asked = iter(range(10_000))

    def fail(method: str, name: str) -> None:
        if method == "read" and next(asked) % 5 == 4:
            raise RemoteUnavailable("busy")

    world.store.before = fail
    b = await world.attached("b")
    assert await b.read(29 * PAGE_BYTES, PAGE_BYTES) == bytes([30]) * PAGE_BYTES


async def test_who_waits_for_an_epoch_of_a_device_that_goes_on_hears_that_it_is_fenced(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await world.kill(a)
    b = await world.attached("b", Wishes(take_over=True))
    world.store.down = True
    a = await world.host("a")
    await a.attach(goes_on=True)
    syncing = asyncio.create_task(a.sync())
    await until(lambda: a.volumes.trouble is not None)
    world.store.down = False
    with pytest.raises(Fenced, match="another host has taken it over"):
        await syncing
    await world.kill(b)


async def test_what_is_clean_stays_cached_over_a_hop_and_what_changed_does_not(world: World) -> None:
    a = await world.attached("a")
    content = bytearray(random.Random(5).randbytes(SIZE))
    for at in range(0, SIZE, BLOCK_BYTES):
        await a.write(at, bytes(content[at : at + BLOCK_BYTES]))
    await a.detach()
    b = await world.attached("b")
    await b.write(3 * BLOCK_BYTES, b"b" * PAGE_BYTES)
    b.door.discard(9 * BLOCK_BYTES, BLOCK_BYTES)
    await b.detach()
    content[3 * BLOCK_BYTES : 3 * BLOCK_BYTES + PAGE_BYTES] = b"b" * PAGE_BYTES
    content[9 * BLOCK_BYTES : 10 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    before = world.store.asked["read_into"]
    await a.attach()
    assert await a.content() == content
    assert world.store.asked["read_into"] == before + 1


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


async def test_two_hosts_that_attach_at_once_have_one_winner(world: World) -> None:
    hosts = [await world.host(name) for name in "abc"]
    results = await asyncio.gather(*(host.attach() for host in hosts), return_exceptions=True)
    winners = [host for host, result in zip(hosts, results, strict=True) if result is None]
    assert len(winners) == 1, results
    for result in results:
        assert result is None or isinstance(result, RemoteRefused), result
    await winners[0].write(0, b"w" * PAGE_BYTES)
    await winners[0].detach()
    loser = next(host for host in hosts if host is not winners[0])
    await loser.attach()
    assert await loser.read(0, PAGE_BYTES) == b"w" * PAGE_BYTES


async def test_a_detach_that_cannot_upload_keeps_the_claim(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierblk import volumes

    monkeypatch.setattr(volumes, "FINISH_S", 0.3)
    a = await world.attached("a")
    await a.write(0, b"1" * PAGE_BYTES)
    world.store.down = True
    warning = await a.detach()
    assert warning is not None
    assert "4 KiB that are not in" in warning
    world.store.down = False
    b = await world.host("b")
    with pytest.raises(RemoteRefused, match="is held by"):
        await b.attach()
    await a.attach()
    assert await a.read(0, PAGE_BYTES) == b"1" * PAGE_BYTES
    await a.detach()
    await b.attach()
    assert await b.read(0, PAGE_BYTES) == b"1" * PAGE_BYTES


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


@pytest.mark.parametrize("pages", [0, 1])
async def test_a_device_that_goes_on_right_after_its_attach_still_holds_its_volume(
    world: World, pages: int
) -> None:
    """The claim is known from the store alone then."""
    a = await world.attached("a")
    await world.kill(a)
    a = await world.host("a")
    await a.attach(goes_on=True)
    await until(lambda: a.far.lineage is not None)
    if pages:
        await a.write(0, b"1" * PAGE_BYTES)
        await a.sync()
    await a.upkeep.commit()
    await world.kill(a)
    a = await world.attached("a")
    assert await a.read(0, pages * PAGE_BYTES) == b"1" * pages * PAGE_BYTES


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


async def test_an_earlier_attempt_that_arrives_late_is_adopted_and_no_success(world: World) -> None:
    """R16: what was written since is in no record yet, although the epoch's number has one of ours."""
    a = await world.attached("a")
    await a.write(0, b"1" * BLOCK_BYTES)
    await a.sync()
    number = a.far.extents.head.epoch + 1
    await a.write(0, b"2" * 2 * PAGE_BYTES)
    late: list[bytes] = []
    create = world.store.create

    async def delay(name: str, pieces: Sequence[Bytes]) -> bool:
        if not name.startswith("epoch/"):
            return await create(name, pieces)
        late.append(b"".join(pieces))
        raise RemoteUnavailable("it is on its way")

    world.store.create = delay  # type: ignore[method-assign]
    syncing = asyncio.create_task(a.sync())
    await until(lambda: a.volumes.trouble is not None)
    await world.kill(a)
    syncing.cancel()
    await asyncio.gather(syncing, return_exceptions=True)
    world.store.create = create  # type: ignore[method-assign]
    a = await world.host("a")
    await a.attach(goes_on=True)
    await until(lambda: a.far.lineage is not None)
    await a.write(PAGE_BYTES, b"3" * PAGE_BYTES)
    await a.write(9 * BLOCK_BYTES, b"3" * PAGE_BYTES)
    assert await world.store.inner.create(str(EpochName(number)), late[:1])
    await a.sync()
    assert a.far.extents.head.epoch == number + 1
    assert await world.record(number) == decode_record(late[0], name="late")
    await a.evict()
    content = await a.content()
    assert content[: 3 * PAGE_BYTES] == b"2" * PAGE_BYTES + b"3" * PAGE_BYTES + b"1" * PAGE_BYTES
    await world.kill(a)
    b = await world.attached("b", Wishes(take_over=True))
    assert await b.content() == content
