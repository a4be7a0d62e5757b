"""Volumes of volume_rig in real stores, and a store that tests can watch and interfere with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.volume_rig import BASE, UUID_1, Volume
from tierblk.extent import PAGE_BYTES
from tierblk.remote import history
from tierblk.remote.birth import Birth
from tierblk.remote.directory import DirectoryStore
from tierblk.remote.extents import ExtentMap
from tierblk.remote.names import CheckpointName, DataName, EpochName, parse
from tierblk.remote.store import Bytes, Found, Store

UUID_2, UUID_3, UUID_4 = (UUID(int=number) for number in (2, 3, 4))
BIRTH = Birth(UUID_1, 3 << 20, BASE, None, 1_795_000_000)


def record_name(number: int) -> str:
    return f"epoch/{number:016x}"


def page(seed: int) -> bytes:
    return seed.to_bytes(4, "big") * (PAGE_BYTES // 4)


def content(extents: ExtentMap) -> object:
    """All that a map says, for a comparison."""
    return (extents.head, list(extents.rows()), extents.zeroes(), extents.live_bytes())


def grow(volume: Volume, count: int) -> None:
    for _ in range(count):
        number = volume.map.head.epoch + 1
        zeroes = [(number % 9 + 20, 2)] if number % 3 == 0 else []
        volume.commit({number % 7: page(number), 300 + number: page(number)}, zeroes, inline=number % 2 == 0)


async def put(volume: Volume, store: Store) -> None:
    """Create what a volume has in its own prefix, as far as it is not there yet."""
    begin = volume.birth.parent.epoch if volume.birth.parent else 0
    for name, data in volume.objects.items():
        known = parse(name)
        if not isinstance(known, CheckpointName | DataName | EpochName) or known.epoch > begin:
            await store.create(name, [data])


class Watched:
    """A store that notes what is read of another one. before: runs before each read of an object, and may
    raise in its place."""

    def __init__(self, store: Store) -> None:
        self.inner = store
        self.asked: list[str] = []
        self.limits_bytes: list[int] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.owners: list[object] = []
        """Whose memory the ranges were read into."""
        self.running = 0
        self.most_running = 0
        self.is_closed = False
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.hidden: list[str] = []
        """Names of objects that are not there yet, each for one read."""

    @property
    def shown(self) -> str:
        return self.inner.shown

    @property
    def clock_unix_s(self) -> float:
        return self.inner.clock_unix_s

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        return await self.inner.create(name, pieces)

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        self.asked.append(name)
        self.limits_bytes.append(limit_bytes)
        await self._begin(name)
        try:
            if name in self.hidden:
                self.hidden.remove(name)
                return None
            return await self.inner.read(name, limit_bytes)
        finally:
            self.running -= 1

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self.ranges.append((name, offset_bytes, len(buffer)))
        self.owners.append(buffer.obj)
        await self._begin(name)
        try:
            await self.inner.read_into(name, offset_bytes, buffer)
        finally:
            self.running -= 1

    async def names(self, folder: str, after: str = "") -> list[Found]:
        return await self.inner.names(folder, after)

    async def delete(self, name: str) -> None:
        await self.inner.delete(name)

    async def aclose(self) -> None:
        self.is_closed = True
        await self.inner.aclose()

    async def _begin(self, name: str) -> None:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            if self.before is not None:
                await self.before(name)
        except BaseException:
            self.running -= 1
            raise


OpenStore = Callable[[str], Awaitable[Watched]]


@asynccontextmanager
async def folder_stores(root: Path) -> AsyncIterator[OpenStore]:
    """Opens a folder below root by its name, as often as asked; closes them all at the end."""
    opened: list[Watched] = []

    async def open_one(url: str) -> Watched:
        opened.append(Watched(DirectoryStore(f"file://{root}/{url}")))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.aclose()


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[OpenStore]:
    async with folder_stores(tmp_path) as open_one:
        yield open_one


@pytest.fixture(params=[1 << 30, 1], ids=["on the loop", "in threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "THREAD_BYTES", request.param)
