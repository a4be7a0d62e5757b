"""What an earlier daemon of the cache left in the driver: which devices to serve again, which to delete.

Whoever asks holds the cache directory's lock, so that daemon has ended, or is about to: its last I/O has
landed (R8). A device that we stamped and that has a record waits for us. One without was never started, or
outlived somebody's failure to delete it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tierblk import address, driver, records
from tierblk import config as configs
from tierblk.core import ublk
from tierblk.device import Device
from tierblk.errors import DeviceError, TierblkError
from tierblk.records import DeviceRecord
from tierblk.remote import Identity

log = logging.getLogger(__name__)


@dataclass
class Found:
    """waiting: devices to take over. unusable: why a device cannot be, by number."""

    waiting: list[DeviceRecord] = field(default_factory=list)
    unusable: dict[int, str] = field(default_factory=dict)


def look(run_dir: Path, stamp: int) -> Found:
    """Finds what is there, and clears away what nobody can use. Blocks; never raises for one bad device."""
    try:
        ours = {info.dev_id: info for info in driver.devices() if info.stamp == stamp}
    except OSError as error:  # no driver, no permission: then there are no devices either, or none to be had
        log.info("%s", driver.driver_error(error))
        return Found()
    known, bad = records.read_all(run_dir)
    found = Found()
    for record in known:
        info = ours.pop(record.dev_id, None)
        if info is None or info.state == ublk.STATE_DEAD:
            records.remove(run_dir, record.dev_id)  # it is gone, or it was killed before it was started
            if info is not None:
                ours[record.dev_id] = info
        else:
            found.waiting.append(record)
    for dev_id, why in bad.items():
        if ours.pop(dev_id, None) is None:
            records.remove(run_dir, dev_id)
        else:
            found.unusable[dev_id] = why
    for info in ours.values():
        _clear_away(info)
    return found


def _clear_away(info: ublk.DeviceInfo) -> None:
    if driver.has_server(info) and info.server_pid == os.getpid():
        return
    try:
        driver.take_away(info.dev_id)
        log.warning("deleted ublk device %d, left behind by a daemon that was killed", info.dev_id)
    except (OSError, DeviceError) as error:
        log.error("ublk device %d could not be deleted: %s", info.dev_id, error)


class TakeOver:
    """One device on its way from an earlier daemon to this one. state: "recovering", or "failed" and then
    reason says why; the device then waits, and so does whoever reads it."""

    def __init__(self, record: DeviceRecord, serve: Callable[[DeviceRecord], Awaitable[Device]]) -> None:
        """serve: makes the device live again, or raises TierblkError."""
        self.record = record
        self.state = "recovering"
        self.reason: str | None = None
        self._serve = serve
        self._task: asyncio.Task[Device | None] | None = None

    def begin(self) -> asyncio.Task[Device | None]:
        """Try, or try again, or go on with the try that runs. The task gives the device, or None."""
        if self._task is None or self._task.done():
            self.state, self.reason = "recovering", None
            self._task = asyncio.create_task(self._try(), name=f"take over {self.record.name}")
        return self._task

    async def _try(self) -> Device | None:
        record = self.record
        try:
            device = await self._serve(record)
        except TierblkError as error:
            self._failed(str(error))
        except Exception as error:
            log.exception("%s (%s) could not be taken over", record.name, record.path)
            self._failed(f"internal error: {error!r:.200}")
        else:
            what = address.shown(record.url) if record.url else "a volume"
            log.info("%s (%s) is taken over: %s", record.name, record.path, what)
            return device
        return None

    def _failed(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        log.error("%s (%s) could not be taken over and waits: %s", self.record.name, self.record.path, reason)

    async def end(self) -> None:
        """No try runs when it returns; the device is as it was."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.state = "failed"
        self.reason = self.reason or "the daemon ended before it was taken over"

    def is_gone(self, run_dir: Path) -> bool:
        """Whether somebody deleted the device meanwhile; its record goes then too. Blocks."""
        try:
            gone = driver.info_of(self.record.dev_id) is None
        except OSError:
            return False
        if gone:
            log.warning("%s (%s) was deleted by somebody else", self.record.name, self.record.path)
            records.remove(run_dir, self.record.dev_id)
        return gone

    async def take_away(self, run_dir: Path, executor: Executor) -> None:
        """Stop and delete the device; who waits for it gets EIO. DeviceError."""
        await self.end()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(executor, partial(driver.take_away, self.record.dev_id))
        except OSError as error:
            raise driver.driver_error(error) from None
        await loop.run_in_executor(executor, records.remove, run_dir, self.record.dev_id)

    def to_dict(self) -> dict[str, Any]:
        """As `Device.to_dict`, with what is known."""
        return records.waiting_device(self.record, self.state, self.reason)


def parsed(record: DeviceRecord) -> tuple[configs.Config, Identity]:
    """A record's config and pinned version. ConfigError: another version of tierblk wrote the config."""
    config = configs.parse(record.config, Path(record.config_path))
    return config, Identity(record.url, record.size_bytes, record.validator)


def unusable(dev_id: int, why: str) -> TakeOver:
    """A device whose record cannot be used: it waits, and can be taken away, as "ublk" and its number."""

    async def refuse(record: DeviceRecord) -> Device:
        raise DeviceError(why)

    record = DeviceRecord(
        dev_id=dev_id,
        name=f"ublk{dev_id}",
        config_path="",
        config={},
        url="",
        size_bytes=0,
        validator="",
        stamp=0,
        flags=0,
        attached=0.0,
    )
    return TakeOver(record, refuse)
