"""One host's way to a store in a folder that hosts share: what it creates can be held, lost or late, and all
of it is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.far_store import FarStore
from tierblk.errors import RemoteUnavailable
from tierblk.remote.store import Bytes

POINTS = ("data/", "epoch/", "answer")
"""Where a creation can be held: of an object, of a record, and of a record when it is there."""


class Late(NamedTuple):
    """A creation that is on its way although nobody waits for it any more."""

    front: Front
    name: str
    data: bytes


class Front(FarStore):
    """sent: is told of every record before it is created. created: of every object that was. lose: so many
    answers to creations of records are lost; late: records are on their way until somebody sends them."""

    def __init__(self, url: str, sent: Callable[[Front, str, bytes], None], created: Callable[[str], None]):
        super().__init__(url)
        self._root = Path(url.removeprefix("file://"))
        self._sent = sent
        self._created = created
        self.dead = False
        self.lose = 0
        self.late = False
        self.underway: dict[str, Late] = {}
        self.hold: str | None = None
        self.held = asyncio.Event()

    def _begin(self, method: str, name: str) -> None:
        if self.dead:
            raise RemoteUnavailable("the host is gone")
        super()._begin(method, name)

    async def _wait(self, point: str) -> None:
        if self.hold is not None and point.startswith(self.hold):
            self.hold = None
            self.go.clear()
            self.held.set()
            await self.go.wait()
            self.held.clear()
            self._begin("held", point)

    def stored(self, name: str) -> bytes | None:
        """What is there, read by nobody who counts."""
        path = self._root / name
        return path.read_bytes() if path.exists() else None

    def let_go(self) -> None:
        self.hold = None
        self.go.set()

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        self._begin("create", name)
        is_record = name.startswith("epoch/")
        data = b"".join(pieces)
        if is_record:
            self._sent(self, name, data)
            if self.late:
                self.underway[name] = Late(self, name, data)
                raise RemoteUnavailable("it is on its way")
        await self._wait(name)
        made = await self.inner.create(name, [data])
        if made:
            self._created(name)
        if is_record:
            await self._wait("answer")
            if self.lose:
                self.lose -= 1
                raise RemoteUnavailable("the answer is lost")
        self._begin("answered", name)
        return made

    async def arrive(self, late: Late) -> bool:
        """What was late reaches the store."""
        made = await self.inner.create(late.name, [late.data])
        if made:
            self._created(late.name)
        return made
