"""Stands in for tierblk.service in processes of the command line's tests: real socket, real lock, no kernel.

A `sitecustomize.py` puts it in place, see `cli_harness.py`. Devices are plain files beside the cache.
FAKE_DAEMON in the environment: "refuse" (cannot start), "crash" (ends without a word), "unclean" (its cache
does not end clean), "interrupted" (by a Ctrl-C while it starts), or nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tierblk import address, sample
from tierblk.claim import Wishes
from tierblk.config import Config
from tierblk.control import ControlServer, report_end
from tierblk.core import Traced, ticks_now
from tierblk.errors import CacheError, DaemonError, DeviceError, RemoteUnavailable, UnknownDevice
from tierblk.extent import Extent
from tierblk.latency import by_tier
from tierblk.ready import Ready
from tierblk.rundir import run_root
from tierblk.snapshot import Remote, Snapshot
from tierblk.tracing import Reader, Readers, Wanted


class FakeCare:
    """Of a cache with one layer, of 16 blocks, all cached."""

    def __init__(self) -> None:
        self.pins: list[list[int]] = []

    def _check(self, layer_id: int) -> None:
        if layer_id != 1:
            raise DeviceError(f"the cache has no layer {layer_id}")

    async def evict(self, layer_id: int, ranges: Sequence[Extent]) -> dict[str, Any]:
        self._check(layer_id)
        gone = sum(extent.clamp(1 << 20).length for extent in ranges)
        return {"layer_id": layer_id, "evicted_bytes": gone, "dirty_bytes": 0, "busy_bytes": 0}

    async def pin(self, layer_id: int, ranges: Sequence[Extent], *, pinned: bool) -> dict[str, Any]:
        self._check(layer_id)
        self.pins = [[extent.offset, extent.length] for extent in ranges] if pinned else []
        return {"layer_id": layer_id, "pins": self.pins}

    def drop(self, layer_id: int, pages: Sequence[tuple[int, int]]) -> dict[str, Any]:
        self._check(layer_id)
        dropped = sum(mask.bit_count() for _, mask in pages)
        return {"layer_id": layer_id, "dropped_pages": dropped, "busy_blocks": []}

    async def collect(self, *, older_s: float, dry_run: bool) -> dict[str, Any]:
        return {"layers": [], "cached_bytes": 0}


class FakeRequests:
    """What a device without a kernel does: the same twelve requests for whoever asks, and then nothing. A
    tick is a microsecond."""

    def trace(self, **wanted: Any) -> FakeTrace:
        start, end = wanted["within"] or (0, 2**63)
        return FakeTrace(
            [
                each
                for each in TRACED
                if wanted["ops"] >> each.op & 1
                and wanted["tiers"] >> each.tier & 1
                and each.took >= wanted["min_ticks"]
                and start <= each.offset_bytes < end
            ]
        )


class FakeTrace:
    """As core.Trace. The first read has lost 7."""

    def __init__(self, records: list[Traced]) -> None:
        self._records, self._lost = records, 7

    def read(self, records_max: int) -> tuple[list[Traced], int]:
        now = ticks_now()
        found = [each._replace(began=now) for each in self._records[:records_max]]
        self._records = self._records[records_max:]
        lost, self._lost = self._lost, 0
        return found, lost

    def close(self) -> None:
        pass


# op, tier, took, offset, length, error
TRACED = [
    Traced(0, took, offset, length, op, tier, 3, error, op == 1, 0)
    for op, tier, took, offset, length, error in (
        *((0, 0, 80 + i, i << 16, 4096, 0) for i in range(6)),
        (0, 2, 21_500, 1 << 30, 65536, 0),
        (0, 2, 3_100_000, 15 << 40, 1536, 5),
        (0, 1, 2, 8192, 4096, 0),
        (1, 4, 150, 4096, 512, 0),
        (2, 5, 1_250, 0, 0, 0),
        (3, 6, 44, 1 << 20, 1 << 30, 0),
    )
]


class FakeDaemon:
    """Keeps dictionaries of devices."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stopping = asyncio.Event()
        self.slow_attach = asyncio.Event()
        self.given_up = asyncio.Event()
        self.slow_detach = asyncio.Event()
        self.may_detach = asyncio.Event()
        self._devices: dict[str, dict[str, Any]] = {}
        self._care = FakeCare()
        self.rounds = 0
        self.started = time.time()
        self.readers: dict[str, Readers] = {}

    async def attach(self, config: Config, wishes: Wishes) -> dict[str, Any]:
        name = config.device.name
        if name in self._devices:
            raise DaemonError(f"{name} is attached already", "use it")
        if "unreachable" in config.url:
            raise RemoteUnavailable(f"{config.url} does not answer", "is it up?")
        if name == "bug":
            raise KeyError("a bug in the daemon")
        if name == "slow":
            self.slow_attach.set()
            try:
                await self.stopping.wait()
            except asyncio.CancelledError:
                self.given_up.set()
                await self.stopping.wait()  # cleaning up may take its time
                raise
        path = config.cache.dir.parent / f"{name}.device"
        path.touch()
        self._devices[name] = {
            "name": name,
            "path": str(path),
            "plane": "copy",
            "size_bytes": 2**31,
            "hit_bytes": 3 * 2**20,
            "miss_bytes": 2**20,
            "zero_bytes": 0,
            "fetched_bytes": 2**20,
            "requests": 70,
            "remote_requests": 4,
            "errors": 0,
            "state": "degraded" if name == "ill" else "ok",
            "reason": "the server\x1b[31m is away" if name == "ill" else None,
            "url": address.shown(config.url),
            "config_path": str(config.path),
            "queues": 2,
            "queue_depth": config.device.queue_depth,
            "hot_memory_bytes": config.device.hot_memory,
            "hit_requests": 60,
            "miss_requests": 10,
            "memory_requests": 15,
            "latencies": {
                "hit": {"requests": 60, "p50_us": 81.25, "p99_us": 640.0, "p99.9_us": 900.0},
                "zero": {"requests": 0, "p50_us": None, "p99_us": None, "p99.9_us": None},
                "miss": {"requests": 10, "p50_us": 21500.0, "p99_us": 1250000.0, "p99.9_us": 1250000.0},
            },
            "warnings": ["the image was cut off"] if name == "cut" else [],
        }
        if config.volume is not None and config.volume.url is not None:
            wished = wishes.take_over or wishes.discard_local or wishes.clone_local
            self._devices[name] |= {
                "volume": "write-back",
                "requests": 130,
                "write_requests": 60,
                "write_back": {
                    "url": config.volume.url,
                    "epoch": 7,
                    "dirty_bytes": 0 if wished else 4096,
                    "dirty_since": time.time() - 60,
                    "put_requests": 3,
                    "put_bytes": 70_000,
                    "fenced": None,
                    "trouble": None,
                },
            }
        return self._devices[name]

    async def detach(self, name: str, *, force: bool = False) -> None:
        if name == "slow":
            self.slow_detach.set()
            await self.may_detach.wait()
        Path(self.device(name)["path"]).unlink()
        if name in self.readers:
            self.readers.pop(name).end("stopping" if self.stopping.is_set() else "detached")
        del self._devices[name]

    async def sync(self, name: str, *, wait: bool) -> dict[str, Any]:
        device = self.device(name)
        if wait and "write_back" in device:
            device["write_back"]["dirty_bytes"] = 0
        return device

    @property
    def care(self) -> Any:
        return self._care

    async def content(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        self.device(name)
        return bytes(offset_bytes + i & 0xFF for i in range(length_bytes))

    def trace(self, name: str, wanted: Wanted) -> Reader:
        self.device(name)
        if name not in self.readers:
            self.readers[name] = Readers(lambda: 1e-6)
            self.readers[name].begin(FakeRequests())
        return self.readers[name].open(wanted)

    async def repin(self, name: str) -> dict[str, Any]:
        return self.device(name)

    def devices(self) -> list[dict[str, Any]]:
        return list(self._devices.values())

    def device(self, name: str) -> dict[str, Any]:
        if name not in self._devices:
            raise UnknownDevice(f"no device is called {name}")
        return self._devices[name]

    def info(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "cache_dir": str(self.config.cache.dir),
            "config_path": str(self.config.path),
            "started": self.started,
            "session_of_keeper": os.getsid(0) == os.getppid(),
            "cwd": os.getcwd(),
            "stdin": os.readlink("/proc/self/fd/0"),
        }

    def top(self) -> dict[str, Any]:
        """Each time a second later, in which every device has read and written 3 MiB in 60 requests."""
        self.rounds += 1
        n, now_s = self.rounds, 1000.0 + self.rounds
        info = self.info() | {
            "cache": {"slots": 256, "free": 100, "dirty_slots": 16, "quarantined": 4, "bad": 0}
        }
        for device in self._devices.values():
            device |= {"hit_bytes": 3 * n * 2**20, "hit_requests": 60 * n}
        counts = {name: by_tier([([0] * 40 + [60 * n], 0)], 1e-9) for name in self._devices}
        remotes = [
            {"kind": "image", "url": d["url"], "state": d["state"], "reason": d["reason"], "fetched_bytes": 0}
            for d in self._devices.values()
        ]
        found = sample.document(info, self.devices(), counts, 1e-9, None, remotes)
        return found | {"monotonic_s": now_s}

    async def snapshot(self) -> Snapshot:
        latencies = {name: by_tier([([0] * 40 + [3], 150)] * 6, 1e-6) for name in self._devices}
        remotes = [
            Remote(number, str(device["url"]), str(device["state"]), {"requests": 4})
            for number, device in enumerate(self.devices(), 1)
        ]
        return Snapshot(self.info(), self.devices(), latencies, remotes)

    def request_stop(self) -> None:
        self.stopping.set()


def run_dir_of(cache_dir: Path) -> Path:
    """Where the fake daemon of a directory listens."""
    return run_root() / hashlib.sha256(os.fsencode(os.path.realpath(cache_dir))).hexdigest()[:32]


async def serve(config: Config, ready: Ready) -> None:
    daemon = FakeDaemon(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, daemon.request_stop)
    control = ControlServer(daemon, run_dir_of(config.cache.dir))
    await control.start()
    ready.serves(control.socket_path)
    await daemon.stopping.wait()
    for name in [device["name"] for device in daemon.devices()]:
        await daemon.detach(name)
    await control.close()
    if os.environ.get("FAKE_DAEMON") == "unclean":
        report_end(control.run_dir, CacheError("the disk takes no writes"))


def main(config: Config, ready: Ready) -> int:
    """As tierblk.service.main."""
    behaviour = os.environ.get("FAKE_DAEMON", "")
    if behaviour == "refuse":
        raise CacheError(f"{config.cache.dir} was made by a newer tierblk", "update tierblk")
    if behaviour == "interrupted":
        raise KeyboardInterrupt
    if behaviour == "crash":
        os._exit(9)
    config.cache.dir.mkdir(exist_ok=True)
    with open(config.cache.dir / "slots", "ab") as slots:
        try:
            fcntl.flock(slots, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"{config.cache.dir} is locked by another daemon") from None
        asyncio.run(serve(config, ready))
    return 0
