"""What the engine asks of the event loop: fills, space, commits, and a sign of life for its watchdog."""

from __future__ import annotations

import asyncio
import logging
from errno import EIO, ENOSPC
from typing import Any

from tierblk.cache import Cache, Throttle, Watermarks, commit_is_due, slots_to_evict
from tierblk.config import CacheSettings, Config
from tierblk.core import BLOCK_BYTES, EVICT, EVICTED, FLUSH, NEED_SPACE, Engine, Record
from tierblk.errors import CacheError, TierblkError
from tierblk.fill import Fills
from tierblk.units import format_size
from tierblk.volumes import Volumes

log = logging.getLogger(__name__)

_BEAT_S = 1.0
_LOOK_AGAIN_S = 0.01


def watermarks(engine: Engine, settings: CacheSettings) -> Watermarks:
    """How many slots of a cache should be free."""
    return Watermarks.of(engine.slot_count - 1, settings.free_low_percent, settings.free_high_percent)


class Upkeep:
    """Serves the events of a cache's engine from `start` to `stop`. All of it runs on the event loop."""

    def __init__(self, cache: Cache, fills: Fills, config: Config, volumes: Volumes | None = None) -> None:
        """config: of the daemon; its [cache] and [daemon] count. volumes: in object storage, if there can be
        any."""
        self._cache = cache
        self._fills = fills
        self._volumes = volumes
        self._config = config
        self._marks = watermarks(cache.engine, config.cache)
        self._evicting_slots = 0
        self._throttle = Throttle(self._marks)
        self._pace_per_s: float | None = None
        self._commit_failure: str | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beating: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._pacing: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Before the first door is opened."""
        engine = self._cache.engine
        engine.set_low(self._marks.low_slots)
        asyncio.get_running_loop().add_reader(engine.event_fd, self._on_events)
        engine.set_watchdog(self._config.daemon.watchdog)
        self._beat()
        self._keep(self._commit_on_timer())
        self._keep(self._cache.settler.run(self._config.cache.checksum_after))

    async def stop(self) -> None:
        """No event comes any more: doors are closed, fills are idle."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        asyncio.get_running_loop().remove_reader(self._cache.engine.event_fd)
        self._fills.close()
        self._cache.engine.set_watchdog(0)  # nobody waits any more, and the last commit may take long
        for timer in (self._beating, self._looking, self._pacing):
            if timer is not None:
                timer.cancel()

    @property
    def trouble(self) -> str | None:
        """What keeps the cache from keeping what is fetched or written, if anything does."""
        refusal = self._cache.committer.refusal  # also of a FLUSH that failed in C
        return (
            refusal
            or self._commit_failure
            or self._fills.slot_write_failure
            or self._upload_trouble()
            or self._fullness()
            or self._slowness()
        )

    @property
    def throttle(self) -> dict[str, Any] | None:
        """How writes that need a new slot are slowed down: {"reason": "upload" or "slots", whichever is too
        slow, "bytes_per_s" of slots}; None: not at all."""
        if self._pace_per_s is None:
            return None
        reason = "upload" if self._volumes is not None and self._volumes.slows else "slots"
        return {"reason": reason, "bytes_per_s": round(self._pace_per_s * BLOCK_BYTES)}

    def _slowness(self) -> str | None:
        if (throttle := self.throttle) is None:
            return None
        faster_than = {"upload": "they are uploaded", "slots": "room is made for them"}[throttle["reason"]]
        pace = format_size(throttle["bytes_per_s"])
        why = f"volumes are written faster than {faster_than}"
        return f"{why}: what is new is slowed down to {pace} of slots a second"

    def _upload_trouble(self) -> str | None:
        trouble = self._volumes.trouble if self._volumes else None
        return f"{trouble}: what is written is kept here until it gets through" if trouble else None

    def _fullness(self) -> str | None:
        """That volumes have taken so much that the next write may find no room."""
        stats = self._cache.engine.stats()
        taken, slots = stats["volume_slots"], stats["slots"] - stats["bad"]
        if not taken or slots - taken > self._marks.low_slots:
            return None
        waiting = f", and {stats['needy']} writes wait" if stats["needy"] else ""
        shown = [format_size(count * BLOCK_BYTES) for count in (taken, slots)]
        return f"the cache is full: volumes have {shown[0]} of its {shown[1]}{waiting}"

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _beat(self) -> None:
        """The loop lives: the core, which would end the process when it does not, learns it."""
        self._cache.engine.beat()
        self._beating = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _on_events(self) -> None:
        for event in self._fills.take(self._cache.engine.poll()):
            if event.kind == EVICTED:
                self._evicting_slots = 0
                # Nothing could go: asking again at once would only spin. The next fill says NEED_SPACE.
                self._make_space(may_evict=event.value > 0)
            elif event.kind == NEED_SPACE:
                self._make_space()
            elif event.kind == FLUSH and event.layer and self._volumes:
                self._keep(self._volumes.flushed(event.layer))
            elif event.kind == FLUSH:
                self._keep(self._flush())

    def _make_space(self, *, may_evict: bool = True) -> None:
        """Eviction ahead of demand; what it freed is of use after a commit only (I4)."""
        engine = self._cache.engine
        stats = engine.stats()
        free, quarantined = stats["free"], stats["quarantined"]
        self._set_pace(stats)
        comes_free = bool(self._volumes and free < self._marks.low_slots and self._volumes.hurry())
        count = slots_to_evict(
            self._marks,
            total=stats["slots"],
            free=free,
            quarantined=quarantined,
            evicting=self._evicting_slots,
        )
        if count and may_evict:
            self._evicting_slots += count
            engine.push([Record(EVICT, value=count)])
        elif commit_is_due(self._marks, free=free, quarantined=quarantined):
            self._keep(self._commit())
        elif stats["needy"] and free > self._reserve_slots:
            engine.no_space(0)  # they look again
        elif stats["needy"] and not (quarantined or self._evicting_slots):
            taken = stats["volume_slots"] + stats["pinned"] + stats["bad"] + self._reserve_slots
            if taken >= stats["slots"] and not comes_free:
                engine.no_space(ENOSPC)
            else:  # what is being read or filled at the moment can go soon
                self._look_again_in(_LOOK_AGAIN_S)

    @property
    def _reserve_slots(self) -> int:
        return self._volumes.reserve_slots if self._volumes else 0

    def _set_pace(self, stats: dict[str, int]) -> None:
        """Writers take new slots no faster than they are freed, when few are left; nor, when much is dirty,
        than it is uploaded."""
        coming = stats["quarantined"] + self._evicting_slots
        pace = self._throttle.blocks_per_s(free=stats["free"], coming=coming)
        if self._volumes is not None:
            far = self._volumes.pace_per_s(stats)
            pace = far if pace is None or (far is not None and far < pace) else pace
        if pace != self._pace_per_s:
            self._cache.engine.set_pace(pace)
            self._pace_per_s = pace
        if stats["free"] < self._marks.low_slots and coming and stats["volume_slots"] and not self._pacing:
            self._pacing = asyncio.get_running_loop().call_later(self._throttle.look_s, self._pace_again)

    def _pace_again(self) -> None:
        self._pacing = None
        self._set_pace(self._cache.engine.stats())

    def look_at_dirt(self) -> None:
        """Something is dirty that is to be uploaded, or was: the pace may have to be another one."""
        self._set_pace(self._cache.engine.stats())

    def _look_again_in(self, delay_s: float) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(delay_s, self._look_again)

    def _look_again(self) -> None:
        self._looking = None
        self._make_space()

    async def _flush(self) -> None:
        """A commit for all FLUSHes that wait; it begins after they came (R7)."""
        engine = self._cache.engine
        flushes = engine.take_flushes()
        error = EIO
        try:
            if await self._commit():
                error = 0
        finally:
            engine.end_flushes(flushes, error=error)

    async def commit(self) -> None:
        """All is durable that was there before the call. CacheError."""
        if not await self._commit():
            raise CacheError(self._commit_failure or "the index could not be written")

    async def _commit(self) -> bool:
        """Whether all is durable that was there before."""
        released = self._cache.engine.stats()["released"]
        try:
            report = await self._cache.commit()
        except TierblkError as error:
            if self._commit_failure is None:
                log.error("%s", error)
            self._commit_failure = str(error)
            self._cache.engine.no_space(EIO)  # what was freed cannot be used before a commit succeeds
            return False
        self._commit_failure = None
        if self._cache.engine.stats()["released"] > released:
            self._throttle.committed(report.duration_s)
        # What was freed since the last look may not be enough: NEED_SPACE is not said twice.
        self._make_space()
        return True

    async def _commit_on_timer(self) -> None:
        while True:
            await asyncio.sleep(self._config.cache.commit_interval)
            if self._cache.changed():
                await self._commit()
