"""The bases that a daemon has open: one per image, however many devices show it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from tierblk import partition
from tierblk.cache import Cache
from tierblk.config import Config
from tierblk.core import Layer, LocalDoor
from tierblk.errors import DeviceError
from tierblk.layer import Base
from tierblk.remote import Fetcher, Identity, RawImage, open_source


class Bases:
    """Opens and closes bases. All of it belongs to the event loop."""

    def __init__(
        self, cache: Cache, executor: Executor, end_fetches: Callable[[int], Awaitable[None]]
    ) -> None:
        """end_fetches: of the layer of that number; returns when none of them runs any more."""
        self.by_layer: dict[int, Base] = {}
        self._cache = cache
        self._executor = executor
        self._end_fetches = end_fetches

    async def open(
        self, config: Config, user: str, *, pin: Identity | None = None, fresh: bool = False
    ) -> Base:
        """The base of a config, counted as used by `user` until `release`: one that is open already, or one
        from the cache's layers, or a new one.

        pin: exactly that version, with nobody asked. fresh: the version that the server has now, and an error
        if it does not answer; else the last known one will do then. TierblkError."""
        url = config.base.url
        known = [] if fresh else [Identity(*identity) for identity in self._cache.identities_of(url)]
        source = await open_source(url, config.remote, known[-1] if known else None, pin=pin)
        try:
            image = RawImage(source)
            identity = image.identity
            layer: Layer = await self._cache.base_layer(identity.url, identity.size_bytes, identity.validator)
        except BaseException:
            await source.aclose()
            raise
        # From here to the count nobody else may run: the last user of this base may be on its way out.
        base = self.by_layer.get(layer.layer_id)
        if base is None:
            base = self.by_layer[layer.layer_id] = Base(layer, image, Fetcher(source, config.remote))
        # Until the device is there nothing but the attach waits for it, which is to fail rather than wait.
        base.patiences[user] = 0.0
        if base.image is not image:
            try:
                await source.aclose()
            except BaseException:  # an attach that was given up
                await self.release(base, user)
                raise
        return base

    async def release(self, base: Base, user: str) -> None:
        """One user less; a base that nobody uses is closed. Its blocks stay cached."""
        base.patiences.pop(user, None)
        if base.patiences or self.by_layer.get(base.layer.layer_id) is not base:
            return
        del self.by_layer[base.layer.layer_id]
        await self._end_fetches(base.layer.layer_id)
        await base.aclose()

    async def partition_warning(self, base: Base) -> str | None:
        """Reads the image's partition table as the kernel will, so that all of it is cached when the kernel
        does, whose wait nobody can end. A remote that does not answer is an error as soon as the retries are
        used up, whatever the device's patience."""
        size_bytes = base.image.size_bytes
        door = LocalDoor(self._cache.engine, base.layer, queue_depth=4)
        door.set_patience(0)
        try:
            head = await self._read(door, 0, min(partition.HEAD_BYTES, size_bytes))
            reads = partition.kernel_reads(head, size_bytes)
            wanted = next(reads, None)
            while wanted is not None:
                found = await self._read(door, *wanted)
                try:
                    wanted = reads.send(found)
                except StopIteration:
                    wanted = None
        except OSError as error:
            raise base.trouble or DeviceError(f"cannot read {base.image.identity.shown}: {error}") from None
        finally:
            door.drain()
            door.quit()
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, door.close))
        table = partition.parse(head, size_bytes)
        return table.warning() if table else None

    async def _read(self, door: LocalDoor, offset_bytes: int, length_bytes: int) -> bytes:
        """Cancelled, it ends at once: the door's drain ends the read."""
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self._executor, door.read, offset_bytes, length_bytes)
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            door.drain()
            await asyncio.wait([reading])
            reading.exception()  # nobody else looks at it
            raise
