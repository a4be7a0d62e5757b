"""The daemon of one cache directory: puts the parts together, and takes them apart in the right order (DESIGN
3).

Start: cache (its lock first), engine events, what a killed daemon left in the driver, control socket. Stop:
devices (drain, STOP, DEL), then fetches, then the last commit, then the lock. Everything is decided on one
event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tierblk import partition
from tierblk.cache import Cache, Watermarks, commit_is_due, slots_to_evict
from tierblk.config import Config, cache_conflicts
from tierblk.control import ControlServer, report_ready
from tierblk.core import (
    BLOCK_BYTES,
    EVICT,
    EVICTED,
    FILLED,
    MISS,
    NEED_SPACE,
    Engine,
    Layer,
    Record,
    local_door,
    ublk,
)
from tierblk.device import Device, driver_error, reap, stamp_of
from tierblk.errors import DaemonError, DeviceError, TierblkError
from tierblk.fill import Fills
from tierblk.layer import Base
from tierblk.remote import Fetcher, Identity, RawImage, open_source
from tierblk.rundir import run_root

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONTROL_THREADS = 16
"""Control commands of ublk that may wait at once; each blocks a thread."""


class Daemon:
    """Serves one cache directory and the devices that use it. See control.DaemonApi for what it can be
    asked."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._executor = ThreadPoolExecutor(_CONTROL_THREADS, "tierblk-control")
        self._cache: Cache | None = None
        self._fills: Fills | None = None
        self._bases: dict[int, Base] = {}
        self._devices: dict[str, Device] = {}
        self._attaching = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._started = time.time()
        self._evicting_slots = 0
        self._marks = Watermarks(0, 0)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._commit_failure: str | None = None

    # -- life ---

    async def start(self) -> None:
        """Opens the cache directory and begins to serve the engine. CacheError."""
        settings = self._config.cache
        # Not Path.exists, which raises where one may not look.
        if not await self._run(os.path.exists, settings.dir / "slots"):
            await self._preflight()
        engine_of = partial(Engine, staging_bytes=self._config.remote.staging)
        self._cache = cache = await self._run(Cache.open, settings, run_root(), engine_of)
        engine = cache.engine
        self._marks = Watermarks.of(
            engine.slot_count - 1, settings.free_low_percent, settings.free_high_percent
        )
        engine.set_low(self._marks.low_slots)
        self._fills = Fills(engine, self._bases, self._config.remote.max_window // BLOCK_BYTES)
        asyncio.get_running_loop().add_reader(engine.event_fd, self._on_events)
        for dev_id in await self._run(reap, stamp_of(cache.uuid.bytes)):
            log.warning("deleted ublk device %d, left behind by a daemon that was killed", dev_id)
        self._keep(self._commit_on_timer())
        log.info("serving %s (%s start)", settings.dir, cache.start_mode.value)

    async def _preflight(self) -> None:
        """Before a cache directory is made: can its first device exist at all? A user who mistyped an address
        is not left with a directory of many gigabytes."""
        try:
            await self._run(ublk.features)
        except OSError as error:
            raise driver_error(error) from None
        source = await open_source(self._config.base.url, self._config.remote)
        try:
            RawImage(source)
        finally:
            await source.aclose()

    async def stop(self) -> None:
        """Everything down, in order; devices in use are stopped too, with a line that names them."""
        self._stopping.set()
        cache, fills = self._cache, self._fills
        async with self._attaching:
            devices = list(self._devices.values())
            ends = await asyncio.gather(*map(self._stop_device, devices), return_exceptions=True)
            for device, end in zip(devices, ends, strict=True):
                if isinstance(end, BaseException):  # the others and the cache still end in order
                    log.error("%s (%s) could not be stopped: %s", device.name, device.path, end)
        if cache is None or fills is None:
            return
        await fills.stop()
        await fills.idle()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        asyncio.get_running_loop().remove_reader(cache.engine.event_fd)
        await cache.close()
        self._executor.shutdown()
        log.info("stopped")

    async def _stop_device(self, device: Device) -> None:
        log.info("taking away %s (%s), whoever uses it", device.name, device.path)
        await device.stop(force=True)
        await self._forget(device)

    @property
    def run_dir(self) -> Path:
        """This cache's folder below RUN; known once `start` has returned."""
        assert self._cache is not None
        return self._cache.run_dir

    async def wait(self) -> None:
        """Until somebody asks for the stop."""
        await self._stopping.wait()

    def request_stop(self) -> None:
        self._stopping.set()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the engine ---

    def _on_events(self) -> None:
        assert self._cache is not None
        assert self._fills is not None
        misses: list[Record] = []
        for event in self._cache.engine.poll():
            if event.kind == MISS:
                misses.append(event)
            elif event.kind == FILLED:
                self._fills.filled(event)
            elif event.kind == EVICTED:
                self._evicting_slots = 0
                # Nothing could go: asking again at once would only spin. The next fill says NEED_SPACE.
                self._make_space(may_evict=event.value > 0)
            elif event.kind == NEED_SPACE:
                self._make_space()
        if misses:
            self._fills.miss(misses)

    def _make_space(self, *, may_evict: bool = True) -> None:
        """Eviction ahead of demand; what it freed is of use after a commit only (I4)."""
        assert self._cache is not None
        engine = self._cache.engine
        stats = engine.stats()
        free, quarantined = stats["free"], stats["quarantined"]
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

    async def _commit(self) -> None:
        assert self._cache is not None
        try:
            await self._cache.commit()
        except TierblkError as error:
            if self._commit_failure is None:
                log.error("%s", error)
            self._commit_failure = str(error)
        else:
            self._commit_failure = None
            # What was freed since the last look may not be enough: NEED_SPACE is not said twice.
            self._make_space()

    async def _commit_on_timer(self) -> None:
        assert self._cache is not None
        while True:
            await asyncio.sleep(self._config.cache.commit_interval)
            if self._cache.changed():
                await self._commit()

    # -- what can be asked ---

    async def attach(self, config: Config) -> dict[str, Any]:
        """See control.DaemonApi."""
        self._same_cache(config)
        async with self._attaching:
            if self._stopping.is_set():
                raise DaemonError("the daemon is stopping", "try again when it has")
            name = config.device.name
            if name in self._devices:
                other = self._devices[name]
                raise DaemonError(
                    f"{name} is attached already, as {other.path} by {other.config.path}",
                    "use it, or choose another device.name",
                )
            base = await self._open_base(config)
            try:
                return await self._attach(config, base)
            except BaseException:
                await self._release(base)
                raise

    async def _attach(self, config: Config, base: Base) -> dict[str, Any]:
        assert self._cache is not None
        device = Device(config, base, self._cache.engine, self._executor, stamp_of(self._cache.uuid.bytes))
        if warning := await self._partition_warning(base):
            device.warnings.append(warning)
            log.warning("%s: %s", device.name, warning)
        await device.start(self._on_device_end)
        self._devices[device.name] = device
        log.info("%s is %s: %s", device.name, device.path, base.image.identity.url)
        return device.to_dict()

    def _same_cache(self, config: Config) -> None:
        """Two configs of one directory must agree about it."""
        if different := cache_conflicts(self._config, config):
            raise DaemonError("; ".join(different), f"both use {config.cache.dir}: make them agree")

    async def _open_base(self, config: Config) -> Base:
        """The base of a config: one that is open already, or one from the cache's layers, or a new one. It is
        counted as used by the device to come; `_release` takes that back."""
        assert self._cache is not None
        known = [Identity(*identity) for identity in self._cache.identities_of(config.base.url)]
        source = await open_source(config.base.url, config.remote, known[-1] if known else None)
        try:
            image = RawImage(source)
            identity = image.identity
            layer: Layer = await self._cache.base_layer(identity.url, identity.size_bytes, identity.validator)
        except BaseException:
            await source.aclose()
            raise
        if (base := self._bases.get(layer.layer_id)) is not None:
            base.devices += 1  # before anybody else may run: its last device may be on its way out
            await source.aclose()
            return base
        base = self._bases[layer.layer_id] = Base(layer, image, Fetcher(source, config.remote))
        base.devices += 1
        return base

    async def _partition_warning(self, base: Base) -> str | None:
        """Reads the image's partition table as a user of the device would, so it is cached too."""
        assert self._cache is not None
        length = min(partition.HEAD_BYTES, base.image.size_bytes)

        def read(engine: Engine) -> bytes:
            with local_door(engine, base.layer, queue_depth=4) as door:
                return door.read(0, length)

        try:
            table = partition.parse(await self._run(read, self._cache.engine), base.image.size_bytes)
        except OSError as error:
            raise base.trouble or DeviceError(f"cannot read {base.image.identity.url}: {error}") from None
        return table.warning() if table else None

    def _on_device_end(self, device: Device) -> None:
        """Somebody deleted the device with another tool: clean up behind it, and keep saying so in
        `status`."""
        self._keep(device.stop(force=True))

    async def detach(self, name: str) -> None:
        """See control.DaemonApi."""
        device = self._find(name)
        await device.stop(force=False)
        await self._forget(device)
        log.info("%s is detached", name)

    async def _forget(self, device: Device) -> None:
        if self._devices.get(device.name) is device:  # a detach and a stop may meet
            del self._devices[device.name]
            await self._release(device.base)

    async def _release(self, base: Base) -> None:
        """One device less; closes a base that no device uses. Its blocks stay cached."""
        assert self._fills is not None
        base.devices -= 1
        if base.devices:
            return
        del self._bases[base.layer.layer_id]
        await self._fills.stop(base.layer.layer_id)
        await base.aclose()

    def _find(self, name: str) -> Device:
        if name not in self._devices:
            raise DeviceError(f"no device is called {name}", "`tierblk list` shows those that there are")
        return self._devices[name]

    def devices(self) -> list[dict[str, Any]]:
        return [self._shown(device) for device in self._devices.values()]

    def device(self, name: str) -> dict[str, Any]:
        return self._shown(self._find(name))

    def _shown(self, device: Device) -> dict[str, Any]:
        """A device, with the cache's own trouble when the remote has none."""
        shown = device.to_dict()
        trouble = self._commit_failure or (self._fills.slot_write_failure if self._fills else None)
        if shown["state"] == "ok" and trouble:
            shown["state"], shown["reason"] = "degraded", trouble
        return shown

    def info(self) -> dict[str, Any]:
        """The daemon and its cache directory."""
        cache = self._cache
        return {
            "pid": os.getpid(),
            "started": self._started,
            "cache_dir": str(self._config.cache.dir),
            "config_path": str(self._config.path),
            "cache": cache.stats() if cache else {},
            "fills": self._fills.busy if self._fills else 0,
        }


async def _serve(config: Config, ready_fd: int | None) -> None:
    daemon = Daemon(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.request_stop)
    control: ControlServer | None = None
    try:
        await daemon.start()
        control = ControlServer(daemon, daemon.run_dir)
        await control.start()
        if ready_fd is not None:
            report_ready(ready_fd, control.socket_path)
        await daemon.wait()
    finally:
        if control is not None:
            await control.close()
        await daemon.stop()


def main(config: Config, *, ready_fd: int | None = None) -> int:
    """Serves the config's cache directory until SIGTERM, SIGINT or a request; returns the exit code.

    ready_fd: gets one JSON line when it serves. Raises TierblkError when it cannot."""
    asyncio.run(_serve(config, ready_fd))
    return 0
