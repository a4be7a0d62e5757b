"""The control interface of a real daemon whose devices live without a driver: it keeps its description, and
tells nobody a secret."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector
from pydantic import TypeAdapter

from tests.cache_rig import run_directory
from tests.faults import FaultServer
from tests.integration import model_az
from tests.integration.model_az import AzModel
from tests.tries import tried
from tierblk import cli, driver, messages
from tierblk import config as configs
from tierblk.claim import Wishes
from tierblk.cli.serve import begin_log
from tierblk.control import OPERATIONS, ControlServer
from tierblk.core import ublk
from tierblk.daemon import Daemon
from tierblk.device import Device
from tierblk.rundir import RUN_DIR_VARIABLE, socket_address

IMAGE = random.Random(1).randbytes(1 << 20)
LIMIT_S = 40.0
SECRET = "s3cr3t"
"""Begins every secret."""


# Random bodies are tried on the stand-in of tests/unit/test_openapi.py, which sees no more of them.
OF_A_DAEMON = """
[parameters]
"path.name" = "disk"
[checks]
use_after_free.enabled = false # the device that was deleted is there again
[phases]
fuzzing.enabled = false
"""


@dataclass
class World:
    """A daemon that serves, and a folder for everything."""

    folder: Path
    control: ControlServer
    daemon: Daemon

    def document(self, name: str = "disk", **tables: Any) -> dict[str, Any]:
        return {
            "device": {"name": name},
            "base": {"url": f"file://{self.folder}/image"},
            "cache": {"dir": str(self.folder / "cache"), "size": "17MiB"},
            **tables,
        }

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        async with (
            ClientSession(connector=UnixConnector(str(self.control.socket_path))) as session,
            session.request(method, f"http://x{path}", json=body) as answer,
        ):
            return answer.status, await answer.text(errors="replace")

    async def attach(self, document: object) -> tuple[int, str]:
        return await self.ask("POST", "/v1/devices", {"config_path": "/etc/x.toml", "config": document})


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async def start(device: Device, on_end: Callable[[Device], None], *, dev_id: int | None = None) -> None:
        device.state, device.flags, device.dev_id = "live", ublk.F_RECOVERY, 0
        device._write_record()

    monkeypatch.setattr(ublk, "features", lambda: 0)
    monkeypatch.setattr(driver, "devices", list)
    for command in ("stop_dev", "del_dev"):
        monkeypatch.setattr(ublk, command, lambda dev_id, timeout_ms: None)
    monkeypatch.setattr(Device, "start", start)
    (tmp_path / "image").write_bytes(IMAGE)
    with run_directory(tmp_path) as run_root:
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(run_root))
        world = World(tmp_path, None, None)  # type: ignore[arg-type]
        world.daemon = Daemon(configs.parse(world.document(), tmp_path / "disk.toml"))
        await world.daemon.start()
        world.control = ControlServer(world.daemon, world.daemon.run_dir)
        await world.control.start()
        yield world
        world.control.withdraw()
        await world.daemon.end_calls()
        await world.control.close()
        await world.daemon.stop()


@pytest.mark.timeout(180)
async def test_a_daemon_keeps_its_description(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that is detached comes again, and the daemon that is stopped goes on: else there would soon
    be nothing to try."""
    config = configs.parse(world.document(), world.folder / "disk.toml")
    detach = world.daemon.detach

    async def detach_and_attach(name: str, *, force: bool = False) -> str | None:
        warning = await detach(name, force=force)
        await world.daemon.attach(config, Wishes())
        return warning

    stops: list[bool] = []
    monkeypatch.setattr(world.daemon, "detach", detach_and_attach)
    monkeypatch.setattr(world.daemon, "request_stop", lambda: stops.append(True))
    await world.daemon.attach(config, Wishes())
    cases, said = await tried(world.control.run_dir, world.folder, OF_A_DAEMON)
    assert cases > 300, said
    assert stops


async def test_every_document_of_a_device_is_described(world: World) -> None:
    """One over an image, a scratch volume and one in a store, each with all its tables."""
    store = {"mode": "write-back", "url": f"file://{world.folder}/store", "size": "2MiB"}
    tables: list[dict[str, Any]] = [{}, {"volume": {"mode": "scratch"}}, {"volume": store}]
    device = TypeAdapter[messages.Device](messages.Device)
    for i, each in enumerate(tables):
        status, text = await world.attach(world.document(f"disk{i}", **each))
        assert status == 201, text
        assert device.validate_json(text).name == f"disk{i}"
    _, text = await world.ask("GET", "/v1/devices")
    assert len(TypeAdapter(messages.Devices).validate_json(text).devices) == 3
    written = json.loads((await world.ask("POST", "/v1/devices/disk2/sync", {"wait": True}))[1])
    assert written["write_back"]["dirty_bytes"] == 0
    _, text = await world.ask("GET", "/v1/daemon")
    info = TypeAdapter(messages.DaemonInfo).validate_json(text)
    assert isinstance(info.cache, messages.CacheCounts)
    assert len(info.cache.layers) == 3  # they share the image


async def test_another_directory_has_another_daemon(world: World) -> None:
    document = world.document()
    document["cache"]["dir"] = str(world.folder / "other")
    status, text = await world.attach(document)
    assert status == 409
    assert f"this daemon serves {world.folder}/cache" in text
    (world.folder / "link").symlink_to("cache")
    document["cache"]["dir"] = str(world.folder / "link")
    assert (await world.attach(document))[0] == 201


def secrets_in(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and SECRET.encode() in path.read_bytes():
            yield path


async def test_no_secret_gets_out(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Secrets everywhere where a config or the environment can have one."""
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    async with FaultServer(IMAGE) as server, asyncio.timeout(LIMIT_S):
        with AzModel() as azure:
            sas = f"{azure.sas()}&x={SECRET}-sas"
            monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", sas)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}-aws")
            signed = f"{server.url()}?X-Signature={SECRET}-query"
            prefix = f"az://{model_az.ACCOUNT}/{model_az.CONTAINER}"
            tables: dict[str, Any] = {
                "base": {"url": signed},
                "remote": {"headers": {"Authorization": f"Bearer {SECRET}-header"}, "retries": 0},
                "store": {"endpoint": azure.endpoint},
                "volume": {"mode": "write-back", "url": f"{prefix}/one"},
            }
            tables["remote"] |= {"read_timeout": "300ms", "connect_timeout": "300ms"}
            document = world.document(**tables)
            status, text = await world.attach(document)
            assert status == 201, text
            told.append(text)

            async def everything() -> None:
                for operation in OPERATIONS:
                    if operation.method == "GET":
                        told.append((await world.ask("GET", operation.path.format(name="disk")))[1])
                code = await asyncio.to_thread(cli.main, ["status", "--json"])
                assert code == 0
                told.append(capsys.readouterr().out)
                assert '"disk"' in told[-1]

            async def refused(document: object, *statuses: int) -> None:
                status, text = await world.attach(document)
                assert status in statuses, text
                told.append(text)

            await everything()
            await refused(document, 409)
            for mistake in mistakes(document):
                await refused(mistake, 400)
            for faults in ("error", "redirect-loop", "stall-head", "whole", "reset-head", "no-http"):
                server.set_faults(faults)
                other = {**tables["base"], "url": f"{signed}-{faults}"}
                fields = {key: tables[key] for key in ("remote", "store")}
                await refused(world.document("more", **fields, base=other), 502)
                await everything()
            server.release()
            server.set_faults("")
            for trouble in ((403, "AuthenticationFailed"), (503, "ServerBusy")):
                azure.trouble = trouble
                fields = {**tables, "volume": {**tables["volume"], "url": f"{prefix}/two"}}
                await refused(world.document("more", **fields), 502)
            azure.trouble = None
            monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", sas.replace("sig=", f"sig={SECRET}"))
            fields = {**tables, "volume": {**tables["volume"], "url": f"{prefix}/three"}}
            await refused(world.document("more", **fields), 502)
            # Where they are kept, only the daemon's user can read.
            keepers = [*secrets_in(world.control.run_dir), *secrets_in(world.folder / "cache")]
            assert {path.parent.name for path in keepers} == {"devices", "index"}
            for path in keepers:
                modes = [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)]
                assert modes == [0o600, 0o700], path
            await world.ask("DELETE", "/v1/devices/disk", {})
    for text in (*told, caplog.text):
        found = text.find(SECRET)
        assert found < 0, text[max(0, found - 300) : found + 100]
    assert len(told) > 20


def mistakes(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """With a secret where none belongs."""
    remote = document["remote"]
    yield {**document, "base": {"url": f"https://me:{SECRET}@h/x"}}
    yield {**document, "base": {"url": f"https://me:{SECRET}@h:{SECRET}/x"}}
    yield {**document, "base": {"url": f"https://me:{SECRET}@h\u2100/x"}}
    yield {**document, "base": {"url": f"gopher://h/x?{SECRET}"}}
    yield {**document, "base": {"url": f"https://h/x#{SECRET}"}}
    yield {**document, "base": {"url": f"file://h/x?{SECRET}"}}
    yield {**document, "base": f"https://h/x?{SECRET}"}
    yield {**document, "volume": {**document["volume"], "url": f"s3://{SECRET}:{SECRET}@h/x"}}
    yield {**document, "volume": {**document["volume"], "url": f"az://a/c/x?sig={SECRET}"}}
    yield {**document, "store": {"endpoint": f"https://me:{SECRET}@h/"}}
    yield {**document, "store": {"endpoint": f"https://h/?sig={SECRET}"}}
    yield {**document, "store": {"secret_access_key": SECRET}}
    yield {**document, "remote": f"Authorization: {SECRET}"}
    yield {**document, "remote": {**remote, "headers": f"Authorization: {SECRET}"}}
    yield {**document, "remote": {**remote, "headers": [f"Authorization: {SECRET}"]}}
    yield {**document, "remote": {**remote, "headers": {f"Authorization: {SECRET}": ""}}}
    yield {**document, "remote": {**remote, "headers": {"Authorization": f"{SECRET}\n"}}}
    yield {**document, "remote": {**remote, "headers": {"Authorization": [SECRET]}}}
    yield {**document, "remote": {**remote, "authorization": SECRET}}


async def test_a_body_that_is_wrong_is_not_repeated(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for body in (
        {"config_path": [SECRET], "config": {}},
        {"config_path": SECRET, "config": {}},
        {"config_path": "/x", "config": SECRET},
        {"config_path": "/x", "config": {}, "take_over": SECRET},
        {"config_path": "/x", "config": {}, "token": SECRET},
        [SECRET],
        SECRET,
    ):
        status, text = await world.ask("POST", "/v1/devices", body)
        assert (status, SECRET in text) == (400, False)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("line", [f"Authorization: \0{SECRET}", f"{SECRET}", f"X: {SECRET * 2000}"])
async def test_what_is_not_http_is_not_logged(
    world: World, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with socket_address(world.control.run_dir) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    writer.write(f"GET /v1/devices HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n".encode())
    assert (await asyncio.wait_for(reader.read(), 10)).split()[1] == b"400"
    writer.close()
    await writer.wait_closed()
    (said,) = [record for record in caplog.records if record.name == "tierblk.control.http"]
    assert said.getMessage().startswith("a client sent what is not HTTP: ")
    assert SECRET not in caplog.text


async def test_a_bug_is_not_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows what its exception says."""

    async def buggy(*args: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(world.daemon, "attach", buggy)
    status, text = await world.attach(world.document())
    assert status == 500
    assert json.loads(text)["error"]["message"] == "internal error in the daemon: RuntimeError"


def test_what_asks_the_driver_gets_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command line and its environment are all that it is given."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    given: dict[str, Any] = {}
    real = subprocess.Popen

    def spawn(command: list[str], **more: Any) -> Any:
        given.update(more, command=command)
        return real([command[0], "-c", "print('begun')"], **more)

    monkeypatch.setattr(subprocess, "Popen", spawn)
    assert driver.send_try_stop(0).wait(20) == 0
    assert given["env"].keys() <= {"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME"}
    assert SECRET not in str(given)


def test_debug_is_for_what_tierblk_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """botocore writes the answers of the token service into its debug log."""
    monkeypatch.setattr(logging.root, "handlers", [])
    levels = {name: logging.getLogger(name).level for name in ("root", "tierblk")}
    try:
        begin_log(debug=True)
        for name in ("botocore.parsers", "botocore.endpoint", "google.auth", "urllib3", "aiohttp", "asyncio"):
            logging.getLogger(name).debug(SECRET)
        logging.getLogger("tierblk.remote").debug("shown")
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    said = capsys.readouterr().err
    assert SECRET not in said
    assert said.endswith("DEBUG tierblk.remote: shown\n")
