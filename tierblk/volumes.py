"""The volumes in object storage that a daemon has open, and their write-back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from tierblk.cache import Cache, dirt
from tierblk.claim import Claims, Found, Wishes, catch_up
from tierblk.config import Config
from tierblk.core import PAGE_BYTES
from tierblk.errors import CacheError, DeviceError, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.far import FarVolume
from tierblk.layer import Stack
from tierblk.remote import Identity
from tierblk.units import format_size
from tierblk.writeback import WriteBack

log = logging.getLogger(__name__)

FINISH_S = 30.0
"""How long a detach waits for the last epoch of a device that is gone already; then the claim is kept."""


class Volumes:
    """Opens and closes them. All of it belongs to the event loop."""

    def __init__(
        self,
        cache: Cache,
        commit: Callable[[], Awaitable[object]],
        end_fetches: Callable[[int], Awaitable[None]],
        reserve_slots: int,
    ) -> None:
        """commit: a whole cycle that begins after the call. end_fetches: see Bases. reserve_slots: how many
        are kept for moves while there is a volume (R14)."""
        self.by_layer: dict[int, FarVolume] = {}
        self._cache = cache
        self._commit = commit
        self._end_fetches = end_fetches
        self._claims = Claims(cache)
        self._reserve_slots = reserve_slots
        self.slows = False
        """Whether writes are held to the speed of uploads."""
        self.on_look: Callable[[], None] = lambda: None
        """Called several times a second while something is dirty, and when an epoch ends."""
        self.demand: Callable[[], bool] = lambda: False
        """Whether anybody waits for bytes of any remote: uploads give way then."""
        self._writers: dict[int, WriteBack] = {}
        self._catching_up: dict[int, asyncio.Task[None]] = {}

    async def find(self, config: Config, name: str, wishes: Wishes) -> Found:
        """See Claims.find."""
        return await self._claims.find(config, name, wishes)

    async def open(
        self, found: Found, config: Config, name: str, base: Identity | None, wishes: Wishes
    ) -> FarVolume:
        """Ours to write, until `release`. TierblkError; `found` is closed then."""
        far = await self._claims.claim(found, config, name, base, wishes)
        self._serve(far, config).start()
        return far

    async def go_on(self, config: Config, name: str) -> FarVolume:
        """That of a device which is there: at once, while its store is looked at. CacheError."""
        far = await self._claims.go_on(config, name)
        writer = self._serve(far, config)
        self._catching_up[far.layer.layer_id] = asyncio.create_task(
            self._catch_up(far, writer, config), name=f"catch up {name}"
        )
        return far

    def _serve(self, far: FarVolume, config: Config) -> WriteBack:
        assert config.volume is not None
        layer_id = far.layer.layer_id
        self.by_layer[layer_id] = far
        writer = self._writers[layer_id] = WriteBack(
            far,
            self._commit,
            config.volume,
            on_look=lambda: self.on_look(),
            demand=lambda: self.demand(),
        )
        self._cache.engine.set_reserve(self.reserve_slots)
        return writer

    async def _catch_up(self, far: FarVolume, writer: WriteBack, config: Config) -> None:
        try:
            await catch_up(far, config, writer.sender.persist)
        except TierblkError as error:  # refused for good, such as a log that is damaged: not to be added to
            far.fence(f"its log in the store cannot be read ({error})")
        if far.standing.fenced:
            await writer.fenced()
        else:
            writer.start()

    async def _commit_quietly(self) -> None:
        try:
            await self._commit()
        except CacheError as error:
            log.error("%s", error)

    async def release(self, far: FarVolume, *, goes_on: bool, keep_claim: bool = False) -> str | None:
        """Its device is gone, or handed over (goes_on). keep_claim: nothing more is sent. A sentence when the
        claim was kept and what is dirty stays here."""
        writer = self._writers.get(far.layer.layer_id)
        if writer is None:
            return None
        warning = None
        if keep_claim and not goes_on:
            warning = _kept(far, "it was detached with --force")
        elif not goes_on and far.lineage is None:
            warning = _kept(far, "the store was not heard of since the daemon began")
        elif not goes_on:
            warning = await self._finish(far, writer)
        await self.drop(far, commit=True)
        return warning

    async def drop(self, far: FarVolume, *, commit: bool = False) -> None:
        """Nothing of it runs any more, and nothing more is sent. commit: the index is brought up to date."""
        layer_id = far.layer.layer_id
        if (catching_up := self._catching_up.pop(layer_id, None)) is not None:
            catching_up.cancel()
            await asyncio.gather(catching_up, return_exceptions=True)
        if (writer := self._writers.pop(layer_id, None)) is not None:
            await writer.stop()
        await self._end_fetches(layer_id)
        if commit:
            await self._commit_quietly()
        self._cache.set_volume_source(layer_id, None)
        self.by_layer.pop(layer_id, None)
        self._cache.engine.set_reserve(self.reserve_slots)
        await far.aclose()

    async def _finish(self, far: FarVolume, writer: WriteBack) -> str | None:
        try:
            async with asyncio.timeout(FINISH_S):
                await writer.finish()
        except (TimeoutError, TierblkError) as error:
            why = str(error) or str(writer.sender.trouble or f"nothing was heard of it for {FINISH_S:.0f} s")
            return _kept(far, why)
        return None

    @property
    def reserve_slots(self) -> int:
        """Free slots that only moves may take at present."""
        return self._reserve_slots if self._writers else 0

    # -- what is asked of them while they are open ---

    async def sync(self, far: FarVolume, *, wait: bool = True) -> None:
        """See WriteBack.sync; without wait an epoch is only begun."""
        if (writer := self._writers.get(far.layer.layer_id)) is None:
            return
        if wait:
            await writer.sync()
        else:
            writer.hurry()

    async def sync_before_detach(self, far: FarVolume) -> None:
        """As sync, for a while. DeviceError: the store does not take it; the device goes on."""
        if far.standing.fenced or far.lineage is None:
            return
        try:
            async with asyncio.timeout(FINISH_S):
                await self.sync(far)
        except TimeoutError:
            dirty = format_size(far.layer.dirty_pages() * PAGE_BYTES)
            writer = self._writers.get(far.layer.layer_id)
            why = f": {writer.sender.trouble}" if writer is not None and writer.sender.trouble else ""
            raise DeviceError(
                f"{dirty} that were written to {far.name} are not in {far.shown} yet{why}",
                f"`tierblk sync --wait {far.name}` waits; `tierblk detach --force {far.name}` keeps it here",
            ) from None

    async def flushed(self, layer_id: int) -> None:
        """See WriteBack.flushed."""
        if (writer := self._writers.get(layer_id)) is not None:
            await writer.flushed()

    def hurry(self) -> bool:
        """Slots are needed: every volume makes an epoch. Whether one of them can come to free some."""
        hopes = False
        for writer in self._writers.values():
            if writer.volume.layer.dirty_pages() and not writer.volume.standing.fenced:
                writer.hurry()
                hopes = True
        return hopes

    def pace_per_s(self, stats: dict[str, int]) -> float | None:
        """How many new slots writes may take a second; None: as many as they like."""
        writers = [writer for writer in self._writers.values() if not writer.volume.standing.fenced]
        share = max((self._fullness(writer, stats) for writer in writers), default=0.0)
        if share >= dirt.HURRY:
            self.hurry()
        epoch_s = max((writer.epoch_s for writer in writers), default=0.0)
        pace = dirt.blocks_per_s(share, slots=_room_slots(stats), epoch_s=epoch_s) if writers else None
        self.slows = pace is not None
        return pace

    def _fullness(self, writer: WriteBack, stats: dict[str, int]) -> float:
        return dirt.fullness(
            dirty_slots=stats["far_slots"] + stats["pinned"],
            slots=_room_slots(stats),
            dirty_bytes=writer.volume.layer.dirty_pages() * PAGE_BYTES,
            max_dirty_bytes=writer.max_dirty_bytes,
        )

    @property
    def trouble(self) -> TierblkError | None:
        """What holds an upload up, if anything does."""
        return next((w.sender.trouble for w in self._writers.values() if w.sender.trouble is not None), None)

    def shown(self, far: FarVolume) -> dict[str, Any] | None:
        """For status. "fullness": how much of what may be dirty is; writes are slowed from dirt.SLOW on."""
        if (writer := self._writers.get(far.layer.layer_id)) is None:
            return None
        return {**writer.to_dict(), "fullness": self._fullness(writer, self._cache.engine.stats())}

    def store_trouble(self, far: FarVolume) -> dict[str, Any] | None:
        """Why what is written does not get into its store, in the words of Health; None: nothing is known
        against the store."""
        writer = self._writers.get(far.layer.layer_id)
        trouble = writer.sender.trouble if writer is not None else None
        if writer is None or not isinstance(trouble, RemoteUnavailable | RemoteRefused):
            return None  # what is wrong here is not the store's fault
        return {
            "state": "refused" if isinstance(trouble, RemoteRefused) else "degraded",
            "since": writer.sender.trouble_since,
            "reason": str(trouble),
            "next_try_s": writer.sender.next_try_s,
        }


def far_of(stack: Stack) -> FarVolume | None:
    """The volume of a stack, if it is one in object storage."""
    far = stack.volume.far if stack.volume else None
    return far if isinstance(far, FarVolume) else None


def _room_slots(stats: dict[str, int]) -> int:
    """All but those that are bad, or that volumes have which nobody uploads."""
    return stats["slots"] - stats["bad"] - (stats["dirty_slots"] - stats["far_slots"])


def _kept(far: FarVolume, why: str) -> str | None:
    dirty_bytes = far.layer.dirty_pages() * PAGE_BYTES
    kept = f"{far.name}: {format_size(dirty_bytes)} that are not in {far.shown} stay in the cache directory"
    if far.standing.fenced:
        sentence = f"{kept} ({far.standing.fenced})" if dirty_bytes else None
    else:
        sentence = f"{kept}, and so does the claim ({why}); attaching it here again goes on with them"
    if sentence is not None:
        log.warning("%s", sentence)
    return sentence
