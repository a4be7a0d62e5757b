"""A few tries, for who waits and had better hear soon what is wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tierblk.errors import RemoteUnavailable
from tierblk.remote.store import Bytes, Found, Store

T = TypeVar("T")

DELAYS_S = (0.2, 0.5, 1.0)

log = logging.getLogger(__name__)


async def tried(ask: Callable[[], Awaitable[T]]) -> T:
    """A few times."""
    for delay_s in DELAYS_S:
        try:
            return await ask()
        except RemoteUnavailable as error:
            log.info("%s; trying again", error)
            await asyncio.sleep(delay_s)
    return await ask()


class PatientStore:
    """A store of which a read, or a listing, is tried a few times: a log of many records cannot be
    read anew for each that fails. What writes, and `read_into`, whose callers have patience of their own, is
    the inner store's. See Store."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    @property
    def shown(self) -> str:
        """See Store.shown."""
        return self._inner.shown

    @property
    def clock_unix_s(self) -> float:
        """See Store.clock_unix_s."""
        return self._inner.clock_unix_s

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        """See Store.create."""
        return await self._inner.create(name, pieces)

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """See Store.read_into."""
        await self._inner.read_into(name, offset_bytes, buffer)

    async def delete(self, name: str) -> None:
        """See Store.delete."""
        await self._inner.delete(name)

    async def aclose(self) -> None:
        """See Store.aclose."""
        await self._inner.aclose()

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        """See Store.read."""
        return await tried(lambda: self._inner.read(name, limit_bytes))

    async def names(self, folder: str, after: str = "") -> list[Found]:
        """See Store.names."""
        return await tried(lambda: self._inner.names(folder, after))
