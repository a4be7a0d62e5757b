"""What a config's device shows, put together: its base, opened or shared, and its volume, found or made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import asdict

from tierblk import partition
from tierblk.bases import Bases
from tierblk.cache import Cache, StartMode
from tierblk.claim import Wishes
from tierblk.config import WRITE_BACK, Config
from tierblk.core import LocalDoor
from tierblk.errors import CacheError, DeviceError
from tierblk.layer import Stack, Volume
from tierblk.remote import Identity
from tierblk.snapshot import Remote
from tierblk.volumes import Volumes, far_of

log = logging.getLogger(__name__)

NO_WISHES = Wishes()


class Stacks:
    """Opens and closes stacks. All of it belongs to the event loop."""

    def __init__(self, cache: Cache, bases: Bases, volumes: Volumes, executor: Executor) -> None:
        self.bases = bases
        self.volumes = volumes
        self._cache = cache
        self._executor = executor

    def remotes(self) -> list[Remote]:
        """Of all layers that are open and fetched."""
        layers = {**self.bases.by_layer, **self.volumes.by_layer}
        return [
            Remote(number, filled.remote, filled.health()["state"], asdict(filled.fetcher.counters))
            for number, filled in layers.items()
        ]

    async def open(
        self,
        config: Config,
        user: str,
        *,
        pin: Identity | None = None,
        fresh: bool = False,
        goes_on: bool = False,
        wishes: Wishes = NO_WISHES,
    ) -> Stack:
        """The stack of a config, counted as used by `user` until `release`.

        pin, fresh: of the base, see Bases.open; a volume that is there already pins the version that it was
        written over. goes_on: the device was there before, so a scratch volume is not begun anew, and no
        store is asked. wishes: of a volume in object storage. TierblkError."""
        name = config.device.name
        wanted, known = config.volume, None
        if wanted is not None and goes_on and self._cache.start_mode not in (StartMode.WARM, StartMode.CLEAN):
            raise DeviceError(
                f"what is on {name} may be older than what its users saw: the cache's block maps are lost",
                f"`tierblk detach --force {name}`, and check what is on it before it is used again",
            )
        if wanted is not None:
            known = self._cache.volume(name)
            if known is not None and known.kind == "scratch" and not goes_on:
                await self._cache.drop_volume(name)  # of a device that is gone
                known = None
        if wanted is not None and wanted.mode == WRITE_BACK:
            return await self._open_far(config, user, pin, goes_on=goes_on, wishes=wishes)
        if known is not None and known.base is not None and config.base is not None:
            if known.url != config.base.url:
                raise CacheError(
                    f"there is a volume {name} already, and it lies over {known.shown_base}",
                    "what was written means nothing without what is below it: choose another device.name",
                )
            pin = Identity(*known.base)
        base = await self.bases.open(config, user, pin=pin, fresh=fresh) if config.base else None
        try:
            base_bytes = base.image.size_bytes if base else 0
            if wanted is None:
                return Stack(base, None, base_bytes)
            size_bytes = wanted.size or base_bytes
            identity = base.image.identity if base else None
            over = (identity.url, identity.size_bytes, identity.validator) if identity else None
            layer = await self._cache.volume_layer(name, wanted.mode, size_bytes, over)
            return Stack(base, Volume(name, wanted.mode, layer), size_bytes)
        except BaseException:
            if base is not None:
                await self.bases.release(base, user)
            raise

    async def _open_far(
        self, config: Config, user: str, pin: Identity | None, *, goes_on: bool, wishes: Wishes
    ) -> Stack:
        """With a volume in object storage, which says what it lies over."""
        name = config.device.name
        found = None if goes_on else await self.volumes.find(config, name, wishes)
        try:
            if found is not None:
                pin = found.base
            base = await self.bases.open(config, user, pin=pin) if config.base else None
        except BaseException:
            if found is not None:
                await found.aclose()
            raise
        try:
            identity = base.image.identity if base else None
            if found is None:
                far = await self.volumes.go_on(config, name)
            else:
                far = await self.volumes.open(found, config, name, identity, wishes)
        except BaseException:
            if base is not None:
                await self.bases.release(base, user)
            raise
        return Stack(base, Volume(name, WRITE_BACK, far.layer, far), far.layer.size_bytes)

    async def forget(self, name: str) -> None:
        """The device of that name is gone, and with it its volume if that is a scratch one. CacheError."""
        if name in self._cache.scratch_volumes():
            await self._cache.drop_volume(name)

    async def drop_orphans(self, wait: Collection[str]) -> None:
        """Scratch volumes of devices that went with the daemon that served them. wait: names of devices that
        are there, or may be."""
        for name in self._cache.scratch_volumes():
            if name not in wait:
                log.info("dropping the scratch volume %s: its device is gone", name)
                try:
                    await self._cache.drop_volume(name)
                except CacheError as error:  # its slots stay taken; everything else can be served
                    log.error("%s", error)

    async def release(
        self, stack: Stack, user: str, *, goes_on: bool = False, keep_claim: bool = False
    ) -> str | None:
        """One user less. goes_on: the device waits for the next daemon; else a scratch volume is gone, and
        one in object storage is given back with all that was written, or kept if that cannot be or is not
        wanted (keep_claim): then a sentence says so."""
        try:
            if (far := far_of(stack)) is not None:
                return await self.volumes.release(far, goes_on=goes_on, keep_claim=keep_claim)
            if stack.volume is not None and not goes_on:
                await self.forget(stack.volume.name)
            return None
        finally:
            if stack.base is not None:
                await self.bases.release(stack.base, user)

    async def partition_warning(self, stack: Stack) -> str | None:
        """Reads the partition table as the kernel will, so that all of it is cached when the kernel does,
        whose wait nobody can end. A remote that does not answer is an error as soon as the retries are used
        up, whatever the device's patience."""
        if not stack.filled:
            return None  # nothing of it can be anywhere but here
        size_bytes = stack.size_bytes
        async with self._reading(stack, queue_depth=4) as door:
            head = await self._read(door, 0, min(partition.HEAD_BYTES, size_bytes))
            reads = partition.kernel_reads(head, size_bytes)
            wanted = next(reads, None)
            while wanted is not None:
                found = await self._read(door, *wanted)
                try:
                    wanted = reads.send(found)
                except StopIteration:
                    wanted = None
        table = partition.parse(head, size_bytes)
        return table.warning() if table else None

    async def content(self, stack: Stack, offset_bytes: int, length_bytes: int) -> bytes:
        """What a device shows there, which is inside it; a remote that does not answer is an error as soon as
        the retries are used up. TierblkError. While it runs nobody may close the stack; cancelled it ends."""
        async with self._reading(stack, queue_depth=64) as door:
            return await self._read(door, offset_bytes, length_bytes)

    @asynccontextmanager
    async def _reading(self, stack: Stack, queue_depth: int) -> AsyncIterator[LocalDoor]:
        """A door of our own to it, without patience."""
        try:
            door = LocalDoor(
                self._cache.engine,
                stack.base.layer if stack.base else None,
                volume=stack.volume.layer if stack.volume else None,
                size_bytes=stack.size_bytes,
                queue_depth=queue_depth,
            )
        except OSError as error:  # no memory, or too many are open
            raise DeviceError(f"cannot read {stack.shown}: {error.strerror}") from None
        door.set_patience(0)
        try:
            yield door
        except OSError as error:
            trouble = next((each.trouble for each in stack.filled if each.trouble), None)
            raise trouble or DeviceError(f"cannot read {stack.shown}: {error}") from None
        finally:
            door.drain()
            door.quit()
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, door.close))

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
