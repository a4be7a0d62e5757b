"""Hosts that want one volume in object storage: who may write, who hears that he may not, and what a cache
keeps over a hop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from errno import EROFS
from typing import Any

import pytest

from tests.integration.far_world import World, until, world
from tierblk.claim import Wishes
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, Fenced, RemoteRefused, RemoteUnavailable
from tierblk.remote import EpochName, decode_record
from tierblk.remote.store import Bytes
from tierblk.units import MIB

__all__ = ["world"]

SIZE = 8 * MIB


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
    assert await a.read(0, PAGE_BYTES) == (b"1" if pages else b"\0") * PAGE_BYTES


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
