"""The bases that a daemon has open: one per image, however many devices show it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tierblk.cache import Cache
from tierblk.config import Config
from tierblk.core import Layer
from tierblk.layer import Base
from tierblk.remote import Fetcher, Identity, RawImage, open_source


class Bases:
    """Opens and closes bases. All of it belongs to the event loop."""

    def __init__(self, cache: Cache, end_fetches: Callable[[int], Awaitable[None]]) -> None:
        """end_fetches: of the layer of that number; returns when none of them runs any more."""
        self.by_layer: dict[int, Base] = {}
        self.opening: list[tuple[str, int, str]] = []
        """Identities of those that will be there in a moment: their layers must not go."""
        self._cache = cache
        self._end_fetches = end_fetches

    async def open(
        self, config: Config, user: str, *, pin: Identity | None = None, fresh: bool = False
    ) -> Base:
        """The base of a config, counted as used by `user` until `release`: one that is open already, or one
        from the cache's layers, or a new one. The config has one.

        pin: exactly that version, with nobody asked. fresh: the version that the server has now, and an error
        if it does not answer; else the last known one will do then. TierblkError."""
        url = config.url
        known = [] if fresh else [Identity(*identity) for identity in self._cache.identities_of(url)]
        source = await open_source(url, config.remote, known[-1] if known else None, pin=pin)
        try:
            image = RawImage(source)
            layer = await self._layer_of(image.identity)
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

    async def _layer_of(self, identity: Identity) -> Layer:
        wanted = (identity.url, identity.size_bytes, identity.validator)
        self.opening.append(wanted)
        try:
            return await self._cache.base_layer(*wanted)
        finally:
            self.opening.remove(wanted)

    async def release(self, base: Base, user: str) -> None:
        """One user less; a base that nobody uses is closed. Its blocks stay cached."""
        base.patiences.pop(user, None)
        if base.patiences or self.by_layer.get(base.layer.layer_id) is not base:
            return
        del self.by_layer[base.layer.layer_id]
        await self._end_fetches(base.layer.layer_id)
        await base.aclose()
