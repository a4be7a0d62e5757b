"""What has the bytes that a cache has not, for whoever reads a device without a daemon: the image below it,
in the version that the cache knows, and the store of its volume, as of the epoch that the cache stands at.

Nothing is asked before somebody wants a byte: what is cached can be read without a network.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from tierblk import standing as standings
from tierblk.cache import LayerRecord, View
from tierblk.config import Config, StoreSettings, parse
from tierblk.core import crc32c
from tierblk.errors import CacheError, TierblkError
from tierblk.remote import (
    ExtentMap,
    Fetcher,
    Identity,
    Lineage,
    PatientStore,
    Source,
    Store,
    StoredPages,
    follow,
    open_lineage,
    open_source,
    open_store,
)
from tierblk.standing import Standing
from tierblk.units import MIB


async def catch_up_with_own(extents: ExtentMap, standing: Standing, lineage: Lineage) -> None:
    """The map gets those records of ours that arrived without our knowing, and none behind the first that
    another host has made."""
    for each in await follow(lineage, extents.copy()):
        if not standing.is_ours(each.record.epoch, each.record.attempt):
            return
        await asyncio.to_thread(extents.apply, each.record, each.hash)


def standing_of(view: View, volume: LayerRecord) -> Standing:
    """Where a volume in object storage stands, as the index says it. CacheError: it does not."""
    state = view.volume_state(volume)
    try:
        if state is None:
            raise ValueError("it has no word of it")
        return standings.decode(state)
    except ValueError as error:
        raise CacheError(f"the index does not say where the volume {volume.name} stands: {error}") from None


async def extents_of(view: View, volume: LayerRecord, standing: Standing) -> ExtentMap:
    """Where its pages are, as the index says it. CacheError."""
    pairs = view.volume_extents(volume)
    try:
        return await asyncio.to_thread(ExtentMap.restore, pairs, uuid=standing.uuid)
    except ValueError as error:
        raise CacheError(
            f"the index is damaged where it says what of {volume.name} is in the store: {error}"
        ) from None


async def origin_of(view: View, record: LayerRecord, config: Config | None = None) -> Origin | None:
    """What has the bytes of a layer too; None: nobody. config: how it is reached, if it is of this layer;
    else the defaults and the environment say it. CacheError."""
    if record.kind not in ("base", "write-back"):
        return None
    if record.is_stored:
        standing = standing_of(view, record)
        extents = await extents_of(view, record, standing)
        if config is None or config.volume is None or config.device.name != record.name:
            config = _default(view)
        return StoreOrigin(config, standing, extents)
    if config is None or config.url != record.url:
        config = _default(view)
    return ImageOrigin(config, Identity(record.url, record.size_bytes, record.validator))


def _default(view: View) -> Config:
    document = {
        "device": {"name": "any", "on_outage": "fail"},
        "base": {"url": "file:///dev/null"},
        "cache": {"dir": os.path.abspath(view.path), "size": 16 * MIB},
    }
    return parse(document, view.path)


class Origin:
    """One of them, opened by the first read. All of it belongs to one event loop."""

    def __init__(
        self, config: Config, on_trouble: Callable[[TierblkError], None] = lambda error: None
    ) -> None:
        """on_trouble: told now and then why nothing comes; device.on_outage says how long that is borne."""
        self._config = config
        self._on_trouble = on_trouble
        self._opening = asyncio.Lock()
        self._fetcher: Fetcher | None = None
        self._source: Source | None = None

    async def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See Source.read_into. RemoteUnavailable: it was away for longer than is to be borne."""
        fetcher = await self._open()
        patience_s, since_s = self._config.device.on_outage, time.monotonic()
        await fetcher.fetch(
            offset_bytes,
            buffer,
            lambda done: None,
            on_trouble=self._on_trouble,
            keep_on=lambda: time.monotonic() - since_s < patience_s,
        )

    async def _open(self) -> Fetcher:
        async with self._opening:
            if self._fetcher is None:
                self._source = await self._open_source()
                self._fetcher = Fetcher(self._source, self._config.remote)
            return self._fetcher

    async def _open_source(self) -> Source:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Reads have ended."""
        if self._source is not None:
            await self._source.aclose()


class ImageOrigin(Origin):
    """The image of a base layer."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        on_trouble: Callable[[TierblkError], None] = lambda error: None,
    ) -> None:
        super().__init__(config, on_trouble)
        self._identity = identity

    async def _open_source(self) -> Source:
        return await open_source(self._identity.url, self._config.remote, pin=self._identity)


class StoreOrigin(Origin):
    """The pages that the store has of a volume: those of the epoch that the cache knows, and of records that
    this host made and had no word of; not what another host has made since (R18)."""

    def __init__(
        self,
        config: Config,
        standing: Standing,
        extents: ExtentMap,
        on_trouble: Callable[[TierblkError], None] = lambda error: None,
    ) -> None:
        """extents: where its pages are, as the cache knows it."""
        super().__init__(config, on_trouble)
        self._standing = standing
        self._extents = extents

    async def _open_source(self) -> Source:
        store = await self._store(self._standing.url)
        try:
            lineage = await open_lineage(store, self._store)
        except BaseException:
            await store.aclose()
            raise
        try:
            await catch_up_with_own(self._extents, self._standing, lineage)
        except BaseException:
            await lineage.aclose()
            raise
        return StoredPages(lineage, self._extents, crc32c)

    async def _store(self, url: str) -> Store:
        settings = self._config.store if self._config.volume else StoreSettings()
        return PatientStore(await open_store(url, settings, self._config.remote))
