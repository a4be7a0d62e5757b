"""What write-back costs: requests and bytes for random 4 KiB writes, none while nothing is written, and how
much memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import Host, config_of
from tests.far_store import FarStore
from tierblk import claim
from tierblk.config import VolumeSettings
from tierblk.core import PAGE_BYTES
from tierblk.units import MIB
from tierblk.upload import OBJECT_PAGES

WRITES = 20_000
SIZE = 256 * MIB
CACHE_BYTES = 768 * MIB  # a 4 KiB page takes a slot of 64 KiB: with fewer, epochs are made to come earlier
RSS_BYTES = 100 * MIB
"""What an upload of any size may add: four objects of 16 MiB on their way, and what Python makes of it."""
DEFAULT = VolumeSettings.model_validate({"mode": "write-back"})

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FarStore:
    store = FarStore(f"file://{tmp_path}/store")

    async def open_store(*_: object) -> FarStore:
        return store

    monkeypatch.setattr(claim, "open_store", open_store)
    return store


@pytest.fixture
async def host(store: FarStore, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    with run_directory(tmp_path) as run:
        settings: dict[str, Any] = {"size": SIZE, "epoch_size": 1024 * MIB} | getattr(request, "param", {})
        host = await Host.start(config_of(tmp_path, store.shown, cache_bytes=CACHE_BYTES, **settings), run)
        try:
            await host.attach()
            yield host
        finally:
            await host.kill()


def write_all(host: Host) -> set[int]:
    """Which pages were written, each once or more."""
    chance, pages = random.Random(1), set()
    data = chance.randbytes(PAGE_BYTES)
    for _ in range(WRITES):
        page = chance.randrange(SIZE // PAGE_BYTES)
        pages.add(page)
        host.door.write(page * PAGE_BYTES, data)
    return pages


async def test_an_epoch_of_many_small_writes_is_few_requests(host: Host, store: FarStore) -> None:
    pages = await asyncio.to_thread(write_all, host)
    asked, sent = store.asked.copy(), store.created_bytes
    await host.sync()
    objects = -(-len(pages) // (OBJECT_PAGES - 15))  # a block is in one object
    assert store.asked - asked == {"create": objects + 1}, "the objects and the record"
    assert len(pages) * PAGE_BYTES < store.created_bytes - sent < 1.02 * len(pages) * PAGE_BYTES
    asked = store.asked.copy()
    await host.sync()
    assert store.asked == asked, "nothing was written"


WITH_DEFAULTS = {"epoch_interval": f"{DEFAULT.epoch_interval}s", "epoch_size": DEFAULT.epoch_size}


@pytest.mark.parametrize("host", [WITH_DEFAULTS], indirect=True)
async def test_random_writes_with_the_default_settings(host: Host, store: FarStore) -> None:
    asked, sent = store.asked["create"], store.created_bytes
    await asyncio.to_thread(write_all, host)
    async with asyncio.timeout(60):
        await host.volumes.sync(host.far)
    puts, put_bytes = store.asked["create"] - asked, store.created_bytes - sent
    print(f"{WRITES / puts:.0f} writes a PUT, {put_bytes / (WRITES * PAGE_BYTES):.3f} bytes a byte written")
    assert WRITES / puts >= 2000
    assert put_bytes <= 1.1 * WRITES * PAGE_BYTES


def rss_bytes() -> int:
    """Of this process; an upload's buffers count as shared memory."""
    line = Path("/proc/self/status").read_text().partition("VmRSS:")[2]
    return int(line.split()[0]) * 1024


async def test_memory_while_much_waits_and_is_uploaded(host: Host, store: FarStore) -> None:
    begun_bytes = rss_bytes()
    store.down = True
    pages = await asyncio.to_thread(write_all, host)
    syncing = asyncio.create_task(host.volumes.sync(host.far))
    async with asyncio.timeout(20):
        while host.volumes.trouble is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
    waits_bytes = most_bytes = rss_bytes() - begun_bytes
    store.down = False
    async with asyncio.timeout(60):
        while not syncing.done():
            most_bytes = max(most_bytes, rss_bytes() - begun_bytes)
            await asyncio.sleep(0)
    await syncing
    assert len(pages) * PAGE_BYTES > 64 * MIB
    assert host.far.layer.dirty_pages() == 0
    print(f"RSS grew by {waits_bytes / MIB:.0f} MiB while it waited, {most_bytes / MIB:.0f} MiB at most")
    assert most_bytes < RSS_BYTES
