"""What can be done with pages that another host has overtaken: they become a volume of their own (R18,
R21)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import Host, config_of
from tierblk import rescue
from tierblk.claim import Wishes
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, RemoteRefused, RemoteUnavailable
from tierblk.remote import open_lineage

Start = Callable[..., Awaitable[Host]]

HERE = b"a" * PAGE_BYTES + b"A" * PAGE_BYTES + b"a" * (BLOCK_BYTES - 2 * PAGE_BYTES)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Hosts by name; prefix: of the store that they use."""
    hosts: list[Host] = []
    with run_directory(tmp_path) as run:

        async def begin(name: str, prefix: str = "volume") -> Host:
            (tmp_path / name).mkdir(exist_ok=True)
            config = config_of(tmp_path / name, f"file://{tmp_path}/{prefix}")
            host = await Host.start(config, run)
            hosts.append(host)
            return host

        yield begin
        for host in hosts:
            await host.kill()


@pytest.fixture
async def overtaken(start: Start, tmp_path: Path) -> tuple[Host, Host]:
    """(a host with dirty pages, that which took its volume over)."""
    a = await start("a")
    await a.attach()
    await a.write(0, b"a" * BLOCK_BYTES)
    await a.sync()
    await a.write(PAGE_BYTES, b"A" * PAGE_BYTES)
    b = await start("b")
    await b.attach(Wishes(take_over=True))
    await b.write(0, b"b" * PAGE_BYTES)
    await b.sync()
    await a.detach(keep_claim=True)
    return a, b


def at(host: Host, folder: Path, prefix: str) -> None:
    """Its config names another prefix from now on."""
    host.config = config_of(folder, f"file://{folder.parent}/{prefix}")


async def test_what_was_overtaken_becomes_a_volume_of_its_own(
    overtaken: tuple[Host, Host], start: Start, tmp_path: Path
) -> None:
    a, b = overtaken
    with pytest.raises(CacheError, match="the two cannot be merged") as refused:
        await a.attach(Wishes(take_over=True))
    assert "--clone-local" in str(refused.value.hint)
    at(a, tmp_path / "a", "rescued")
    for wishes in (Wishes(clone_local=True), Wishes()):  # the second time it is a volume like any other
        await a.attach(wishes)
        assert await a.read(0, BLOCK_BYTES) == HERE
        await a.detach()
    c = await start("c", "rescued")
    await c.attach()
    assert await c.read(0, BLOCK_BYTES) == HERE
    assert await b.read(0, 2 * PAGE_BYTES) == b"b" * PAGE_BYTES + b"a" * PAGE_BYTES
    (named,) = (tmp_path / "volume" / "snapshot").iterdir()
    document = json.loads(named.read_bytes())
    assert named.name == f"clone-{document['clone']}"
    assert (document["epoch"], document["uuid"]) == (2, str(b.far.standing.uuid))


async def test_a_prefix_that_is_taken_stays_what_it_is(
    overtaken: tuple[Host, Host], start: Start, tmp_path: Path
) -> None:
    a, _ = overtaken
    c = await start("c", "other")
    await c.attach()
    await c.write(0, b"c" * PAGE_BYTES)
    at(a, tmp_path / "a", "other")
    with pytest.raises(RemoteRefused, match=r"there is a volume at .* already"):
        await a.attach(Wishes(clone_local=True))
    at(a, tmp_path / "a", "rescued")
    await a.attach(Wishes(clone_local=True))
    assert await a.read(0, BLOCK_BYTES) == HERE


async def test_a_clone_that_was_cut_off_is_gone_on_with(
    overtaken: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its volume.json is there, and the cache does not know that it has become that volume."""
    a, _ = overtaken
    at(a, tmp_path / "a", "rescued")
    whole = open_lineage
    calls = iter([0, 1])

    async def cut_off(*arguments: Any) -> Any:
        if next(calls, 0):
            raise RemoteUnavailable("the network is gone")
        return await whole(*arguments)

    monkeypatch.setattr(rescue, "open_lineage", cut_off)
    with pytest.raises(RemoteUnavailable):
        await a.attach(Wishes(clone_local=True))
    assert (tmp_path / "rescued" / "volume.json").exists()
    await a.attach(Wishes(clone_local=True))
    assert await a.read(0, BLOCK_BYTES) == HERE


async def test_a_cache_without_the_volume_has_nothing_to_clone(start: Start) -> None:
    a = await start("a")
    with pytest.raises(CacheError, match="nothing that a new volume could be made of"):
        await a.attach(Wishes(clone_local=True))
