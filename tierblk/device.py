"""One /dev/ublkbN: made, served, stopped, in the order that the driver demands (DESIGN 4, lifetime rules).

Control commands block, so each runs in a worker thread; the event loop and the queue serve meanwhile, because
START_DEV may wait for reads (the partition scan of kernels before 7.0) and STOP_DEV does wait for requests.
Before a stop that nothing may hold up the door drains: a process that dies while its own STOP_DEV waits
cannot be killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from errno import EACCES, EBUSY, EMFILE, ENODEV, ENOENT, EOPNOTSUPP, EPERM, ETIMEDOUT
from pathlib import Path
from typing import Any, TypeVar

from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, Engine, UblkDoor, ublk
from tierblk.errors import DeviceError
from tierblk.layer import Base

log = logging.getLogger(__name__)

T = TypeVar("T")

STAMP_MAGIC = 0x7469657262 << 24
"""Upper 40 bits of the opaque word that the driver keeps for a device ("tierb"); below: 24 bits of the
cache's uuid."""

_START_MS = 600_000
_STOP_MS = 60_000
_TRY_STOP_MS = 2_000
_NODE_S = 10.0


def stamp_of(cache_uuid: bytes) -> int:
    """What marks a ublk device as one of this cache directory's."""
    return STAMP_MAGIC | int.from_bytes(cache_uuid[:3], "big")


def driver_error(error: OSError) -> DeviceError:
    """What an error of the driver means to a user."""
    if error.errno in (ENOENT, ENODEV) and not os.path.exists("/dev/ublk-control"):
        return DeviceError(
            "this kernel has no ublk driver loaded: /dev/ublk-control is missing",
            "modprobe ublk_drv; `tierblk doctor` says what this kernel lacks",
        )
    if error.errno in (EACCES, EPERM):
        return DeviceError("no permission to use /dev/ublk-control", "run it as root")
    if error.errno == EMFILE:
        return DeviceError(
            "the devices of one daemon can have 4096 requests in flight together",
            "lower device.queue_depth, or use another cache directory",
        )
    return DeviceError(f"the ublk driver refused: {error.strerror}")


class Device:
    """A device between `start` and `stop`. All methods belong to the event loop."""

    def __init__(self, config: Config, base: Base, engine: Engine, executor: Executor, stamp: int) -> None:
        self.config = config
        self.base = base
        self.name = config.device.name
        self.plane = "copy"
        self.state = "starting"
        self.reason: str | None = None
        self.warnings: list[str] = []
        self.attached = time.time()
        self.dev_id = -1
        self._engine = engine
        self._executor = executor
        self._stamp = stamp
        self._cdev_fd = -1
        self._door: UblkDoor | None = None
        self._last_stats: dict[str, int] = {}
        self._safe_stop = False
        self._ended = asyncio.Event()
        self._stopping = asyncio.Lock()
        self._down = False

    @property
    def path(self) -> str:
        return f"/dev/ublkb{self.dev_id}"

    async def _run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    async def _run_whole(self, function: Callable[..., None]) -> None:
        """As `_run`, for commands that only wait for the driver: also when cancelled it ends before this
        does, so that what it made is known to the clean-up."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    async def start(self, on_end: Callable[[Device], None]) -> None:
        """ADD, SET_PARAMS, fetch, START: when it returns the device can be opened. DeviceError; nothing is
        left then.

        on_end: called when the queue ends without a stop, because somebody else deleted the device."""
        try:
            await self._add()
            await self._serve(on_end)
            await self._start_dev()
            await self._wait_for(self.path, lambda: os.path.exists(self.path))
        except (OSError, DeviceError, asyncio.CancelledError) as error:
            await self._take_down()
            if isinstance(error, OSError):
                raise driver_error(error) from None
            raise
        self.state = "live"

    async def _start_dev(self) -> None:
        """START_DEV waits for every tag to be fetched; a queue that ended will never fetch them."""
        started = asyncio.ensure_future(
            self._run(ublk.start_dev, self.dev_id, pid=os.getpid(), timeout_ms=_START_MS)
        )
        started.add_done_callback(_retrieve)
        ended = asyncio.ensure_future(self._ended.wait())
        await asyncio.wait({started, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not started.done():
            raise DeviceError("the ublk driver took the device's queue back before it was started")
        started.result()

    async def _add(self) -> None:
        granted = await self._run(ublk.features)
        self._safe_stop = bool(granted & ublk.F_SAFE_STOP_DEV)

        def add() -> None:
            info = ublk.add_dev(
                queue_depth=self.config.device.queue_depth,
                max_io_bytes=BLOCK_BYTES,
                flags=granted & ublk.F_NO_AUTO_PART_SCAN,
                stamp=self._stamp,
            )
            self.dev_id = info.dev_id
            if info.max_io_bytes < BLOCK_BYTES:
                raise DeviceError(
                    f"the ublk driver allows requests of {info.max_io_bytes} bytes, 64 KiB are needed"
                )
            size_bytes = self.base.image.size_bytes
            ublk.set_params(self.dev_id, size_bytes=size_bytes, block_bytes=BLOCK_BYTES, read_only=True)

        await self._run_whole(add)

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

        def open_door() -> None:
            self._door = door = UblkDoor(
                self._engine,
                self.base.layer,
                cdev_fd=self._cdev_fd,
                queue_depth=self.config.device.queue_depth,
                dev_id=self.dev_id,
            )
            loop.call_soon_threadsafe(loop.add_reader, door.end_fd, self._on_end, on_end)

        await self._run_whole(open_door)

    def _on_end(self, on_end: Callable[[Device], None]) -> None:
        if self._door is not None:
            asyncio.get_running_loop().remove_reader(self._door.end_fd)
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

    async def stop(self, *, force: bool) -> None:
        """Stop and delete it. Without `force`, DeviceError when it is in use; the device then goes on as
        before."""
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
        """TRY_STOP refuses at once while the device is open. Otherwise it waits for requests that nobody
        waits for any more (read-ahead): after a moment the door drains, which ends them."""
        try:
            await self._run(ublk.try_stop_dev, self.dev_id, timeout_ms=_TRY_STOP_MS)
        except OSError as error:
            if error.errno == EBUSY:
                raise DeviceError(
                    f"{self.name} ({self.path}) is in use",
                    f"unmount it and close what has it open; `fuser -v {self.path}` and `lsblk` show it",
                ) from None
            if error.errno not in (ETIMEDOUT, EOPNOTSUPP):
                raise driver_error(error) from None

    async def _take_down(self) -> None:
        """Drain, STOP, end of the queue, DEL. Every step is tried whatever the one before said."""
        if self._door is not None:
            self._door.drain()
        if self.dev_id >= 0:
            with self._reported("STOP_DEV"):
                await self._run(ublk.stop_dev, self.dev_id, timeout_ms=_STOP_MS)
        if self._door is not None:
            await self._end_door(self._door)
        if self._cdev_fd >= 0:
            os.close(self._cdev_fd)
            self._cdev_fd = -1
        if self.dev_id >= 0:
            with self._reported("DEL_DEV"):
                await self._run(ublk.del_dev, self.dev_id, timeout_ms=_STOP_MS)
        self._down = True
        self.state = "gone" if self.reason else "stopped"

    async def _end_door(self, door: UblkDoor) -> None:
        try:
            async with asyncio.timeout(5):
                await self._ended.wait()
        except TimeoutError:
            door.quit()  # the driver did not take every tag back; the thread leaves when nothing is active
        asyncio.get_running_loop().remove_reader(door.end_fd)
        self._last_stats = door.stats()
        self._door = None
        await self._run(door.close)

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != ENODEV:  # somebody else was faster
                log.error("%s of %s (%s): %s", what, self.name, self.path, error.strerror)

    def to_dict(self) -> dict[str, Any]:
        """The device as `tierblk status --json` shows it."""
        stats = self._door.stats() if self._door is not None else self._last_stats
        counters = self.base.fetcher.counters
        state, reason = self.base.state() if self.state == "live" else (self.state, self.reason)
        return {
            "name": self.name,
            "path": self.path,
            "plane": self.plane,
            "size_bytes": self.base.image.size_bytes,
            "hit_bytes": stats.get("hit_bytes", 0),
            "zero_bytes": stats.get("zero_bytes", 0),
            "miss_bytes": stats.get("miss_bytes", 0),
            "requests": stats.get("requests", 0),
            "hit_requests": stats.get("hit_requests", 0),
            "zero_requests": stats.get("zero_requests", 0),
            "miss_requests": stats.get("miss_requests", 0),
            "errors": stats.get("errors", 0),
            "waiting": stats.get("waiting", 0),
            "enters": stats.get("enters", 0),
            "fetched_bytes": counters.fetched_bytes,
            "remote_requests": counters.requests,
            "remote_retries": counters.retries,
            "remote_errors": counters.errors,
            "cached_bytes": self.base.layer.cached_pages() * 4096,
            "state": state,
            "reason": reason,
            "since": self.base.trouble_since,
            "url": self.base.image.identity.url,
            "validator": self.base.image.identity.validator,
            "config_path": str(self.config.path),
            "queue_depth": self.config.device.queue_depth,
            "read_only": True,
            "attached": self.attached,
            "warnings": self.warnings,
        }


def _retrieve(future: asyncio.Future[None]) -> None:
    """A START_DEV that nobody waits for any more may fail as it likes."""
    if not future.cancelled():
        future.exception()


def reap(stamp: int) -> list[int]:
    """Deletes the devices that a killed daemon of this cache directory left behind; returns their ids.
    Blocks."""
    gone = []
    for node in Path("/dev").glob("ublkc[0-9]*"):
        try:
            info = ublk.dev_info(int(node.name.removeprefix("ublkc")))
            if info.stamp == stamp and info.state == ublk.STATE_DEAD:
                ublk.del_dev(info.dev_id, timeout_ms=_STOP_MS)
                gone.append(info.dev_id)
        except (OSError, ValueError) as error:
            log.info("%s: %s", node, error)
    return gone
