"""A volume in an S3 server that is gone, flaps, is slow, or says 503 for a while: writers go on, nothing is
lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import Host, config_of
from tests.integration.relay import NONE, Faults, Relay
from tests.integration.seaweed import SeaweedServer
from tierblk import claim, sending
from tierblk.config import RemoteSettings
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.units import MIB

SIZE = 24 * MIB
"""More than the cache, which has 16 MiB."""
PART_BYTES = 8 * MIB

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path_factory.mktemp("seaweed"), volumes=60) as server:
        yield server


class Field:
    """A host, its content as it should be, and what stands between it and its store."""

    def __init__(self, host: Host, relay: Relay, size_bytes: int) -> None:
        self.host = host
        self.relay = relay
        self.content = bytearray(size_bytes)
        self.chance = random.Random(1)

    async def write(self, length_bytes: int = PAGE_BYTES) -> None:
        """Somewhere in the first PART_BYTES, for which there is always room."""
        at = self.chance.randrange((PART_BYTES - length_bytes) // PAGE_BYTES + 1) * PAGE_BYTES
        data = self.chance.randbytes(length_bytes)
        await self.host.write(at, data)
        self.content[at : at + length_bytes] = data

    async def troubled(self) -> None:
        """Until write-back has noticed."""
        async with asyncio.timeout(20):
            while self.host.volumes.trouble is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def drains(self) -> None:
        """All of it is in the store, and nothing is wrong any more."""
        async with asyncio.timeout(60):
            await self.host.volumes.sync(self.host.far)
        assert self.host.far.layer.dirty_pages() == 0
        assert self.host.volumes.trouble is None
        assert await self.host.content() == self.content


@pytest.fixture
async def field(
    seaweed: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[Field]:
    """attached, and what is in it is compared with what another host finds, at the end."""
    monkeypatch.setattr(sending, "DELAY_MOST_S", 0.5)
    settings: dict[str, Any] = {"size": SIZE, "cache_bytes": 16 * MIB, "epoch_interval": "100ms"}
    async with Relay(seaweed.port) as relay:

        async def open_store(url: str, store: object, remote: RemoteSettings) -> Any:
            return await seaweed.store(url, endpoint=relay.endpoint, remote=remote)

        monkeypatch.setattr(claim, "open_store", open_store)
        url = seaweed.url(f"outage/{tmp_path.name.lower().replace('_', '-')[-40:]}")
        hosts = []
        with run_directory(tmp_path) as run:
            for name in "ab":
                (tmp_path / name).mkdir()
                config = config_of(tmp_path / name, url, **settings)
                hosts.append(await Host.start(config, run))
            try:
                await hosts[0].attach()
                found = Field(hosts[0], relay, settings["size"])
                yield found
                relay.faults = NONE
                await found.drains()
                assert await hosts[0].detach() is None
                await hosts[1].attach()
                assert await hosts[1].content() == found.content
            finally:
                for host in hosts:
                    await host.kill()


async def test_a_store_that_is_gone_for_a_while(field: Field) -> None:
    for _ in range(50):
        await field.write()
    field.relay.gone()
    for _ in range(200):
        await field.write()
    await field.troubled()
    assert "no connection" in str(field.host.upkeep.trouble)
    for _ in range(200):
        await field.write()
    await field.host.flush()
    await field.relay.back()
    await field.drains()


async def test_a_store_that_is_gone_until_the_cache_is_full_and_beyond(field: Field) -> None:
    """Writers wait for slots, and go on by themselves."""
    field.relay.gone()
    engine, blocks = field.host.cache.engine, list(range(SIZE // BLOCK_BYTES))
    field.chance.shuffle(blocks)

    async def write_all() -> None:
        for block in blocks:
            data = field.chance.randbytes(BLOCK_BYTES)
            await asyncio.to_thread(field.host.door.write, block * BLOCK_BYTES, data)
            field.content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = data

    writing = asyncio.create_task(write_all())
    async with asyncio.timeout(60):
        while not engine.stats()["needy"]:
            assert not writing.done()
            await asyncio.sleep(0.01)
    assert field.host.far.layer.dirty_pages() * PAGE_BYTES > 12 * MIB
    assert "no connection" in str(field.host.upkeep.trouble)
    await field.relay.back()
    async with asyncio.timeout(60):
        await writing
    await field.drains()


async def test_a_store_that_comes_and_goes(field: Field) -> None:
    for _ in range(12):
        field.relay.gone()
        for _ in range(40):
            await field.write()
        await field.troubled()
        puts = field.relay.answered.total()
        await field.relay.back()
        await field.relay.until(lambda puts=puts: field.relay.answered.total() > puts)  # type: ignore[misc]
    assert field.relay.answered[200] > 12


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}])
async def test_a_store_that_is_too_busy_for_a_while(field: Field, headers: dict[str, str]) -> None:
    field.relay.refuse, field.relay.refuse_headers = 503, headers
    for _ in range(300):
        await field.write()
    await field.relay.until(lambda: field.relay.answered[503] >= 3)
    assert "503 SlowDown" in str(field.host.upkeep.trouble)
    for _ in range(300):
        await field.write()
    field.relay.refuse = None
    await field.drains()


async def test_a_store_that_is_slow(field: Field) -> None:
    field.relay.latency_s, field.relay.bytes_per_s = 0.1, 8e6
    for _ in range(40):
        await field.write(BLOCK_BYTES)
        await field.write()
    await field.drains()


async def test_a_store_that_fails_every_third_request(field: Field) -> None:
    field.relay.faults = Faults(busy=0.1, reset=0.05, lost=0.1, broken=0.05, cut=0.03, late=0.3)
    for _ in range(10):
        for _ in range(40):
            await field.write()
        await field.drains()
