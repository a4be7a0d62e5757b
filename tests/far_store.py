"""A store in a folder that fails when a test says so, and counts what it is asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from tierblk.errors import RemoteUnavailable
from tierblk.remote.directory import DirectoryStore
from tierblk.remote.store import Bytes, Found


class FarStore:
    """See Store. asked: how often each method was called. before, after: called with (method, name) around
    each call; what they raise is the call's outcome, whatever it has done. held: while clear, creations
    whose name `holds` begins with wait before they are made."""

    def __init__(self, url: str) -> None:
        self.inner = DirectoryStore(url)
        self.asked: Counter[str] = Counter()
        self.created_bytes = 0
        self.before: Callable[[str, str], None] | None = None
        self.after: Callable[[str, str], None] | None = None
        self.down = False
        self.go = asyncio.Event()
        self.go.set()
        self.holds = "epoch/"

    @property
    def shown(self) -> str:
        return self.inner.shown

    @property
    def clock_unix_s(self) -> float:
        return self.inner.clock_unix_s

    def _begin(self, method: str, name: str) -> None:
        self.asked[method] += 1
        if self.down:
            raise RemoteUnavailable(f"{self.shown} does not answer")
        if self.before is not None:
            self.before(method, name)

    def _end(self, method: str, name: str) -> None:
        if self.after is not None:
            self.after(method, name)

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        self._begin("create", name)
        if name.startswith(self.holds):
            await self.go.wait()
        made = await self.inner.create(name, pieces)
        self.created_bytes += sum(map(len, pieces))
        self._end("create", name)
        return made

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        self._begin("read", name)
        data = await self.inner.read(name, limit_bytes)
        self._end("read", name)
        return data

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self._begin("read_into", name)
        await self.inner.read_into(name, offset_bytes, buffer)
        self._end("read_into", name)

    async def names(self, folder: str, after: str = "") -> list[Found]:
        self._begin("names", folder)
        return await self.inner.names(folder, after)

    async def delete(self, name: str) -> None:
        self._begin("delete", name)
        await self.inner.delete(name)

    async def aclose(self) -> None:
        """It is used again by the next one who opens the address."""
