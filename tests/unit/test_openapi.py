"""The description of the control interface: it is complete, it is the one in docs/, and it is kept."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector, web
from pydantic import TypeAdapter

from tests.conftest import ROOT
from tests.tries import tried
from tests.unit.fake_daemon import FakeDaemon
from tests.unit.test_records import RECORD
from tierblk import config, control, messages, openapi, records
from tierblk.counts import SHOWN_STATS
from tierblk.latency import TIERS, Latencies

KEPT = ROOT / "docs" / "openapi.json"


class Honest(FakeDaemon):
    """Its documents have all that those of a daemon have."""

    def device(self, name: str) -> dict[str, Any]:
        more = ("remote_retries", "remote_errors", "remote_waiting", "cached_bytes", "volume_bytes")
        told = dict.fromkeys((*SHOWN_STATS, *more), 0) | super().device(name)
        told |= {"since": None, "next_try_s": None, "validator": '"1"', "on_outage": "wait"}
        told |= {"recovery": True, "read_only": True, "attached": 1.0, "recovered": None}
        told.setdefault("volume", None)
        if "write_back" in told:
            told["write_back"] = told["write_back"] | {"epoch_at": None, "uploading": False, "epochs": 7}
            told["write_back"] |= {"durability": "local", "trouble_since": None}
        return told

    async def attach(self, *args: Any) -> dict[str, Any]:
        return self.device((await super().attach(*args))["name"])

    def devices(self) -> list[dict[str, Any]]:
        return [self.device(device["name"]) for device in super().devices()]

    def info(self) -> dict[str, Any]:
        told = {
            key: super(Honest, self).info()[key] for key in ("pid", "cache_dir", "config_path", "started")
        }
        return {
            **told,
            "fills": 0,
            "slot_write_failure": None,
            "throttle": None,
            "warnings": [],
            "cache": {"slots": 255, "session": 1, "layers": [], "commit_failure": None},
        }


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[control.ControlServer]:
    document = {
        "device": {"name": "a"},
        "base": {"url": "http://h/x"},
        "cache": {"dir": str(tmp_path / "cache"), "size": "16MiB"},
    }
    server = control.ControlServer(Honest(config.parse(document, tmp_path / "a.toml")), tmp_path / "run")
    await server.start()
    yield server
    await server.close()


def test_the_one_in_docs_is_this_one() -> None:
    assert KEPT.read_text() == openapi.text(control.OPERATIONS), "make openapi"


async def test_it_has_the_routes_that_there_are(server: control.ControlServer) -> None:
    assert server._runner is not None
    app = server._runner.app
    assert isinstance(app, web.Application)
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    described = openapi.document(control.OPERATIONS)["paths"]
    assert routes == {(method.upper(), path) for path, each in described.items() for method in each}
    assert ("POST", "/v1/devices") in routes


async def test_a_method_that_a_path_has_not(server: control.ControlServer) -> None:
    """As the paths differ in their methods, so does what is allowed."""
    async with ClientSession(connector=UnixConnector(str(server.socket_path))) as session:
        for path, allowed in (
            ("/v1/daemon", "GET"),
            ("/v1/devices/a", "DELETE,GET"),
            ("/v1/devices/a/sync", "POST"),
        ):
            for method in ("PUT", "PATCH", "HEAD", "OPTIONS", "TRACE"):
                async with session.request(method, f"http://x{path}") as answer:
                    assert (answer.status, answer.headers["Allow"]) == (405, allowed)
                    assert answer.content_type == "application/json"
                    if method != "HEAD":
                        told = TypeAdapter(messages.ErrorAnswer).validate_json(await answer.read())
                        assert told.error.message == f"{method} {path}: method not allowed"


def test_a_device_that_nobody_serves_is_described() -> None:
    shown = records.waiting_device(RECORD, "failed", "its server is away")
    assert TypeAdapter(messages.WaitingDevice).validate_python(shown).state == "failed"


def test_latencies_are_described() -> None:
    told = {tier: Latencies([0] * 40 + [3], 1e-6).to_dict() for tier in TIERS}
    latency = TypeAdapter(messages.Latencies).validate_python(told).miss
    assert latency is not None
    assert (latency.requests, latency.p99_9_us) == (3, told["miss"]["p99.9_us"])


async def test_it_is_served(server: control.ControlServer) -> None:
    async with (
        ClientSession(connector=UnixConnector(str(server.socket_path))) as session,
        session.get("http://x/v1/openapi.json") as answer,
    ):
        assert await answer.json() == json.loads(KEPT.read_text())


@pytest.mark.timeout(180)
async def test_it_is_kept(server: control.ControlServer, tmp_path: Path) -> None:
    cases, said = await tried(server.run_dir, tmp_path)
    assert cases > 300, said
