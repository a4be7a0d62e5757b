"""A daemon on a real cache directory, on a machine whose driver is a list of none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.cache_rig import make_engine, run_directory, settings
from tierblk import config as configs
from tierblk import daemon as daemons
from tierblk import driver
from tierblk.cache import Cache
from tierblk.config import Config
from tierblk.control import ControlServer
from tierblk.daemon import Daemon
from tierblk.device import Device
from tierblk.errors import CacheError, DaemonError
from tierblk.ready import Ready
from tierblk.rundir import END_NAME, RUN_DIR_VARIABLE

LIMIT_S = 20.0


class StubDevice:
    """A device that is in use, as far as a stop looks at it."""

    name, path, state, outlives_daemon = "d", "/dev/ublkb0", "live", True

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.base = None

    async def hand_over(self) -> None:
        self.ends.append("handed over")

    async def stop(self, *, force: bool) -> None:
        self.ends.append("taken away")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with run_directory(tmp_path) as folder:
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
        monkeypatch.setattr(driver, "devices", list)
        yield folder


@pytest.fixture
async def config(tmp_path: Path, run_dir: Path) -> Config:
    """Of a cache directory that was made before."""
    directory = tmp_path / "cache"
    cache = await asyncio.to_thread(Cache.open, settings(directory), run_dir, make_engine)
    await cache.close()
    document = {
        "device": {"name": "d"},
        "base": {"url": "http://127.0.0.1:9/x"},
        "cache": {"dir": str(directory), "size": "16MiB"},
    }
    return configs.parse(document, tmp_path / "d.toml")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StubDevice:
    """One that every daemon has taken over when it has started."""
    stub, start = StubDevice(), Daemon.start

    async def started(self: Daemon) -> None:
        await start(self)
        self._devices[stub.name] = cast(Device, stub)

    async def forget(self: Daemon, device: Any) -> None:
        del self._devices[device.name]

    monkeypatch.setattr(Daemon, "start", started)
    monkeypatch.setattr(Daemon, "_forget", forget)
    return stub


async def serve(config: Config) -> None:
    async with asyncio.timeout(LIMIT_S):
        await daemons._serve(config, Ready(None))


async def test_a_daemon_that_cannot_serve_leaves_the_devices_that_it_took_over(
    config: Config, device: StubDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when RUN is full and daemon.json cannot be written."""

    def full(self: ControlServer) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ControlServer, "_write_info", full)
    with pytest.raises(DaemonError, match="No space left on device"):
        await serve(config)
    assert device.ends == ["handed over"]


async def test_a_stop_that_was_asked_for_takes_them_away(
    config: Config, device: StubDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait(self: Daemon) -> None:
        self.request_stop()

    monkeypatch.setattr(Daemon, "wait", wait)
    await serve(config)
    assert device.ends == ["taken away"]


@pytest.mark.parametrize("hand_over", [False, True])
async def test_a_stop_whose_last_commit_fails_is_a_stop_all_the_same(
    config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, hand_over: bool
) -> None:
    """Else the keeper or a service manager would start again what was stopped."""

    async def wait(self: Daemon) -> None:
        self.request_stop(hand_over=hand_over)

    async def commit(self: Cache) -> None:
        raise CacheError("the disk takes no writes")

    monkeypatch.setattr(Daemon, "wait", wait)
    with monkeypatch.context() as ill:
        ill.setattr(Cache, "commit", commit)
        await serve(config)
    (left,) = run_dir.glob(f"*/{END_NAME}")
    assert json.loads(left.read_text()) == CacheError("the disk takes no writes").to_dict()
    await serve(config)
    assert not left.exists(), "it is about the end before"
