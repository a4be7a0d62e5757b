"""A store in a folder that fails on command, and any number of hosts that share it."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import TIMEOUT_S, Host, config_of
from tests.far_store import FarStore
from tierblk import claim
from tierblk.claim import Wishes
from tierblk.remote import RECORD_BYTES_MAX, EpochName, decode_record
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
