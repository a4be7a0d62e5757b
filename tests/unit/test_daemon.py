"""A daemon on a real cache directory, on a machine whose driver is a list of none."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from bench.top import sample
from tests.cache_rig import make_engine, run_directory, settings
from tierblk import config as configs
from tierblk import driver, service
from tierblk.cache import Cache
from tierblk.claim import Wishes
from tierblk.config import Config
from tierblk.control import ControlServer
from tierblk.daemon import Daemon
from tierblk.device import Device
from tierblk.errors import CacheError, DaemonError
from tierblk.ready import Ready
from tierblk.rundir import END_NAME, RUN_DIR_VARIABLE
from tierblk.tracing import Readers

LIMIT_S = 20.0


class StubDevice:
    """A device that is in use, as far as a stop looks at it."""

    name, path, state, outlives_daemon = "d", "/dev/ublkb0", "live", True

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.base = None
        self.traces = Readers(lambda: 1e-9)

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
        await service._serve(config, Ready(None))


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


async def test_an_attach_that_is_given_up_leaves_nothing(config: Config) -> None:
    """Its server never answers; whoever asked for it has gone."""
    daemon = Daemon(config)
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()  # until the other side gives up
        writer.close()

    async with asyncio.timeout(LIMIT_S), await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        await daemon.start()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        document = config.to_document()
        document["base"]["url"] = url
        attach = asyncio.create_task(daemon.attach(configs.parse(document, config.path)))
        await asked.wait()
        attach.cancel()
        await asyncio.gather(attach, return_exceptions=True)
        assert attach.cancelled()
        assert (daemon._calls, daemon.devices()) == (set(), [])
        await daemon.stop()


async def test_what_cleans_up_behind_an_attach_is_not_cancelled_by_a_stop(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client that gave it up stops the daemon, if it was started for it."""
    begun, given_up, may_end, clean = (asyncio.Event() for _ in range(4))

    async def attach(self: Daemon, config: Config, wishes: Wishes) -> dict[str, Any]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()
            await may_end.wait()
            clean.set()
        return {}

    monkeypatch.setattr(Daemon, "_attach", attach)
    daemon = Daemon(config)
    async with asyncio.timeout(LIMIT_S):
        await daemon.start()
        client = asyncio.create_task(daemon.attach(config))
        await begun.wait()
        client.cancel()
        await given_up.wait()
        stop = asyncio.create_task(daemon.stop())
        await daemon.wait()  # it has come to the attach
        may_end.set()
        await stop
        assert clean.is_set()
        await asyncio.gather(client, return_exceptions=True)


async def test_a_start_that_asks_a_silent_server_ends_when_it_is_stopped(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the attach that starts it; there is no directory yet, and none is made."""
    asking = asyncio.Event()

    async def preflight(self: Daemon) -> None:
        asking.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Daemon, "_preflight", preflight)
    document = config.to_document()
    document["cache"]["dir"] += ".none"
    daemon = Daemon(configs.parse(document, config.path))
    async with asyncio.timeout(LIMIT_S):
        start = asyncio.create_task(daemon.start())
        await asking.wait()
        daemon.request_stop(hand_over=True)
        with pytest.raises(DaemonError, match="stopped before it served"):
            await start
        await daemon.stop()
    assert not Path(document["cache"]["dir"]).exists()


async def test_all_counters_at_one_moment(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The make-believe host of bench/top.py says nothing that a real one does not."""
    said: dict[str, Any] = {}

    async def wait(self: Daemon) -> None:
        said.update(json.loads(json.dumps(self.top())))
        self.request_stop()

    monkeypatch.setattr(Daemon, "wait", wait)
    await serve(config)
    example = sample(0, 1.0)
    assert set(said) == set(example)
    assert set(example["daemon"]) <= set(said["daemon"])
    assert set(example["cache"]) <= set(said["cache"])
    assert said["cache"]["slots"] == said["cache"]["free"] > 0
    assert (said["devices"], said["remotes"], said["cache"]["throttle"]) == ([], [], None)


async def test_a_port_for_metrics_that_is_taken_holds_nobody_up(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []

    async def wait(self: Daemon) -> None:
        told.append(self.info()["warnings"][:])
        self.request_stop()

    monkeypatch.setattr(Daemon, "wait", wait)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        document = {**config.to_document(), "daemon": {"metrics": address}}
        await serve(configs.parse(document, config.path))
    ((warning,),) = told
    assert warning.startswith(f"no metrics at daemon.metrics = {address}: ")
    await serve(configs.parse(document, config.path))
    assert told[1] == []
