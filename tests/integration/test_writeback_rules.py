"""Rules of write-back whose breach random traces seldom show: what is durable at which moment, and caches
that come back."""

from __future__ import annotations

import shutil
from contextlib import suppress
from errno import EROFS

import pytest

from tests.cache_rig import changed_index
from tests.integration.far_world import World, until, world
from tierblk import writeback
from tierblk.cache import VolumeChange
from tierblk.cache.rows import entries_of
from tierblk.claim import Wishes
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, Fenced, RemoteUnavailable

__all__ = ["world"]

TAKE_OVER = Wishes(take_over=True)


async def test_r18_a_copied_cache_is_another_history_although_its_writer_is_the_same(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await a.sync()
    await a.write(PAGE_BYTES, b"a" * PAGE_BYTES)
    await world.kill(a)
    shutil.copytree(world.folder / "a", world.folder / "copy")
    copy = await world.attached("copy")
    await copy.write(0, b"c" * PAGE_BYTES)
    await copy.sync()
    await copy.detach()
    a = await world.host("a")
    with pytest.raises(CacheError, match="cannot be merged"):
        await a.attach(TAKE_OVER)


async def test_r18_after_a_detach_no_false_alarm_about_what_is_dirty(world: World) -> None:
    """The index may overstate it, but not then."""
    a = await world.attached("a")
    await a.write(0, b"a" * BLOCK_BYTES)
    await a.sync()
    await a.detach()
    await world.cut_power(a)
    b = await world.attached("b")
    await b.write(0, b"b" * PAGE_BYTES)
    await b.detach()
    a = await world.attached("a")
    assert await a.read(0, 2 * PAGE_BYTES) == b"b" * PAGE_BYTES + b"a" * PAGE_BYTES


async def test_r17_what_an_attach_drops_is_durably_gone_when_its_claim_is_sent(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await world.kill(a)
    b = await world.attached("b", TAKE_OVER)
    await b.write(0, b"b" * PAGE_BYTES)
    await b.detach()
    a = await world.host("a")
    sent = []

    def look(method: str, name: str) -> None:
        if method == "create" and name.startswith("epoch/"):
            index, record = a.cache._index, a.cache.volume("vol")
            assert record is not None
            rows = [entry for _, packed in index.rows(record.layer_id) for entry in entries_of(packed)]
            sent.append((name, any(entry.dirty for entry in rows)))

    world.store.before = look
    await a.attach(Wishes(discard_local=True))
    assert [dirty for _, dirty in sent] == [False]


async def test_r18_clean_pages_of_before_are_durably_gone_when_the_claim_is_sent(world: World) -> None:
    """Else a power cut would bring them back under a head that is ours."""
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await a.detach()
    b = await world.attached("b")
    await b.write(0, b"b" * PAGE_BYTES)
    await b.detach()
    sent = []

    def look(method: str, name: str) -> None:
        if method == "create" and name.startswith("epoch/"):
            index, record = a.cache._index, a.cache.volume("vol")
            assert record is not None
            rows = dict(index.rows(record.layer_id))
            sent.append(entries_of(rows[0])[0].cached & 1)

    world.store.before = look
    await a.attach()
    assert sent == [0]


async def test_r19_a_fence_outlives_the_daemon_and_needs_no_store(world: World) -> None:
    a = await world.attached("a")
    b = await world.attached("b", TAKE_OVER)
    await a.write(0, b"a" * PAGE_BYTES)
    with pytest.raises(Fenced):
        await a.sync()
    await until(lambda: not a.cache.changed())
    await world.kill(a)
    world.store.down = True
    a = await world.host("a")
    await a.attach(goes_on=True)
    with pytest.raises(OSError) as error:  # noqa: PT011
        await a.write(0, b"x" * PAGE_BYTES)
    assert error.value.errno == EROFS
    world.store.down = False
    with suppress(Fenced):
        await b.sync()


async def test_r19_a_device_that_goes_on_is_fenced_when_it_hears_of_another_writer(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await world.kill(a)
    b = await world.attached("b", TAKE_OVER)
    a = await world.host("a")
    await a.attach(goes_on=True)
    await until(lambda: a.far.lineage is not None)
    with pytest.raises(OSError) as error:  # noqa: PT011
        await a.write(0, b"x" * PAGE_BYTES)
    assert error.value.errno == EROFS
    with pytest.raises(Fenced, match="another host has taken it over"):
        await a.sync()
    assert await a.read(0, PAGE_BYTES) == b"a" * PAGE_BYTES
    assert await b.read(0, PAGE_BYTES) == bytes(PAGE_BYTES)


async def test_r20_no_record_is_ever_deleted_so_no_number_is_used_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through checkpoints, lost answers, a take-over, a host that is fenced and one that begins anew: what
    was once made below epoch/ is there, byte for byte, and nobody has asked for its deletion."""
    monkeypatch.setattr(writeback, "CHECKPOINT_EACH", 2)
    folder, seen = world.folder / "store" / "epoch", dict[str, bytes]()
    deleted = list[str]()

    def before(method: str, name: str) -> None:
        if method == "delete":
            deleted.append(name)
        for path in folder.glob("*"):
            assert seen.setdefault(path.name, path.read_bytes()) == path.read_bytes()

    def lose_some(method: str, name: str) -> None:
        if (
            method == "create"
            and name.startswith("epoch/")
            and name.endswith(("3", "6"))
            and name not in lost
        ):
            lost.append(name)
            raise RemoteUnavailable("the answer is lost")

    lost = list[str]()
    world.store.before, world.store.after = before, lose_some
    a = await world.attached("a")
    for n in range(5):
        await a.write(n * PAGE_BYTES, bytes([n + 1]) * PAGE_BYTES)
        await a.sync()
    await a.write(0, b"lost" * 1024)
    b = await world.attached("b", TAKE_OVER)
    await b.write(0, b"b" * PAGE_BYTES)
    await b.sync()
    with pytest.raises(Fenced):
        await a.sync()
    await a.detach()
    await b.detach()
    await a.attach(Wishes(discard_local=True))
    await a.write(0, b"a" * PAGE_BYTES)
    await a.detach()
    assert len(lost) == 2
    assert not [name for name in deleted if name.startswith(("epoch/", "checkpoint/"))]
    assert deleted, "the proof's objects are deleted, so this sees deletions"
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert seen.items() <= there.items()
    assert sorted(int(name, 16) for name in there) == list(range(1, len(there) + 1))


async def test_discard_local_does_without_what_the_index_says(world: World) -> None:
    a = await world.attached("a")
    await a.write(0, b"a" * PAGE_BYTES)
    await a.sync()
    await world.stop(a)
    with changed_index(world.folder / "a" / "cache") as index:
        (record,) = index.layers()
        index.write_rows({}, volumes={record.layer_id: VolumeChange(b"{}")})
    a = await world.host("a")
    with pytest.raises(CacheError, match="does not say where the volume vol stands") as refused:
        await a.attach()
    assert "--discard-local" in str(refused.value.hint)
    await a.attach(Wishes(discard_local=True))
    assert await a.read(0, PAGE_BYTES) == b"a" * PAGE_BYTES
