"""Clones of clones: a chain one -> two at 4 -> three at 6; four is of two too, at an epoch from before it was
cloned. And chains that are none."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from tests.integration.volume_store import (
    BIRTH,
    UUID_2,
    UUID_3,
    UUID_4,
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
from tests.unit.volume_rig import UUID_1, Volume
from tierblk.errors import RemoteRefused
from tierblk.remote import birth as births
from tierblk.remote import history, lineage
from tierblk.remote.birth import Parent
from tierblk.remote.history import open_lineage

__all__ = ["open_store", "threads"]  # fixtures


def made() -> dict[str, Volume]:
    one = Volume(BIRTH)
    grow(one, 2)
    one.checkpoint()
    early = Volume(BIRTH, dict(one.objects), [one.map.fork(UUID_4)])
    grow(one, 2)
    two = one.clone(UUID_2, "one")
    grow(one, 3)  # its own life goes on
    one.checkpoint()
    grow(two, 2)
    two.commit({9: page(9)})
    three = two.clone(UUID_3, "two")
    grow(two, 1)
    three.commit({2: page(77)})
    three.commit({3: page(78)}, back_to=3)
    born = replace(BIRTH, uuid=UUID_4, parent=Parent(UUID_2, "two", 2))
    four = Volume(born, early.objects, early.maps, attempts=1000)
    four.commit({5: page(5)})
    return {"one": one, "two": two, "three": three, "four": four}


async def put_all(volumes: dict[str, Volume], open_store: OpenStore) -> None:
    for url, volume in volumes.items():
        await put(volume, await open_store(url))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("url", ["one", "two", "three", "four"])
async def test_all_of_them_at_every_epoch(open_store: OpenStore, url: str) -> None:
    volumes = made()
    await put_all(volumes, open_store)
    found = await open_lineage(await open_store(url), open_store)
    volume = volumes[url]
    assert content(await history.load(found)) == content(volume.map)
    for then in volume.maps:
        assert content(await history.load(found, then.head.epoch)) == content(then)
    # A clone does not see what its parent's epochs say later, but all that they said before.
    for number in range(1, volume.maps[0].head.epoch):
        assert (await history.load(found, number)).head.uuid == volume.birth.uuid
    for name in volume.map.live_bytes():
        assert await found.store_of(name.epoch).read(str(name), 1 << 20) == volume.objects[str(name)]
    await found.aclose()


async def test_whose_objects_are_where(open_store: OpenStore) -> None:
    await put_all(made(), open_store)
    shown = {}
    for url in ("three", "four"):
        found = await open_lineage(await open_store(url), open_store)
        shown[url] = [found.store_of(number).shown.rsplit("/", 1)[1] for number in range(1, 10)]
        assert found.store.shown.endswith(url)
        await found.aclose()
    assert shown["three"] == ["one"] * 4 + ["two"] * 3 + ["three"] * 2
    assert shown["four"] == ["one"] * 2 + ["four"] * 7


async def test_a_clone_without_epochs_begins_where_its_parent_was(open_store: OpenStore) -> None:
    one = Volume(BIRTH)
    grow(one, 3)
    clone = one.clone(UUID_2, "one")
    await put_all({"one": one, "clone": clone}, open_store)
    found = await open_lineage(await open_store("clone"), open_store)
    extents = await history.load(found)
    assert content(extents) == content(clone.map)
    clone.commit({1: page(1)})
    await put_all({"clone": clone}, open_store)
    await history.follow(found, extents)
    assert content(extents) == content(clone.map)


async def test_a_parent_that_does_not_have_the_epoch(open_store: OpenStore) -> None:
    volumes = made()
    await put_all(volumes, open_store)
    await (await open_store("two")).delete(record_name(7))
    await (await open_store("two")).delete(record_name(8))
    found = await open_lineage(await open_store("three"), open_store)
    with pytest.raises(RemoteRefused, match="two has no epoch 7, its last one is 6"):
        await history.load(found)


@pytest.mark.parametrize(
    ("parents", "sentence"),
    [
        ({"a": ("b", UUID_2), "b": None}, "there is no volume at .*/b"),
        ({"a": ("b", UUID_3), "b": ("", UUID_2)}, f"a was cloned from volume {UUID_3}, and at .*/b is"),
        ({"a": ("b", UUID_2), "b": ("a", UUID_1)}, f"volume {UUID_1} at .*/a is its own ancestor"),
        ({"a": ("b", UUID_2), "b": ("c", UUID_3), "c": ("d", UUID_4), "d": ("", UUID_1)}, "2 ancestors"),
    ],
)
async def test_chains_that_are_none(
    open_store: OpenStore,
    monkeypatch: pytest.MonkeyPatch,
    parents: dict[str, tuple[str, UUID] | None],
    sentence: str,
) -> None:
    monkeypatch.setattr(lineage, "VOLUMES_MAX", 2)
    uuids = {"a": UUID_1, "b": UUID_2, "c": UUID_3, "d": UUID_4}
    for url, parent in parents.items():
        if parent is not None:
            of = Parent(parent[1], parent[0], 1) if parent[0] else None
            born = replace(BIRTH, uuid=uuids[url], parent=of)
            await (await open_store(url)).create("volume.json", [births.encode(born)])
    opened: list[Watched] = []

    async def open_parent(url: str) -> Watched:
        opened.append(await open_store(url))
        return opened[-1]

    own = await open_store("a")
    with pytest.raises(RemoteRefused, match=sentence):
        await open_lineage(own, open_parent)
    assert opened
    assert all(store.is_closed for store in opened)
    assert not own.is_closed
