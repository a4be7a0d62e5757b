"""The control interface over a real socket, and the command line's side of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_daemon import FakeDaemon
from tierblk import config, control
from tierblk.cli import client
from tierblk.cli.client import Daemon, DeadSocket
from tierblk.errors import ConfigError, DaemonError, DeviceError, RemoteUnavailable, TierblkError, from_dict
from tierblk.ready import Ready
from tierblk.rundir import INFO_NAME, RUN_DIR_VARIABLE, SOCKET_NAME


def document(tmp_path: Path, name: str = "a", url: str = "http://h/x") -> dict[str, Any]:
    return {
        "device": {"name": name},
        "base": {"url": url},
        "cache": {"dir": str(tmp_path / "cache"), "size": "16MiB"},
    }


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[control.ControlServer]:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    api = FakeDaemon(config.parse(document(tmp_path), tmp_path / "a.toml"))
    # A path that no address of a Unix socket has room for.
    server = control.ControlServer(api, tmp_path / "run" / ("long" * 40))
    await server.start()
    yield server
    api.request_stop()
    await server.close()


async def ask(server: control.ControlServer, *request: Any, timeout_s: float = 10.0) -> dict[str, Any]:
    """One call by the command line's client, from a thread as it blocks."""
    daemon = Daemon(server.run_dir, {}, timeout_s)
    return await asyncio.to_thread(daemon.request, *request)


async def attach(server: control.ControlServer, fields: object, path: object = "/a.toml") -> dict[str, Any]:
    return await ask(server, "POST", "/v1/devices", {"config_path": path, "config": fields})


async def test_only_the_owner_may_connect(server: control.ControlServer) -> None:
    mode = server.socket_path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert stat.S_IMODE(server.run_dir.stat().st_mode) == 0o700


async def test_the_file_beside_it_says_whose_it_is(server: control.ControlServer, tmp_path: Path) -> None:
    known = json.loads((server.run_dir / INFO_NAME).read_text())
    assert known["pid"] == os.getpid()
    assert known["cache_dir"] == str(tmp_path / "cache")
    assert known["config_path"] == str(tmp_path / "a.toml")
    assert set(known) == {"pid", "cache_dir", "config_path", "started"}


async def test_a_device_from_beginning_to_end(server: control.ControlServer, tmp_path: Path) -> None:
    made = await attach(server, document(tmp_path))
    assert made["name"] == "a"
    assert made["config_path"] == "/a.toml"
    assert await ask(server, "GET", "/v1/devices") == {"devices": [made]}
    assert await ask(server, "GET", "/v1/devices/a") == made
    assert await ask(server, "POST", "/v1/devices/a/repin", {}) == made
    assert await ask(server, "DELETE", "/v1/devices/a", {"force": True}) == {"detached": "a", "warning": None}
    assert await ask(server, "GET", "/v1/devices") == {"devices": []}


@pytest.mark.parametrize(
    ("name", "url", "kind", "message"),
    [
        ("a", "http://unreachable/x", RemoteUnavailable, "http://unreachable/x does not answer"),
        ("B", "http://h/x", ConfigError, "/a.toml: device.name: must be 1 to 32"),
        ("bug", "http://h/x", TierblkError, "internal error in the daemon: KeyError"),
    ],
)
async def test_errors_arrive_as_they_were(
    server: control.ControlServer, tmp_path: Path, name: str, url: str, kind: type[TierblkError], message: str
) -> None:
    with pytest.raises(TierblkError) as caught:
        await attach(server, document(tmp_path, name, url))
    assert type(caught.value) is kind
    assert caught.value.message.startswith(message)


async def test_a_hint_arrives_too(server: control.ControlServer, tmp_path: Path) -> None:
    with pytest.raises(RemoteUnavailable) as caught:
        await attach(server, document(tmp_path, url="http://unreachable/x"))
    assert caught.value.hint == "is it up?"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("GET", "/v1/devices/none"), "no device is called none"),
        (("DELETE", "/v1/devices/none"), "no device is called none"),
        (("GET", "/v2/devices"), "GET /v2/devices: not found"),
        (("PUT", "/v1/devices"), "PUT /v1/devices: method not allowed"),
        (("POST", "/v1/devices"), 'the body of the request must have "config_path"; must have "config"'),
        (("POST", "/v1/devices", {"config_path": 5, "config": {}}), 'the body of the request has a wrong "'),
        (("POST", "/v1/devices", {"config_path": "a", "config": {}}), "the body of the request has a wrong"),
        (("DELETE", "/v1/devices/a", {"force": 1}), 'the body of the request has a wrong "force": input'),
        (("DELETE", "/v1/devices/a", {"Force": True}), 'the body of the request must not have "Force"'),
        (("POST", "/v1/devices/a/sync", {"wait": "yes"}), 'the body of the request has a wrong "wait"'),
        (("POST", "/v1/devices/a/repin", {"x": {}}), 'the body of the request must not have "x"'),
        (("POST", "/v1/stop", {"if_idle": None}), 'the body of the request has a wrong "if_idle"'),
        (("GET", "/v1/devices?name=a"), 'unknown parameter "name" in the query (there are none)'),
        (("GET", "/v1/devices/A%0ab"), r'no device can be called "A\nb"'),
        (("GET", "/v2/%0a"), "GET /v2/%0a: not found"),
        (("POST", "/v1/devices", {"x": "y" * (5 << 20)}), "POST /v1/devices: request entity too large"),
    ],
)
async def test_wrong_requests(server: control.ControlServer, request_: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TierblkError) as caught:
        await ask(server, *request_)
    assert isinstance(caught.value, DaemonError | DeviceError)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff", b'{"config_path": "/\\ud800", "config": {}}']
)
async def test_bodies_that_are_no_objects(server: control.ControlServer, body: bytes) -> None:
    status, error = await raw(server, b"POST /v1/devices", body, b"Content-Type: application/json\r\n")
    assert status == 400
    assert isinstance(error, DaemonError)


async def raw(
    server: control.ControlServer, line: bytes, body: bytes, head: bytes = b""
) -> tuple[int, TierblkError]:
    reader, writer = await asyncio.open_unix_connection(sock=connected(server.run_dir))
    writer.write(b"%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s" % (line, head))
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    begin, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(begin.split()[1]), from_dict(json.loads(answer)["error"])


@pytest.mark.parametrize("head", [b"", b"Content-Type: text/plain\r\n", b"Content-Type: \x80\r\n"])
async def test_a_body_must_say_that_it_is_json(server: control.ControlServer, head: bytes) -> None:
    status, error = await raw(server, b"POST /v1/stop", b"{}", head)
    assert (status, error.hint) == (415, "send it with: Content-Type: application/json")
    assert isinstance(server.api, FakeDaemon)
    assert not server.api.stopping.is_set()


async def test_a_body_may_not_be_packed(server: control.ControlServer) -> None:
    for encoding, body in ((b"gzip", b"abcdef"), (b"foo", b"{}"), (b"deflate", zlib.compress(b"{}"))):
        head = b"Content-Type: application/json\r\nContent-Encoding: %s\r\n" % encoding
        status, error = await raw(server, b"POST /v1/stop", body, head)
        assert (status, error.message) == (415, "the body of the request must not have a Content-Encoding")


async def test_a_client_that_goes_in_the_middle_of_its_body(
    server: control.ControlServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no bug of the daemon."""
    caplog.set_level(logging.INFO)
    with connected(server.run_dir) as client:
        client.sendall(b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 10\r\n\r\n{")
    async with asyncio.timeout(10):
        while not caplog.messages:
            await ask(server, "GET", "/v1/daemon")
    assert caplog.messages == ["POST /v1/stop: the body of the request ends too early"]
    assert isinstance(server.api, FakeDaemon)
    assert not server.api.stopping.is_set()


async def test_of_many_faults_of_a_body_some_are_said(server: control.ControlServer) -> None:
    with pytest.raises(DaemonError, match=r'must not have "k7"; and 49992 more$') as caught:
        await ask(server, "POST", "/v1/stop", {f"k{i}": 0 for i in range(50_000)})
    assert caught.value.hint == "known here: if_idle"


def connected(run_dir: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    fd = os.open(run_dir, os.O_PATH)
    connection.connect(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
    os.close(fd)
    return connection


async def test_stop(server: control.ControlServer) -> None:
    assert await ask(server, "POST", "/v1/stop") == {"stopping": True}
    assert isinstance(server.api, FakeDaemon)
    await asyncio.wait_for(server.api.stopping.wait(), 5)


async def test_a_daemon_in_use_is_not_stopped_for_being_idle(
    server: control.ControlServer, tmp_path: Path
) -> None:
    assert isinstance(server.api, FakeDaemon)
    slow = asyncio.create_task(attach(server, document(tmp_path, "slow")))
    await asyncio.wait_for(server.api.slow_attach.wait(), 10)
    assert await ask(server, "POST", "/v1/stop", {"if_idle": True}) == {"stopping": False}
    await attach(server, document(tmp_path, "a"))
    server.api.request_stop()
    await slow
    server.api.stopping.clear()
    assert await ask(server, "POST", "/v1/stop", {"if_idle": True}) == {"stopping": False}
    server.api.may_detach.set()
    for name in ("a", "slow"):
        await ask(server, "DELETE", f"/v1/devices/{name}")
    assert await ask(server, "POST", "/v1/stop", {"if_idle": True}) == {"stopping": True}


def post(server: control.ControlServer, method: str, path: str, body: object) -> socket.socket:
    """A client that has sent its request and may hang up."""
    text = json.dumps(body).encode()
    client = connected(server.run_dir)
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    client.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
    client.sendall(text)
    return client


async def test_who_hangs_up_gives_the_attach_up(server: control.ControlServer, tmp_path: Path) -> None:
    """As Ctrl-C does. From then on it is no reason to keep a daemon that was started for it."""
    api = server.api
    assert isinstance(api, FakeDaemon)
    with post(server, "POST", "/v1/devices", {"config_path": "/a", "config": document(tmp_path, "slow")}):
        await asyncio.wait_for(api.slow_attach.wait(), 10)
    assert await ask(server, "POST", "/v1/stop", {"if_idle": True}) == {"stopping": True}
    await asyncio.wait_for(api.given_up.wait(), 10)
    assert api.devices() == []


async def test_who_hangs_up_does_not_give_a_detach_up(server: control.ControlServer, tmp_path: Path) -> None:
    api = server.api
    assert isinstance(api, FakeDaemon)
    api.stopping.set()
    await attach(server, document(tmp_path, "slow"))
    with post(server, "DELETE", "/v1/devices/slow", {}):
        await asyncio.wait_for(api.slow_detach.wait(), 10)
    assert (await ask(server, "GET", "/v1/daemon"))["pid"] == os.getpid()  # it has seen the other one go
    (running,) = server._running
    api.may_detach.set()
    await asyncio.wait_for(running, 10)
    assert api.devices() == []


async def test_close_takes_the_socket_away_and_start_replaces_a_dead_one(
    server: control.ControlServer,
) -> None:
    await server.close()
    assert list(server.run_dir.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as dead:
        fd = os.open(server.run_dir, os.O_PATH)
        dead.bind(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
        os.close(fd)
    with pytest.raises(DeadSocket):
        await ask(server, "GET", "/v1/daemon")
    await server.start()
    assert (await ask(server, "GET", "/v1/daemon"))["pid"] == os.getpid()
    await server.close()
    await server.close()


async def test_a_run_directory_that_cannot_be_made(server: control.ControlServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    other = control.ControlServer(server.api, tmp_path / "file" / "x")
    with pytest.raises(DaemonError, match=r"cannot make the control socket .*: Not a directory"):
        await other.start()


async def test_reports_through_the_pipe() -> None:
    for report, expected in (
        (lambda fd: Ready(fd).serves(Path("/s")), {"ok": True, "socket": "/s"}),
        (lambda fd: Ready(fd).failed(DeviceError("no")), {"error": DeviceError("no").to_dict()}),
    ):
        assert piped(report) == expected


def piped(report: Callable[[int], None]) -> object:
    read_fd, write_fd = os.pipe()
    report(write_fd)
    with open(read_fd, "rb") as pipe:
        return json.loads(pipe.read())


async def test_nobody_waits_at_the_pipe() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    Ready(write_fd).serves(Path("/s"))


def test_only_the_first_line_counts_and_the_pipe_is_closed_once() -> None:
    """The number may be another file's by then."""
    read_fd, write_fd = os.pipe()
    ready = Ready(write_fd)
    ready.serves(Path("/s"))
    assert os.open(os.devnull, os.O_WRONLY) == write_fd
    ready.failed(DeviceError("later"))
    ready.close()
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:
        assert json.loads(pipe.read()) == {"ok": True, "socket": "/s"}


class TestClient:
    """What the command line makes of daemons that do not behave."""

    @pytest.fixture
    def listener(self, tmp_path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        run_dir = tmp_path / "run" / "x"
        run_dir.mkdir(parents=True)
        fd = os.open(run_dir, os.O_PATH)
        listener.bind(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
        os.close(fd)
        listener.listen()
        return listener

    async def test_one_that_hangs(self, listener: socket.socket, tmp_path: Path) -> None:
        with listener, pytest.raises(DaemonError, match=r"has not answered for 0\.05 s"):
            Daemon(tmp_path / "run" / "x", {}, 0.05).get("/v1/daemon")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (b"", "broke off"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "broke off"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "not understood"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", "broke off"),
            (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}", "an error of unknown shape"),
            (b"nonsense\r\n\r\n", "broke off"),
        ],
    )
    async def test_one_that_answers_nonsense(
        self, listener: socket.socket, tmp_path: Path, answer: bytes, message: str
    ) -> None:
        def reply() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer)
            connection.close()

        with listener:
            replying = asyncio.create_task(asyncio.to_thread(reply))
            with pytest.raises(TierblkError, match=message):
                await asyncio.to_thread(Daemon(tmp_path / "run" / "x", {}).get, "/v1/daemon")
            await replying

    def test_a_daemon_json_that_lies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
        for name, text in (("a", "["), ("b", "[]"), ("c", "{}")):
            (tmp_path / name).mkdir()
            (tmp_path / name / SOCKET_NAME).touch()
            (tmp_path / name / INFO_NAME).write_text(text)
        assert [daemon.info for daemon in client.candidates()] == [{}, {}, {}]
        assert client.find_daemon(tmp_path) is None

    def test_same_directory(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        assert client.same_directory(tmp_path / "real", tmp_path / "link")
        assert client.same_directory(tmp_path / "none" / ".." / "x", tmp_path / "x")
        assert not client.same_directory(tmp_path / "real", tmp_path)


async def test_all_counters_at_one_moment(server: control.ControlServer, tmp_path: Path) -> None:
    await attach(server, document(tmp_path))
    said = await ask(server, "GET", "/v1/top")
    assert set(said) == {"unix_s", "monotonic_s", "daemon", "cache", "devices", "remotes"}
    assert said["devices"][0]["latency_counts"]["hit"][-1] == 60
