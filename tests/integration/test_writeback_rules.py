"""Rules of write-back whose breach random traces seldom show: what is durable at which moment, and caches
that come back."""

from __future__ import annotations

import shutil
from contextlib import suppress
from errno import EROFS

import pytest

from tests.integration.far_world import World, until, world
from tierblk.cache.rows import entries_of
from tierblk.claim import Wishes
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, Fenced

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
