"""A volume's log in a store: loaded, followed, cloned, rolled back, with and without checkpoints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.integration.seaweed import CREDENTIALS, SeaweedServer
from tests.integration.servers import remote_settings
from tests.integration.volume_store import (
    BIRTH,
    UUID_2,
    OpenStore,
    Watched,
    content,
    grow,
    open_store,
    page,
    put,
    record_name,
    threads,
)
from tests.unit.volume_rig import Volume
from tierblk.errors import RemoteRefused
from tierblk.remote import checkpoint, epoch, history
from tierblk.remote.client import new_session
from tierblk.remote.extents import ExtentMap
from tierblk.remote.history import Followed, Lineage, open_lineage
from tierblk.remote.s3 import S3Store
from tierblk.remote.wallet import FixedWallet


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


__all__ = ["open_store", "threads"]  # fixtures


async def no_parent(url: str) -> Watched:
    raise AssertionError(url)


async def alone(store: Watched) -> Lineage:
    return await open_lineage(store, no_parent)


async def stored(volume: Volume, open_store: OpenStore) -> tuple[Watched, Lineage]:
    store = await open_store("v")
    await put(volume, store)
    found = await alone(store)
    store.asked.clear()
    return store, found


@pytest.mark.usefixtures("threads")
async def test_every_epoch_is_what_it_was(open_store: OpenStore) -> None:
    volume = Volume(BIRTH)
    grow(volume, 40)
    store, found = await stored(volume, open_store)
    for number, then in enumerate(volume.maps):
        assert content(await history.load(found, number)) == content(then)
    assert content(await history.load(found)) == content(volume.map)
    assert 1 < store.most_running <= history.AHEAD_MAX
    with pytest.raises(RemoteRefused, match="has no epoch 41, its last one is 40"):
        await history.load(found, 41)


@pytest.mark.usefixtures("threads")
async def test_following_gives_the_records_and_asks_an_idle_volume_once(open_store: OpenStore) -> None:
    volume = Volume(BIRTH)
    grow(volume, 30)
    store, found = await stored(volume, open_store)
    extents = await history.load(found, 3)
    followed = await history.follow(found, extents)
    assert content(extents) == content(volume.map)
    assert [each.record.epoch for each in followed] == list(range(4, 31))
    for record, record_hash in followed:
        encoded = volume.objects[record_name(record.epoch)]
        assert record_hash == epoch.hash_of(encoded)
        assert record == replace(epoch.decode(encoded, name="x"), inline=b"")
    store.asked.clear()
    assert await history.follow(found, extents) == []
    assert store.asked == [record_name(31)]
    grow(volume, 1)
    await put(volume, store)
    assert [each.record.epoch for each in await history.follow(found, extents)] == [31]


async def test_a_log_that_grows_while_it_is_followed_is_followed_to_its_end(open_store: OpenStore) -> None:
    volume = Volume(BIRTH)
    grow(volume, 5)
    store, found = await stored(volume, open_store)

    has_grown = asyncio.Event()

    async def write_on(name: str) -> None:
        if name == record_name(6) and not has_grown.is_set():
            grow(volume, 20)
            await put(volume, store.inner)
            has_grown.set()
        elif name == record_name(7):
            await has_grown.wait()

    store.before = write_on
    store.hidden = [record_name(6)]  # it was asked for before, and those behind it afterwards
    extents = await history.load(found)
    assert extents.head.epoch == 25
    assert content(extents) == content(volume.map)
    assert store.hidden == []


async def test_a_thread_never_has_the_map_that_others_look_at(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = Volume(BIRTH)
    grow(volume, 3)
    store, found = await stored(volume, open_store)
    extents = await history.load(found, 1)
    seen: list[ExtentMap] = []

    def apply(self: ExtentMap, *arguments: object, **keys: object) -> None:
        seen.append(self)
        as_it_is(self, *arguments, **keys)  # type: ignore[arg-type]

    def encode(still: ExtentMap) -> bytes:
        seen.append(still)
        return b"a checkpoint"

    as_it_is = ExtentMap.apply
    monkeypatch.setattr(ExtentMap, "apply", apply)
    monkeypatch.setattr(checkpoint, "encode", encode)
    monkeypatch.setattr(history, "THREAD_BYTES", 1)
    await history.follow(found, extents)
    assert await history.write_checkpoint(store, extents)
    assert len(seen) == 3
    assert all(each is not extents for each in seen)
    assert content(extents) == content(volume.map)


async def test_a_hole_in_the_log_is_not_its_end(open_store: OpenStore) -> None:
    volume = Volume(BIRTH)
    grow(volume, 8)
    store, found = await stored(volume, open_store)
    await store.delete(record_name(5))
    with pytest.raises(RemoteRefused, match=rf"{record_name(5)} is not there, and a later one is"):
        await history.load(found)


async def test_large_records_are_read_alone(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(BIRTH)
    grow(volume, 12)
    store, found = await stored(volume, open_store)
    store.limits_bytes.clear()
    assert (await history.load(found)).head.epoch == 12
    assert set(store.limits_bytes) == {history.AHEAD_BYTES_MAX}
    monkeypatch.setattr(history, "AHEAD_BYTES_MAX", 800)
    sizes = [len(volume.objects[record_name(number)]) for number in range(1, 13)]
    assert min(sizes) < 800 < max(sizes)
    assert content(await history.load(found)) == content(volume.map)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("wrong", ["previous", "uuid", "epoch", "bytes", "empty"])
async def test_a_record_that_does_not_follow_is_named_and_what_is_before_it_stays(
    open_store: OpenStore, wrong: str
) -> None:
    volume = Volume(BIRTH)
    grow(volume, 9)
    name = record_name(5)
    record = epoch.decode(volume.objects[name], name=name)
    volume.objects[name] = {
        "previous": epoch.encode(replace(record, previous=bytes(31) + b"x")),
        "uuid": epoch.encode(replace(record, uuid=UUID_2)),
        "epoch": volume.objects[record_name(6)],
        "bytes": volume.objects[name][:-1] + b"x",
        "empty": b"",
    }[wrong]
    _store, found = await stored(volume, open_store)
    extents = await history.load(found, 2)
    taken: list[Followed] = []
    with pytest.raises(RemoteRefused, match=name):
        await history.follow(found, extents, taken.append)
    assert content(extents) == content(volume.maps[4])
    assert [each.record.epoch for each in taken] == [3, 4]


class TestCheckpoints:
    """Which one is taken, and which not."""

    def volume(self) -> Volume:
        volume = Volume(BIRTH)
        grow(volume, 6)
        volume.checkpoint()
        grow(volume, 6)
        volume.checkpoint()
        grow(volume, 3)
        return volume

    async def first_record(self, volume: Volume, open_store: OpenStore, upto: int | None = None) -> int:
        """The number of the first record that a load applies."""
        store, found = await stored(volume, open_store)
        extents = await history.load(found, upto)
        assert content(extents) == content(volume.maps[upto or -1])
        store.asked.clear()
        return await self.applied(store, found, upto)

    async def applied(self, store: Watched, found: Lineage, upto: int | None) -> int:
        await history.load(found, upto)
        last = max((at for at, name in enumerate(store.asked) if name.startswith("checkpoint/")), default=-1)
        return min(int(name.removeprefix("epoch/"), 16) for name in store.asked[last + 1 :])

    @pytest.mark.usefixtures("threads")
    async def test_the_last_one_is_begun_with(self, open_store: OpenStore) -> None:
        volume = self.volume()
        assert await self.first_record(volume, open_store) == 13
        assert await self.first_record(volume, open_store, 11) == 7
        assert await self.first_record(volume, open_store, 5) == 1

    async def test_none_is_needed_behind_the_one_of_the_head(self, open_store: OpenStore) -> None:
        store, found = await stored(self.volume(), open_store)
        store.asked.clear()
        await history.load(found, 12)
        assert [name.split("/")[0] for name in store.asked] == ["epoch", "checkpoint"]

    async def test_damaged(self, open_store: OpenStore) -> None:
        volume = self.volume()
        name = checkpoint.name_of(volume.maps[12].head)
        data = bytearray(volume.objects[name])
        data[200] ^= 1
        volume.objects[name] = bytes(data)
        assert await self.first_record(volume, open_store) == 7

    async def test_of_a_record_that_lost_its_race(self, open_store: OpenStore) -> None:
        volume = self.volume()
        loser = volume.maps[12].copy()
        loser.head = replace(loser.head, hash=b"l" * 32)
        volume.objects[checkpoint.name_of(loser.head)] = checkpoint.encode(loser)
        future = volume.maps[12].copy()
        future.head = replace(future.head, epoch=99)
        volume.objects[checkpoint.name_of(future.head)] = checkpoint.encode(future)
        del volume.objects[checkpoint.name_of(volume.maps[12].head)]
        assert await self.first_record(volume, open_store) == 7

    @pytest.mark.parametrize("change", ["epoch", "uuid", "size"])
    async def test_that_says_something_else_than_its_name_and_record(
        self, open_store: OpenStore, change: str
    ) -> None:
        volume = self.volume()
        there = volume.maps[12]
        other = volume.maps[11].copy() if change == "epoch" else there.copy()
        if change == "uuid":
            other.head = replace(other.head, uuid=UUID_2)
        elif change == "size":
            other.head = replace(other.head, size_bytes=other.head.size_bytes + 4096)
        volume.objects[checkpoint.name_of(there.head)] = checkpoint.encode(other)
        assert await self.first_record(volume, open_store) == 7

    async def test_that_goes_between_the_listing_and_the_reading(self, open_store: OpenStore) -> None:
        volume = self.volume()
        store, found = await stored(volume, open_store)
        store.hidden = [checkpoint.name_of(volume.maps[12].head)]
        assert content(await history.load(found)) == content(volume.map)
        assert store.hidden == []

    async def test_no_one_is_left(self, open_store: OpenStore) -> None:
        volume = self.volume()
        for name in list(volume.objects):
            if name.startswith("checkpoint/"):
                volume.objects[name] = b"TBCHECK\0"
        assert await self.first_record(volume, open_store) == 1

    async def test_written(self, open_store: OpenStore) -> None:
        volume = Volume(BIRTH)
        with pytest.raises(ValueError, match="before epoch 1"):
            await history.write_checkpoint(await open_store("v"), volume.map)
        grow(volume, 4)
        store, found = await stored(volume, open_store)
        assert await history.write_checkpoint(store, await history.load(found))
        assert not await history.write_checkpoint(store, await history.load(found))
        name = checkpoint.name_of(volume.map.head)
        assert await store.read(name, 1 << 20) == checkpoint.encode(volume.map)
        assert await self.applied(store, found, None) == 5


class TestRollbacks:
    """Records that go back need the map of then, which nobody has any more."""

    @pytest.mark.usefixtures("threads")
    async def test_nested_and_behind_a_checkpoint(self, open_store: OpenStore) -> None:
        volume = Volume(BIRTH)
        grow(volume, 4)
        volume.commit({1: page(50)}, back_to=2)
        grow(volume, 2)
        volume.checkpoint()
        volume.commit(back_to=6)  # whose own map needs epoch 2's
        volume.commit(back_to=5)
        grow(volume, 3)
        _store, found = await stored(volume, open_store)
        assert content(await history.load(found)) == content(volume.map)
        extents = await history.load(found, 4)
        await history.follow(found, extents)
        assert content(extents) == content(volume.map)

    async def test_too_many_within_each_other(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        volume = Volume(BIRTH)
        grow(volume, 2)
        volume.commit(back_to=1)
        volume.commit(back_to=3)
        _store, found = await stored(volume, open_store)
        extents = volume.maps[3].copy()
        monkeypatch.setattr(history, "ROLLBACKS_MAX", 1)
        with pytest.raises(RemoteRefused, match=f"{record_name(3)} goes back .* 1 other rollbacks"):
            await history.follow(found, extents)
        monkeypatch.setattr(history, "ROLLBACKS_MAX", 2)
        await history.follow(found, extents)
        assert content(extents) == content(volume.map)

    async def test_many_in_a_row_are_each_loaded_once(
        self, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "ROLLBACKS_MAX", 1)  # none of them is within another
        volume = Volume(BIRTH)
        grow(volume, 1)
        for number in range(1, 21):
            volume.commit({number: page(number)}, back_to=number)
        store, found = await stored(volume, open_store)
        assert content(await history.load(found)) == content(volume.map)
        assert len(store.asked) < 20 * 30, "not 2^20"


async def test_a_volume_begins_once(open_store: OpenStore) -> None:
    store = await open_store("new")
    assert await history.read_birth(store) is None
    assert await history.begin(store, BIRTH) == BIRTH
    assert await history.begin(store, replace(BIRTH, uuid=UUID_2)) == BIRTH
    assert await history.begin(store, BIRTH) == BIRTH
    assert await history.read_birth(store) == BIRTH
    found = await alone(store)
    assert content(await history.load(found)) == content(Volume(BIRTH).map)
    assert await history.follow(found, await history.load(found)) == []


async def test_all_of_it_on_an_s3_server(seaweed: SeaweedServer) -> None:
    unique = os.urandom(8).hex()

    async def open_s3(url: str) -> S3Store:
        session = await new_session(remote_settings())
        return S3Store(seaweed.url(f"{unique}/{url}"), seaweed.settings, FixedWallet(CREDENTIALS), session)

    one = Volume(BIRTH)
    grow(one, 3)
    one.checkpoint()
    grow(one, 9)
    two = one.clone(UUID_2, "one")
    grow(two, 3)
    two.commit({4: page(4)}, back_to=7)
    for url, volume in (("one", one), ("two", two)):
        store = await open_s3(url)
        assert await history.begin(store, volume.birth) == volume.birth
        await put(volume, store)
        await store.aclose()
    found = await open_lineage(await open_s3("two"), open_s3)
    extents = await history.load(found, 10)
    extents = await history.load(found)
    assert content(extents) == content(two.map)
    assert await history.write_checkpoint(found.store, extents)
    assert not await history.write_checkpoint(found.store, extents)
    assert content(await history.load(found)) == content(two.map)
    grow(two, 2)
    await put(two, found.store)
    assert [each.record.epoch for each in await history.follow(found, extents)] == [17, 18]
    assert content(extents) == content(two.map)
    await found.aclose()
