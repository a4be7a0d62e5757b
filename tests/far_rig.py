"""A host without a kernel: everything that a daemon has for a volume in object storage, but a device's place
is taken by a local door. Several of them can share a store, as hosts do."""

from __future__ import annotations

import asyncio
from collections import ChainMap
from functools import partial
from pathlib import Path
from typing import Any

from tests.cache_rig import CACHE_BYTES, make_engine
from tierblk import config as configs
from tierblk.bases import Bases
from tierblk.cache import Cache
from tierblk.claim import Wishes
from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, LocalDoor
from tierblk.far import FarVolume
from tierblk.fill import Fills
from tierblk.layer import Filled, Stack
from tierblk.stacks import NO_WISHES, Stacks
from tierblk.units import MIB
from tierblk.upkeep import Upkeep
from tierblk.volumes import Volumes, far_of

NAME = "vol"
TIMEOUT_S = 20.0


def config_of(
    folder: Path,
    url: str,
    *,
    name: str = NAME,
    endpoint: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    **volume: Any,
) -> Config:
    """A volume of 8 MiB over nothing, whose epochs begin when a test says so; of a cache of 16 MiB. endpoint:
    of an S3 server."""
    document: dict[str, Any] = {
        "device": {"name": name},
        "cache": {"dir": str(folder / "cache"), "size": cache_bytes, "commit_interval": "600s"},
        **({"store": {"endpoint": endpoint}} if endpoint else {}),
        "volume": {
            "mode": "write-back",
            "url": url,
            "size": 8 * MIB,
            "epoch_interval": "3600s",
            **volume,
        },
    }
    return configs.parse(document, folder / "vol.toml")


class Host:
    """From `start` to `stop` or `kill`."""

    def __init__(self, config: Config, cache: Cache, reserve_slots: int = 8) -> None:
        self.config = config
        self.cache = cache
        self.bases = Bases(cache, self._end_fetches)
        self.volumes = Volumes(cache, self._commit, self._end_fetches, reserve_slots=reserve_slots)
        self.stacks = Stacks(cache, self.bases, self.volumes, None)  # type: ignore[arg-type]
        filled = ChainMap[int, Filled](self.bases.by_layer, self.volumes.by_layer)  # type: ignore[arg-type]
        self.fills = Fills(cache.engine, filled, 16)
        self.upkeep = Upkeep(cache, self.fills, config, self.volumes)
        self.volumes.on_look = self.upkeep.look_at_dirt
        self.upkeep.start()
        self.stack: Stack | None = None
        self._door: LocalDoor | None = None

    @classmethod
    async def start(cls, config: Config, run_dir: Path) -> Host:
        cache = await asyncio.to_thread(Cache.open, config.cache, run_dir, make_engine)
        return cls(config, cache)

    async def _end_fetches(self, layer_id: int) -> None:
        await self.fills.stop(layer_id)

    async def _commit(self) -> None:
        await self.upkeep.commit()

    @property
    def far(self) -> FarVolume:
        assert self.stack is not None
        far = far_of(self.stack)
        assert far is not None
        return far

    @property
    def door(self) -> LocalDoor:
        assert self._door is not None
        return self._door

    async def attach(self, wishes: Wishes = NO_WISHES, *, goes_on: bool = False) -> None:
        self.stack = await self.stacks.open(
            self.config, self.config.device.name, wishes=wishes, goes_on=goes_on
        )
        base, volume = self.stack.base, self.stack.volume
        assert volume is not None
        self._door = await asyncio.to_thread(
            partial(
                LocalDoor,
                self.cache.engine,
                base.layer if base else None,
                volume=volume.layer,
                size_bytes=self.stack.size_bytes,
                queue_depth=16,
            )
        )
        for layer in self.stack.filled:
            layer.patiences[NAME] = float("inf")

    async def write(self, at: int, data: bytes) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.to_thread(self.door.write, at, data)

    async def read(self, at: int, length: int) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.to_thread(self.door.read, at, length)

    async def flush(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.to_thread(self.door.flush)

    async def sync(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.volumes.sync(self.far)

    async def content(self) -> bytes:
        assert self.stack is not None
        return await self.read(0, self.stack.size_bytes)

    async def evict(self) -> None:
        """All that can go is gone."""
        await self.upkeep.commit()
        engine = self.cache.engine
        done = asyncio.Event()
        take = self.fills.take

        def taken(events: Any) -> Any:
            rest = take(events)
            if any(event.kind == configs_evicted for event in rest):
                done.set()
            return rest

        from tierblk.core import EVICT, EVICTED, Record

        configs_evicted = EVICTED
        self.fills.take = taken  # type: ignore[method-assign]
        try:
            for _ in range(2):  # once for what was hit lately
                done.clear()
                engine.push([Record(EVICT, value=CACHE_BYTES // BLOCK_BYTES)])
                async with asyncio.timeout(TIMEOUT_S):
                    await done.wait()
        finally:
            self.fills.take = take  # type: ignore[method-assign]

    async def _close_door(self) -> None:
        if (door := self._door) is not None:
            self._door = None
            door.drain()
            door.quit()
            await asyncio.to_thread(door.close)

    async def detach(self, *, keep_claim: bool = False) -> str | None:
        await self._close_door()
        stack, self.stack = self.stack, None
        assert stack is not None
        return await self.stacks.release(stack, NAME, keep_claim=keep_claim)

    async def stop(self) -> None:
        """In order; what is attached is released."""
        if self.stack is not None:
            await self.detach()
        await self._end(clean=True)

    async def kill(self) -> None:
        """As a daemon that is killed leaves its cache: maps stay, nothing more is sent."""
        await self._close_door()
        if self.stack is not None:
            far, self.stack = self.far, None
            await self.volumes.drop(far)
        await self._end(clean=False)

    async def _end(self, *, clean: bool) -> None:
        await self.fills.stop()
        await self.fills.idle()
        await self.upkeep.stop()
        await self.cache.close(clean=clean)
