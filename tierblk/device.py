"""One /dev/ublkbN: made or taken over, served, handed over or stopped, in the order that the driver demands
(DESIGN 4, lifetime rules).

Control commands block, so each runs in a worker thread; the event loop and the queue serve meanwhile, because
START_DEV may wait for reads (the partition scan of kernels before 7.0) and STOP_DEV does wait for requests.

A process that dies while a stop of its own waits for its requests cannot be killed: the kernel ends it only
after the stop, the stop waits for requests, and those are given back only when the process has ended. Hence:

- TRY_STOP, which may come to wait for a read-ahead that waits for the network, is sent by a process of its
  own (driver.send_try_stop). If the daemon dies meanwhile, its requests go back and the stop ends; if that
  process dies, the daemon goes on serving, and the drain that follows ends what the stop waits for.
- STOP_DEV is sent by the daemon, but only when the door has drained: then no request waits for Python or the
  network, and the stop waits for reads of the SSD at most."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from errno import EBUSY, EEXIST, ENODEV
from pathlib import Path
from typing import Any, TypeVar

from tierblk import records, values
from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Engine, UblkDoor, ublk
from tierblk.counts import SHOWN_STATS
from tierblk.driver import STOP_MS, driver_error, send_try_stop
from tierblk.errors import DeviceError
from tierblk.latency import Latencies, by_tier
from tierblk.layer import Stack
from tierblk.planes import MEMORY_ALIGN_BYTES, cpus_of, flags_wanted, plane_of, queues_wanted
from tierblk.records import DeviceRecord
from tierblk.tracing import Readers

log = logging.getLogger(__name__)

T = TypeVar("T")

_START_MS = 600_000
_TRY_STOP_S = 2.0
_NODE_S = 10.0
_RELEASE_S = 30.0
_ID_S = 2.0


@dataclass(frozen=True)
class Home:
    """What all devices of a daemon have in common. stamp: marks them in the driver; run_dir: has their
    records."""

    engine: Engine
    executor: Executor
    stamp: int
    run_dir: Path


class Device:
    """A device from `start` or `recover` to `stop` or `hand_over`. All methods belong to the event loop."""

    def __init__(self, config: Config, stack: Stack, home: Home, record: DeviceRecord | None = None) -> None:
        """record: of the device that is there already, for `recover`."""
        self.config = config
        self.stack = stack
        self.name = config.device.name
        self.plane = plane_of(record.flags if record else 0)
        self.state = "starting"
        self.reason: str | None = None
        self.warnings: list[str] = []
        self.attached = record.attached if record else time.time()
        self.recovered: float | None = None
        self.dev_id = record.dev_id if record else -1
        self.flags = record.flags if record else 0
        self._queue_depth = config.device.queue_depth
        self._queues = 1
        self._home = home
        self._cdev_fd = -1
        self._door: UblkDoor | None = None
        self._last_stats: dict[str, int] = {}
        self._last_latencies: list[tuple[list[int], int]] = []
        self.traces = Readers(home.engine.tick_s)
        self._safe_stop = False
        self._serving: set[int] = set()  # of each queue that has not ended, the descriptor that says so
        self._one_ended, self._ended = asyncio.Event(), asyncio.Event()
        self._stopping = asyncio.Lock()
        self._down = False

    @property
    def path(self) -> str:
        return f"/dev/ublkb{self.dev_id}"

    @property
    def outlives_daemon(self) -> bool:
        """Whether the driver keeps it, and its requests, until the next daemon comes."""
        return self.flags & ublk.F_RECOVERY == ublk.F_RECOVERY

    async def _run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._home.executor, lambda: function(*args, **kwargs))

    async def _run_whole(self, function: Callable[..., None]) -> None:
        """As `_run`, for commands that only wait for the driver: also when cancelled it ends before this
        does, so that what it made is known to the clean-up."""
        future = asyncio.get_running_loop().run_in_executor(self._home.executor, function)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            future.exception()
            raise

    # -- to live ---

    async def start(self, on_end: Callable[[Device], None], *, dev_id: int | None = None) -> None:
        """ADD, SET_PARAMS, record, fetch, START: when it returns the device can be opened. DeviceError;
        nothing is left then.

        on_end: called when the queue ends without a stop, because somebody else deleted the device. dev_id:
        the number to have, if it gets free in time."""
        try:
            await self._add(dev_id)
            await self._serve(on_end)
            await self._start_dev()
            await self._wait_for(self.path, lambda: os.path.exists(self.path))
        except (OSError, DeviceError, asyncio.CancelledError) as error:
            await self._take_down()
            if isinstance(error, OSError):
                raise driver_error(error) from None
            raise
        self.state = "live"

    async def recover(self, on_end: Callable[[Device], None]) -> None:
        """Serve the device that an earlier daemon left: START_USER_RECOVERY, fetch, END_USER_RECOVERY. Its
        requests, also those that the earlier daemon had begun, come again. DeviceError: it waits on."""
        self.state = "recovering"
        try:
            await self._begin_recovery()
            await self._serve(on_end)
            pid = os.getpid()
            await self._run_whole(lambda: ublk.end_user_recovery(self.dev_id, pid=pid, timeout_ms=STOP_MS))
        except (OSError, DeviceError, asyncio.CancelledError) as error:
            await self._let_go()
            if isinstance(error, OSError):
                raise driver_error(error) from None
            raise
        self.state, self.recovered = "live", time.time()

    async def _begin_recovery(self) -> None:
        """Until the process that had the device has let go of it, which outlasts its end a little."""
        self._safe_stop = bool(await self._run(ublk.features) & ublk.F_SAFE_STOP_DEV)
        info = await self._run(ublk.dev_info, self.dev_id)
        self._queues, self._queue_depth, self.flags = info.queues, info.queue_depth, info.flags
        self.plane = plane_of(info.flags)
        deadline = time.monotonic() + _RELEASE_S
        while True:
            try:
                return await self._run_whole(lambda: ublk.start_user_recovery(self.dev_id))
            except OSError as error:
                if error.errno != EBUSY:
                    raise
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"{self.path} is still held by the process that served it",
                    f"`fuser -v /dev/ublkc{self.dev_id}` shows it; then attach it again",
                )
            await asyncio.sleep(0.01)

    async def _start_dev(self) -> None:
        """START_DEV waits for every tag to be fetched; a queue that ended will never fetch them."""
        started = asyncio.ensure_future(
            self._run(ublk.start_dev, self.dev_id, pid=os.getpid(), timeout_ms=_START_MS)
        )
        started.add_done_callback(_retrieve)
        ended = asyncio.ensure_future(self._one_ended.wait())
        await asyncio.wait({started, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not started.done():
            raise DeviceError("the ublk driver took a queue of the device back before it was started")
        started.result()

    async def _add(self, wanted_id: int | None) -> None:
        granted = await self._run(ublk.features)
        self._safe_stop = bool(granted & ublk.F_SAFE_STOP_DEV)
        flags = flags_wanted(self.config.device, granted)

        def add() -> None:
            info = self._add_dev(queues_wanted(self.config.device), flags, wanted_id)
            self.dev_id, self.flags = info.dev_id, info.flags
            self._queues, self.plane = info.queues, plane_of(info.flags)
            if self.config.device.plane not in ("auto", self.plane):
                raise DeviceError(
                    f"this kernel's ublk has no plane {self.config.device.plane}",
                    'set device.plane = "auto"; zero-copy needs Linux 6.16 or later',
                )
            if info.max_io_bytes < BLOCK_BYTES:
                raise DeviceError(
                    f"the ublk driver allows requests of {info.max_io_bytes} bytes, 64 KiB are needed"
                )
            ublk.set_params(
                self.dev_id,
                size_bytes=self.stack.size_bytes,
                block_bytes=BLOCK_BYTES,
                read_only=self.stack.volume is None,
                memory_align_bytes=MEMORY_ALIGN_BYTES if self.plane == "zero-copy" else None,
            )
            self._write_record()

        await self._run_whole(add)
        if self.config.device.recovery and not self.outlives_daemon:
            self.warnings.append("this kernel's ublk cannot keep a device when its daemon ends")

    def _add_dev(self, queues: int, flags: int, wanted_id: int | None) -> ublk.DeviceInfo:
        """Blocks. A number that was just deleted is free only when the last file of the old device is."""
        deadline = time.monotonic() + _ID_S
        while True:
            try:
                return ublk.add_dev(
                    queues=queues,
                    queue_depth=self._queue_depth,
                    max_io_bytes=BLOCK_BYTES,
                    flags=flags,
                    stamp=self._home.stamp,
                    dev_id=wanted_id,
                )
            except OSError as error:
                if error.errno != EEXIST or wanted_id is None:
                    raise
            if time.monotonic() > deadline:
                wanted_id = None
            time.sleep(0.01)

    def _write_record(self) -> None:
        """Before START_DEV, so that there is no device that could be open and have none. Blocks."""
        if not self.outlives_daemon:
            return
        size_bytes, identity = self.stack.size_bytes, self.stack.identity
        record = DeviceRecord(
            dev_id=self.dev_id,
            name=self.name,
            config_path=str(self.config.path),
            config=self.config.to_document(),
            url=identity.url if identity else "",
            size_bytes=identity.size_bytes if identity else size_bytes,
            validator=identity.validator if identity else "",
            volume_size_bytes=size_bytes if self.stack.volume else 0,
            stamp=self._home.stamp,
            flags=self.flags,
            attached=self.attached,
        )
        try:
            records.write(self._home.run_dir, record)
        except OSError as error:
            raise DeviceError(
                f"cannot write the device's record into {self._home.run_dir}: {error.strerror}"
            ) from None

    async def _serve(self, on_end: Callable[[Device], None]) -> None:
        char_path = f"/dev/ublkc{self.dev_id}"
        # O_NONBLOCK: io_uring then moves data in place instead of in a worker thread. Never inherited.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK

        def opened() -> bool:
            try:
                self._cdev_fd = os.open(char_path, flags)
            except (FileNotFoundError, PermissionError):  # devtmpfs and udev are a moment behind the driver
                return False
            return True

        await self._wait_for(char_path, opened)
        loop = asyncio.get_running_loop()
        stack = self.stack

        def open_door() -> None:
            self._door = door = UblkDoor(
                self._home.engine,
                stack.base.layer if stack.base else None,
                volume=stack.volume.layer if stack.volume else None,
                size_bytes=stack.size_bytes,
                cdev_fd=self._cdev_fd,
                dev_id=self.dev_id,
                queue_depth=self._queue_depth,
                cpus=cpus_of(self.dev_id, self._queues),
                zero_copy=self.plane == "zero-copy",
                hot_bytes=self.config.device.hot_memory,
            )
            self._serving = set(door.end_fds)
            for end_fd in door.end_fds:
                loop.call_soon_threadsafe(loop.add_reader, end_fd, self._on_end, end_fd, on_end)

        await self._run_whole(open_door)
        assert self._door is not None
        # Both before the first request comes.
        self._door.set_patience(self.config.device.on_outage)
        self.traces.begin(self._door)
        for layer in stack.filled:
            layer.patiences[self.name] = self.config.device.on_outage

    def _on_end(self, end_fd: int, on_end: Callable[[Device], None]) -> None:
        """One of the queues has ended; the others follow at once."""
        asyncio.get_running_loop().remove_reader(end_fd)
        self._serving.discard(end_fd)
        self._one_ended.set()
        if not self._serving:
            self._ended.set()
        if self.state == "live":
            self.state, self.reason = "gone", "the device was deleted by somebody else"
            log.error("%s (%s): %s", self.name, self.path, self.reason)
            on_end(self)

    async def _wait_for(self, what: str, there: Callable[[], bool]) -> None:
        """Device nodes come from the kernel's devtmpfs with no event that a process without udev could wait
        for."""
        deadline = time.monotonic() + _NODE_S
        while not there():
            if time.monotonic() > deadline:
                raise DeviceError(f"{what} did not appear within {_NODE_S:.0f} s", "is /dev a devtmpfs?")
            await asyncio.sleep(0.005)

    # -- to end ---

    async def stop(self, *, force: bool) -> None:
        """Stop and delete it. Without `force`, DeviceError when it is in use; the device then goes on as
        before. With it, whoever waits gets EIO."""
        async with self._stopping:
            if self._down:
                return
            before, self.state = self.state, "stopping"
            if before == "live" and not force and self._safe_stop:
                try:
                    await self._try_stop()
                except DeviceError:
                    self.state = before
                    raise
            await self._take_down()

    async def _try_stop(self) -> None:
        """TRY_STOP refuses at once while the device is open. Otherwise it may wait for requests that nobody
        waits for any more (read-ahead): after a moment the door drains, which ends them."""
        try:
            process = await self._run(send_try_stop, self.dev_id)
        except OSError as error:
            raise DeviceError(f"cannot ask whether {self.path} is in use: {error.strerror}") from None
        try:
            code = await self._run(process.wait, _TRY_STOP_S)
        except subprocess.TimeoutExpired:
            assert self._door is not None
            self._door.drain()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await self._run(process.wait, STOP_MS / 1000)
            return  # whatever it says now: those who read have got their errors
        if code == EBUSY:
            raise DeviceError(
                f"{self.name} ({self.path}) is in use",
                f"unmount it and close what has it open; `fuser -v {self.path}` and `lsblk` show it",
            )

    async def _take_down(self) -> None:
        """Drain, STOP, end of the queue, DEL. Every step is tried whatever the one before said."""
        if self._door is not None:
            self._door.drain()
        if self.dev_id >= 0:
            with self._reported("STOP_DEV"):
                await self._run(ublk.stop_dev, self.dev_id, timeout_ms=STOP_MS)
        await self._end_door()
        if self.dev_id >= 0:
            with self._reported("DEL_DEV"):
                await self._run(ublk.del_dev, self.dev_id, timeout_ms=STOP_MS)
            await self._run(records.remove, self._home.run_dir, self.dev_id)
        self._down = True
        self.state = "gone" if self.reason else "stopped"

    async def hand_over(self) -> None:
        """Leave the device to the next daemon: it stays, and whoever reads it waits. Only for one that
        `outlives_daemon`."""
        async with self._stopping:
            if self._down:
                return
            self.state = "handed over"
            await self._let_go()
            self._down = True

    async def _let_go(self) -> None:
        if self._door is not None:
            self._door.leave()
        await self._end_door()

    async def _end_door(self) -> None:
        """The queue's end, and with the last file the driver knows that nobody serves."""
        if (door := self._door) is not None:
            try:
                async with asyncio.timeout(5):
                    await self._ended.wait()
            except TimeoutError:
                door.quit()  # the driver did not take every tag back; it leaves when nothing is active
            for end_fd in self._serving:
                asyncio.get_running_loop().remove_reader(end_fd)
            self.traces.end("detached")
            self._last_stats, self._last_latencies = door.stats(), door.latencies()
            self._door = None
            await self._run(door.close)
        if self._cdev_fd >= 0:
            os.close(self._cdev_fd)
            self._cdev_fd = -1

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != ENODEV:  # somebody else was faster
                log.error("%s of %s (%s): %s", what, self.name, self.path, error.strerror)

    # -- to be seen ---

    def latencies(self, tick_s: float) -> dict[str, Latencies]:
        """By tier, in ticks of that length."""
        return by_tier(self._door.latencies() if self._door else self._last_latencies, tick_s)

    def to_dict(self) -> dict[str, Any]:
        """The device as `tierblk status --json` shows it."""
        door, tick_s = self._door, self._home.engine.tick_s()
        stats = door.stats() if door is not None else self._last_stats
        base, volume, identity = self.stack.base, self.stack.volume, self.stack.identity
        counters, health = self.stack.counters, self.stack.health()
        state, reason = self.state, self.reason
        if state == "live":
            state, reason = health["state"], health["reason"]
        return {
            "name": self.name,
            "path": self.path,
            "plane": self.plane,
            "size_bytes": self.stack.size_bytes,
            **{key: stats.get(key, 0) for key in SHOWN_STATS},
            "latencies": {tier: found.to_dict() for tier, found in self.latencies(tick_s).items()},
            "fetched_bytes": counters.fetched_bytes,
            "remote_requests": counters.requests,
            "remote_retries": counters.retries,
            "remote_errors": counters.errors,
            "remote_waiting": health["waiting"],
            "cached_bytes": base.layer.cached_pages() * PAGE_BYTES if base else 0,
            "volume": volume.mode if volume else None,
            "volume_bytes": volume.layer.cached_pages() * PAGE_BYTES if volume else 0,
            "state": state,
            "reason": reason,
            "since": health["since"] if self.state == "live" else None,
            "next_try_s": health["next_try_s"],
            "url": identity.shown if identity else None,
            "validator": identity.validator if identity else None,
            "config_path": str(self.config.path),
            "queues": self._queues,
            "queue_depth": self._queue_depth,
            "hot_memory_bytes": self.config.device.hot_memory,
            "on_outage": values.show_patience(self.config.device.on_outage),
            "recovery": self.outlives_daemon,
            "read_only": volume is None,
            "attached": self.attached,
            "recovered": self.recovered,
            "warnings": self.warnings,
        }


def _retrieve(future: asyncio.Future[None]) -> None:
    """A START_DEV that nobody waits for any more may fail as it likes."""
    if not future.cancelled():
        future.exception()
