"""What a daemon shows of itself and of its devices, to whoever asks."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from tierblk import sample
from tierblk.cache import Cache
from tierblk.config import Config
from tierblk.device import Device, Home
from tierblk.errors import DeviceError, UnknownDevice
from tierblk.fill import Fills
from tierblk.snapshot import Snapshot
from tierblk.stacks import Stacks
from tierblk.takeover import TakeOver
from tierblk.upkeep import Upkeep
from tierblk.volumes import far_of


class Seen:
    """The parts of a daemon that can be seen; daemon.py makes them. See control.DaemonApi for the methods."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._cache: Cache | None = None
        self._fills: Fills | None = None
        self._stacks: Stacks | None = None
        self._home: Home | None = None
        self._upkeep: Upkeep | None = None
        self._devices: dict[str, Device] = {}
        self._takeovers: dict[str, TakeOver] = {}
        self._started = time.time()
        self._tick_s = 0.0
        self.warnings: list[str] = []  # of the daemon itself, for all who ask

    def _find(self, name: str) -> Device:
        if name in self._takeovers:
            waiting = self._takeovers[name]
            raise DeviceError(f"{name} ({waiting.record.path}) is {waiting.state}: {waiting.reason}")
        if name not in self._devices:
            raise UnknownDevice(f"no device is called {name}", "`tierblk list` shows those that there are")
        return self._devices[name]

    def devices(self) -> list[dict[str, Any]]:
        """See control.DaemonApi."""
        shown = [self._shown(device) for device in self._devices.values()]
        shown += [waiting.to_dict() for waiting in self._takeovers.values()]
        return sorted(shown, key=lambda device: float(device["attached"]))

    def device(self, name: str) -> dict[str, Any]:
        """See control.DaemonApi."""
        if name in self._takeovers:
            return self._takeovers[name].to_dict()
        return self._shown(self._find(name))

    def _shown(self, device: Device) -> dict[str, Any]:
        """A device, with the cache's own trouble when the remote has none."""
        shown = device.to_dict()
        trouble = self._upkeep.trouble if self._upkeep else None
        if self._stacks is not None and (far := far_of(device.stack)) is not None:
            shown["write_back"] = self._stacks.volumes.shown(far)
            if far.standing.fenced:
                shown["state"], shown["reason"], shown["read_only"] = "fenced", far.standing.fenced, True
        if shown["state"] == "ok" and trouble:
            shown["state"], shown["reason"] = "degraded", trouble
        shown["warnings"] = [*shown["warnings"], *self.warnings]
        return shown

    def top(self) -> dict[str, Any]:
        """See control.DaemonApi."""
        tick_s = self._home.engine.tick_s() if self._home else 0.0
        latencies = {name: device.latencies(tick_s) for name, device in self._devices.items()}
        throttle = self._upkeep.throttle if self._upkeep else None
        remotes = sample.remotes(self._stacks) if self._stacks else []
        return sample.document(self.info(), self.devices(), latencies, tick_s, throttle, remotes)

    async def snapshot(self) -> Snapshot:
        """See control.DaemonApi."""
        assert self._cache is not None
        assert self._stacks is not None
        # Measured once: counts must never move to another bucket.
        self._tick_s = self._tick_s or self._cache.engine.tick_s()
        devices, latencies = [waiting.to_dict() for waiting in self._takeovers.values()], {}
        for device in list(self._devices.values()):
            devices.append(self._shown(device))
            latencies[device.name] = device.latencies(self._tick_s)
            await asyncio.sleep(0)  # misses are served between devices
        return Snapshot(self.info(), devices, latencies, self._stacks.remotes())

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
            "slot_write_failure": self._fills.slot_write_failure if self._fills else None,
            "throttle": self._upkeep.throttle if self._upkeep else None,
            "warnings": self.warnings,
        }
