"""The daemon of one cache directory: puts the parts together, and takes them apart in the right order (DESIGN
3).

Start: cache (its lock first), engine events, the devices that an earlier daemon left in the driver, control
socket. Stop: attaches that run, devices (handed over, or drained, stopped and deleted), then fetches, then
the last commit, then the lock. Everything is decided on one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import ChainMap
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tierblk import records, takeover
from tierblk.bases import Bases
from tierblk.cache import Cache
from tierblk.care import Care
from tierblk.claim import Wishes
from tierblk.config import Config, cache_conflicts
from tierblk.core import BLOCK_BYTES, Engine, ublk
from tierblk.device import Device, Home
from tierblk.driver import driver_error, stamp_of
from tierblk.errors import DaemonError, DeviceError, TierblkError
from tierblk.fill import Fills
from tierblk.layer import Filled, Stack
from tierblk.readings import Readings
from tierblk.records import DeviceRecord
from tierblk.remote import RawImage, open_source, open_store, read_birth
from tierblk.rundir import run_root
from tierblk.seen import Seen
from tierblk.stacks import NO_WISHES, Stacks
from tierblk.takeover import TakeOver
from tierblk.tracing import Reader, Wanted
from tierblk.upkeep import Upkeep, watermarks
from tierblk.volumes import Volumes, far_of

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONTROL_THREADS = 16
"""Control commands of ublk that may wait at once; each blocks a thread."""

_TAKE_OVER_S = 5.0
"""How long the control socket waits for devices to be taken over; then commands see them as they are."""


class Daemon(Seen):
    """Serves one cache directory and the devices that use it. See control.DaemonApi for what it can be
    asked."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._executor = ThreadPoolExecutor(_CONTROL_THREADS, "tierblk-control")
        self._names: dict[str, asyncio.Lock] = {}
        self._calls: set[asyncio.Task[Any]] = set()
        self._readings = Readings()
        self._stopping = asyncio.Event()
        self._hands_over = False
        self._care: Care | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ---

    async def start(self) -> None:
        """Opens the cache directory, begins to serve the engine, and takes over the devices that wait.
        CacheError."""
        settings = self._config.cache
        # Not Path.exists, which raises where one may not look.
        if not await self._run(os.path.exists, settings.dir / "slots"):
            await self._unless_stopped(self._preflight())
        engine_of = partial(Engine, staging_bytes=self._config.remote.staging)
        self._cache = cache = await self._run(Cache.open, settings, run_root(), engine_of)
        engine = cache.engine
        # Fills looks bases up in by_layer, and Bases ends fetches of Fills.
        bases = Bases(cache, self._end_fetches)
        marks = watermarks(engine, settings)
        volumes = Volumes(cache, self._commit, self._end_fetches, reserve_slots=marks.low_slots // 2)
        self._stacks = Stacks(cache, bases, volumes, self._executor)
        remote = self._config.remote
        filled = ChainMap[int, Filled](bases.by_layer, volumes.by_layer)  # type: ignore[arg-type]
        self._fills = Fills(engine, filled, remote.max_window // BLOCK_BYTES, readahead=remote.readahead)
        self._home = Home(engine, self._executor, stamp_of(cache.uuid.bytes), cache.run_dir)
        self._upkeep = Upkeep(cache, self._fills, self._config, volumes)
        self._care = Care(cache, filled, self._needed)
        volumes.on_look = self._upkeep.look_at_dirt
        volumes.demand = lambda: any(layer.fetcher.counters.in_flight for layer in filled.values())
        self._upkeep.start()
        log.info("serving %s (%s start)", settings.dir, cache.start_mode.value)
        await self._take_over_all()
        # A device that has a record may wait, whatever the driver says at the moment.
        known, _ = await self._run(records.read_all, cache.run_dir)
        wait = {record.name for record in known} | self._devices.keys() | self._takeovers.keys()
        await self._stacks.drop_orphans(wait)

    def _needed(self) -> list[tuple[str, int, str]]:
        """Images that are to be shown, and are not open yet."""
        assert self._stacks is not None
        waiting = (each.record for each in self._takeovers.values())
        return [(each.url, each.size_bytes, each.validator) for each in waiting] + self._stacks.bases.opening

    async def _commit(self) -> None:
        assert self._upkeep is not None
        await self._upkeep.commit()

    async def _end_fetches(self, layer_id: int) -> None:
        assert self._fills is not None
        await self._fills.stop(layer_id)

    async def _unless_stopped(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """DaemonError as soon as somebody asks for a stop: whoever gave the start up does not wait for it."""
        task, stop = asyncio.create_task(coroutine), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise DaemonError("the daemon was stopped before it served anything")
            await task
        finally:
            task.cancel()
            stop.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _preflight(self) -> None:
        """Before a cache directory is made: can its first device exist at all? A user who mistyped an address
        is not left with a directory of many gigabytes."""
        try:
            await self._run(ublk.features)
        except OSError as error:
            raise driver_error(error) from None
        volume = self._config.volume
        if volume is not None and volume.url is not None:
            store = await open_store(volume.url, self._config.store, self._config.remote)
            try:
                await read_birth(store)
            finally:
                await store.aclose()
        if not self._config.url:
            return
        source = await open_source(self._config.url, self._config.remote)
        try:
            RawImage(source)
        finally:
            await source.aclose()

    async def end_calls(self) -> None:
        """Attaches and readings that run end in an error; nothing new is begun."""
        self._stopping.set()
        for device in self._devices.values():
            device.traces.end("stopping")
        for call in self._calls:
            if not call.cancelling():  # one that cleans up behind itself is let be
                call.cancel()
        await asyncio.gather(*self._calls, self._readings.end_all(), return_exceptions=True)

    async def stop(self) -> None:
        """Everything down, in order. Devices wait for the next daemon if this stop hands over and they can;
        the others are taken away, also those in use, with a line that names them."""
        await self.end_calls()
        await asyncio.gather(*(waiting.end() for waiting in self._takeovers.values()))
        devices = list(self._devices.values())
        ends = await asyncio.gather(*map(self._end_device, devices), return_exceptions=True)
        for device, end in zip(devices, ends, strict=True):
            if isinstance(end, BaseException):  # the others and the cache still end in order
                log.error("%s (%s) could not be stopped: %s", device.name, device.path, end)
        if not self._hands_over:
            await self._end_waiting()
        cache, fills = self._cache, self._fills
        if cache is None or fills is None:
            return
        await fills.stop()
        await fills.idle()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._upkeep is not None:
            await self._upkeep.stop()
        fills.close()
        await cache.close()
        self._executor.shutdown()
        log.info("stopped")

    async def _end_device(self, device: Device) -> None:
        if self._hands_over and device.outlives_daemon and device.state == "live":
            log.info("%s (%s) waits for the next daemon", device.name, device.path)
            await device.hand_over()
        else:
            log.info("taking away %s (%s), whoever uses it", device.name, device.path)
            await device.stop(force=True)
        await self._forget(device)

    async def _end_waiting(self) -> None:
        """Those that could not be taken over go as well: nobody asked for them to wait longer."""
        for waiting in self._takeovers.values():
            log.info("taking away %s (%s), whoever waits for it", waiting.record.name, waiting.record.path)
            try:
                await waiting.take_away(self.run_dir, self._executor)
            except TierblkError as error:
                log.error("%s could not be taken away: %s", waiting.record.name, error)

    @property
    def run_dir(self) -> Path:
        """This cache's folder below RUN; known once `start` has returned."""
        assert self._cache is not None
        return self._cache.run_dir

    async def wait(self) -> None:
        """Until somebody asks for the stop."""
        await self._stopping.wait()

    def request_stop(self, *, hand_over: bool = False) -> None:
        """See control.DaemonApi. The first request counts."""
        if not self._stopping.is_set():
            self._hands_over = hand_over
        self._stopping.set()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what can be asked ---

    async def attach(self, config: Config, wishes: Wishes = NO_WISHES) -> dict[str, Any]:
        """See control.DaemonApi."""
        self._same_cache(config)
        return await self._call(self._attach(config, wishes), abandon=True)

    async def _call(self, coroutine: Coroutine[Any, Any, T], *, abandon: bool = False) -> T:
        """What a client asked for, as a task of its own that only a stop of the daemon ends. abandon: or who
        waits for it, when cancelled; what it had begun is taken back then before this returns."""
        if self._stopping.is_set():
            coroutine.close()
            raise DaemonError("the daemon is stopping", "try again when it has")
        call = asyncio.create_task(coroutine)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            if call.cancelled():
                raise DaemonError("the daemon is stopping", "try again when it has") from None
            if abandon and not call.cancelling():
                call.cancel()
            if abandon:
                await asyncio.wait([call])
            raise

    def _only_one(self, name: str) -> asyncio.Lock:
        """Held while the device of this name is made or changed."""
        return self._names.setdefault(name, asyncio.Lock())

    async def _attach(self, config: Config, wishes: Wishes) -> dict[str, Any]:
        assert self._stacks is not None
        name = config.device.name
        async with self._only_one(name):
            if (waiting := self._takeovers.get(name)) is not None:
                await self._take_over(waiting)  # once more, if it has failed
                if name in self._takeovers:
                    hint = f"`tierblk detach --force {name}` takes it away"
                    raise DeviceError(f"{name} could not be taken over: {waiting.reason}", hint)
            if name in self._devices:
                return self._there_already(self._devices[name], config)
            stack = await self._stacks.open(config, name, wishes=wishes)
            try:
                warning = await self._stacks.partition_warning(stack)
                return await self._make(config, stack, warning)
            except BaseException:
                await self._stacks.release(stack, name)
                raise

    async def _make(
        self, config: Config, stack: Stack, warning: str | None, dev_id: int | None = None
    ) -> dict[str, Any]:
        assert self._home is not None
        device = Device(config, stack, self._home)
        if warning:
            device.warnings.append(warning)
            log.warning("%s: %s", device.name, warning)
        await device.start(self._on_device_end, dev_id=dev_id)
        self._devices[device.name] = device
        log.info("%s is %s: %s", device.name, device.path, stack.shown)
        return self._shown(device)

    def _there_already(self, device: Device, config: Config) -> dict[str, Any]:
        """What an attach gets whose device an earlier daemon made and this one took over. Whoever attaches
        after a daemon's end cannot know whether the keeper was faster."""
        if device.recovered is None or device.config.path != config.path:
            raise DaemonError(
                f"{device.name} is attached already, as {device.path} by {device.config.path}",
                "use it, or choose another device.name",
            )
        shown = self._shown(device)
        if device.config != config:
            changed = (
                "it goes on with the settings that it was attached with; to change them, detach it first"
            )
            shown["warnings"] = [*shown["warnings"], changed]
        return shown

    # -- what an earlier daemon left ---

    async def _take_over_all(self) -> None:
        """All at once. Who takes long goes on in the background: one of them never holds up the others, nor
        this daemon's control socket."""
        assert self._home is not None
        found = await self._run(takeover.look, self._home.run_dir, self._home.stamp)
        for record in found.waiting:
            self._takeovers.setdefault(record.name, TakeOver(record, self._serve_again))
        for dev_id, why in found.unusable.items():
            waiting = takeover.unusable(dev_id, why)
            self._takeovers.setdefault(waiting.record.name, waiting)
        tries = [asyncio.create_task(self._take_over(waiting)) for waiting in self._takeovers.values()]
        for each in tries:
            self._tasks.add(each)
            each.add_done_callback(self._tasks.discard)
        if tries:
            await asyncio.wait(tries, timeout=_TAKE_OVER_S)

    async def _take_over(self, waiting: TakeOver) -> None:
        """Returns when the try that runs has ended; the device is then among the others, or waits on."""
        device = await asyncio.shield(waiting.begin())
        name = waiting.record.name
        if self._takeovers.get(name) is not waiting:
            return  # somebody else, who waited for the same try, was here
        if device is not None:
            del self._takeovers[name]
            self._devices[name] = device
        elif await self._run(waiting.is_gone, self.run_dir):
            self._takeovers.pop(name, None)

    async def _serve_again(self, record: DeviceRecord) -> Device:
        assert self._stacks is not None
        assert self._home is not None
        config, pin = takeover.parsed(record)
        stack = await self._stacks.open(config, record.name, pin=pin, goes_on=True)
        try:
            device = Device(config, stack, self._home, record)
            await device.recover(self._on_device_end)
        except BaseException:
            await self._stacks.release(stack, record.name, goes_on=True)
            raise
        return device

    # -- what can be asked of a device ---

    def _same_cache(self, config: Config) -> None:
        """Two configs of one directory must agree about it. One of another directory has another daemon."""
        if not _same(self._config.cache.dir, config.cache.dir):
            raise DaemonError(
                f"this daemon serves {self._config.cache.dir}, and {config.path} names {config.cache.dir}",
                f"`tierblk attach {config.path}` asks or starts the daemon of that one",
            )
        if different := cache_conflicts(self._config, config):
            raise DaemonError("; ".join(different), f"both use {config.cache.dir}: make them agree")

    def _on_device_end(self, device: Device) -> None:
        """Somebody deleted the device with another tool: clean up behind it, and keep saying so in
        `status`."""
        self._keep(device.stop(force=True))

    @property
    def care(self) -> Care:
        """See control.DaemonApi."""
        assert self._care is not None
        return self._care

    async def sync(self, name: str, *, wait: bool) -> dict[str, Any]:
        """See control.DaemonApi."""
        device = self._find(name)
        if (far := far_of(device.stack)) is not None and self._stacks is not None:
            await self._stacks.volumes.sync(far, wait=wait)
        return self._shown(device)

    async def content(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        """See control.DaemonApi."""
        assert self._stacks is not None
        if self._stopping.is_set():
            raise DaemonError("the daemon is stopping", "try again when it has")
        self._find(name)  # else there would be a lock for every name that somebody thinks of
        only_one = self._only_one(name)
        return await self._readings.read(
            name, only_one, lambda: self._find(name).stack, self._stacks, offset_bytes, length_bytes
        )

    async def detach(self, name: str, *, force: bool = False) -> str | None:
        """See control.DaemonApi."""
        warning = None
        if force:
            self._readings.end(name)
        if name in self._takeovers:
            waiting = self._takeovers[name]
            if not force:
                raise DeviceError(
                    f"{name} ({waiting.record.path}) is {waiting.state}: whether it is in use is not known",
                    f"`tierblk detach --force {name}` takes it away, and whoever waits for it gets an error",
                )
            await waiting.take_away(self.run_dir, self._executor)
            self._takeovers.pop(name, None)
            assert self._stacks is not None
            await self._stacks.forget(name)
        else:
            self._find(name)
            async with self._only_one(name):  # an attach of that name finds all of it, or nothing
                device = self._find(name)
                if not force and (far := far_of(device.stack)) is not None and self._stacks is not None:
                    await self._stacks.volumes.sync_before_detach(far)
                await device.stop(force=force)
                warning = await self._forget(device, keep_claim=force)
        log.info("%s is detached%s", name, ", whoever used it" if force else "")
        return warning

    async def repin(self, name: str) -> dict[str, Any]:
        """See control.DaemonApi."""
        return await self._call(self._repin(name))

    async def _repin(self, name: str) -> dict[str, Any]:
        """The new version is looked at first: if that fails the device goes on as before. Not for one that
        was written to (R22)."""
        assert self._stacks is not None
        async with self._only_one(name):
            old = self._find(name)
            if old.stack.volume is not None:
                raise DeviceError(
                    f"{name} has a volume, which was written over the version of its image that it shows",
                    "attach the new version under another device.name",
                )
            stack = await self._stacks.open(old.config, f"{name} (new)", fresh=True)
            try:
                if stack.base is None or stack.base is old.stack.base:
                    return self._shown(old)
                warning = await self._stacks.partition_warning(stack)
                await old.stop(force=False)
                await self._forget(old)
                stack.base.patiences[name] = 0.0
                try:
                    return await self._make(old.config, stack, warning, old.dev_id)
                except BaseException:
                    await self._stacks.release(stack, name)
                    raise
            finally:
                await self._stacks.release(stack, f"{name} (new)")

    async def _forget(self, device: Device, *, keep_claim: bool = False) -> str | None:
        assert self._stacks is not None
        if self._devices.get(device.name) is not device:  # a detach and a stop may meet
            return None
        del self._devices[device.name]
        goes_on = device.state == "handed over"
        return await self._stacks.release(device.stack, device.name, goes_on=goes_on, keep_claim=keep_claim)

    def trace(self, name: str, wanted: Wanted) -> Reader:
        """See control.DaemonApi."""
        return self._find(name).traces.open(wanted)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
