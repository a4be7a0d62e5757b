"""Reads that are cancelled, stall, or lose their server: nothing is left behind, and what arrived is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.servers import (
    WAYS,
    Connection,
    OddServer,
    Request,
    make_certificates,
    opened,
    remote_settings,
    server_context,
)
from tierblk.errors import RemoteRefused, RemoteUnavailable
from tierblk.remote import Fetcher
from tierblk.remote.direct import Sink
from tierblk.remote.http import HttpSource, open_http

CONTENT = bytes(range(1, 256)) * 4096
LENGTH = 512 * 1024
DEADLINE_S = 20.0


class Paused:
    """A server that stops at one stage of its answer, until the client is gone or it is told to go on."""

    def __init__(self, server: OddServer, stage: str) -> None:
        self._server = server
        self._stage = stage
        self.reached = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.client_gone = asyncio.Event()

    async def __call__(self, request: Request, client: Connection) -> None:
        if request.is_probe:
            await self._server.right(request, client)
            return
        answer = self._server.head(request) + self._server.body(request)
        head_bytes = len(self._server.head(request))
        stop_at = {
            "head": 0,
            "inside the head": 20,
            "start of the body": head_bytes,
            "body": head_bytes + 300_000,
        }
        await client.send(answer[: stop_at[self._stage]])
        self.reached.set()
        await self.may_go_on.wait()
        try:
            await client.send(answer[stop_at[self._stage] :])
        except ConnectionError:
            pass
        await client.gone()
        self.client_gone.set()


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def open_responses(source: HttpSource) -> int:
    """Connections that are taken out of the pool."""
    connector = source._session.connector
    assert connector is not None
    return len(connector._acquired)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["head", "inside the head", "start of the body", "body"])
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_cancel(
    stage: str, tls: bool, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = list[Sink]()

    class Remembered(Sink):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            sinks.append(self)

    make_certificates(tmp_path)
    context = server_context(tmp_path) if tls else None
    async with OddServer(CONTENT, tls=context) as server, asyncio.timeout(DEADLINE_S):
        pause = server.script = Paused(server, stage)
        settings = remote_settings(ca_file=str(tmp_path / "ca.pem"))
        source = await opened(server, way, settings)
        monkeypatch.setattr("tierblk.remote.direct.Sink", Remembered)
        tasks_before = asyncio.all_tasks()
        buffer, arrived = bytearray(LENGTH), asyncio.Event()
        read = asyncio.create_task(source.read_into(0, memoryview(buffer), lambda count: arrived.set()))
        await pause.reached.wait()
        if stage == "body":
            await arrived.wait()
        await cancelled(read)
        assert open_responses(source) == 0
        assert sinks
        assert all(sink.room() is None for sink in sinks), "a TLS connection may read on while it closes"
        buffer[:] = bytes(LENGTH)  # lent to somebody else
        pause.may_go_on.set()
        await pause.client_gone.wait()
        assert buffer == bytes(LENGTH), "nobody writes to a buffer that was given back (I6)"
        server.script = None
        await source.read_into(7, memoryview(buffer), lambda count: None)
        assert buffer == CONTENT[7 : 7 + LENGTH]
        assert {task for task in asyncio.all_tasks() - tasks_before if "_serve" not in repr(task)} == set()
        await source.aclose()


async def test_cancel_while_connecting() -> None:
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        url = server.url().replace("http:", "https:")  # the TLS handshake is never answered
        tasks_before = asyncio.all_tasks()
        opening = asyncio.create_task(open_http(url, remote_settings()))
        await server.connected.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert {task for task in asyncio.all_tasks() - tasks_before if "_serve" not in repr(task)} == set()


async def test_close_ends_reads_that_run() -> None:
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        pause = server.script = Paused(server, "body")
        source = await open_http(server.url(), remote_settings())
        read = asyncio.create_task(source.read_into(0, memoryview(bytearray(LENGTH)), lambda count: None))
        await pause.reached.wait()
        await source.aclose()
        with pytest.raises(RemoteUnavailable):
            await read
        with pytest.raises(RemoteRefused, match="closed"):
            await source.read_into(0, memoryview(bytearray(LENGTH)), lambda count: None)


async def stall(request: Request, client: Connection, server: OddServer) -> None:
    await client.send(server.head(request), server.body(request)[:100_000])
    await client.stall()


async def reset(request: Request, client: Connection, server: OddServer) -> None:
    await client.send(server.head(request), server.body(request)[:100_000])
    client.writer.close()


async def busy(request: Request, client: Connection, server: OddServer) -> None:
    head = server.head(request, "503 Busy", content_range=None, content_length="0")
    await client.send(head)


Failure = Callable[[Request, Connection, OddServer], Awaitable[None]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("failure", "offsets"),
    [(stall, [0, 100_000, 200_000]), (reset, [0, 100_000, 200_000]), (busy, [0, 0, 0])],
)
async def test_a_failed_read_goes_on_where_it_ended(failure: Failure, offsets: list[int], way: str) -> None:
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        settings = remote_settings(read_timeout="200ms")
        source = await opened(server, way, settings)
        server.requests.clear()

        async def script(request: Request, client: Connection) -> None:
            if len(server.requests) <= 2:
                await failure(request, client, server)
            else:
                await server.right(request, client)

        server.script = script
        fetcher, buffer, seen = Fetcher(source, settings), bytearray(LENGTH), [0]

        def progress(count: int) -> None:
            assert count > seen[-1]
            assert buffer[:count] == CONTENT[4096 : 4096 + count]
            seen.append(count)

        await fetcher.fetch(4096, memoryview(buffer), progress)
        assert buffer == CONTENT[4096 : 4096 + LENGTH]
        assert seen[-1] == LENGTH
        assert [request.first_byte - 4096 for request in server.requests] == offsets
        counters = fetcher.counters
        assert (counters.requests, counters.retries, counters.errors) == (3, 2, 0)
        assert (counters.fetched_bytes, counters.in_flight) == (LENGTH, 0)
        await source.aclose()


@pytest.mark.parametrize("way", WAYS)
async def test_a_slow_body_is_no_stall(way: str) -> None:
    """The time-out counts from the last byte that came, however long the whole body takes."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    async def script(request: Request, client: Connection) -> None:
        await client.send(server.head(request))
        body, sent, begun_s = server.body(request), 0, loop.time()
        while not request.is_probe and loop.time() < begun_s + 0.5:
            await client.send(body[sent : sent + 1])
            sent += 1
            await arrived.wait()
            arrived.clear()
        await client.send(body[sent:])

    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        server.script = script
        source = await opened(server, way, remote_settings(read_timeout="200ms"))
        buffer = bytearray(LENGTH)
        await source.read_into(0, memoryview(buffer), lambda count: arrived.set())
        assert buffer == CONTENT[:LENGTH]
        await source.aclose()


async def test_redirect_is_resolved_again_when_its_end_fails() -> None:
    """Signed addresses expire: a 403 there is a reason to ask at the configured one, and only once."""
    expired = set[str]()

    async def script(request: Request, client: Connection) -> None:
        if request.path == "/image":
            resolved.append(request.path)
            head = server.head(
                request,
                "302 Found",
                content_length="0",
                content_range=None,
                location=f"/signed?{len(resolved)}",
            )
            await client.send(head)
        elif request.path in expired:
            await client.send(server.head(request, "403 Expired", content_length="0", content_range=None))
        else:
            await server.right(request, client)

    resolved = list[str]()
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        server.script = script
        source = await open_http(server.url(), remote_settings())
        buffer = bytearray(4096)
        for _ in range(3):
            await source.read_into(0, memoryview(buffer), lambda count: None)
        assert len(resolved) == 1
        expired.add("/signed?1")
        for _ in range(3):
            await source.read_into(0, memoryview(buffer), lambda count: None)
        assert len(resolved) == 2
        assert buffer == CONTENT[:4096]
        expired.update({f"/signed?{number}" for number in range(10)})
        with pytest.raises(RemoteRefused, match="403") as caught:
            await source.read_into(0, memoryview(buffer), lambda count: None)
        assert len(resolved) == 3
        assert "signed" not in str(caught.value), "messages name the configured address"
        await source.aclose()


async def test_redirect_is_resolved_again_after_an_outage_of_its_end() -> None:
    async with OddServer(CONTENT) as elsewhere, OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):

        async def script(request: Request, client: Connection) -> None:
            head = server.head(request, "302 Found", content_length="0", location=elsewhere.url())
            await client.send(head)

        async def out_of_order(request: Request, client: Connection) -> None:
            await busy(request, client, elsewhere)

        server.script = script
        source = await open_http(server.url(), remote_settings())
        elsewhere.script = out_of_order
        with pytest.raises(RemoteUnavailable, match="503"):
            await source.read_into(0, memoryview(bytearray(4096)), lambda count: None)
        assert len(server.requests) == 1
        server.script = None  # has the image itself now
        await source.read_into(0, memoryview(bytearray(4096)), lambda count: None)
        assert len(server.requests) == 2
        await source.aclose()


async def test_configured_headers_go_to_the_configured_host_only() -> None:
    async with OddServer(CONTENT) as elsewhere, OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):

        async def script(request: Request, client: Connection) -> None:
            head = server.head(request, "302 Found", content_length="0", location=elsewhere.url())
            await client.send(head)

        server.script = script
        secret = {"Authorization": "Bearer secret", "X-Team": "disks"}
        source = await open_http(server.url(), remote_settings(headers=secret))
        await source.read_into(0, memoryview(bytearray(4096)), lambda count: None)
        assert server.requests[0].headers["authorization"] == "Bearer secret"
        assert server.requests[0].headers["x-team"] == "disks"
        assert len(elsewhere.requests) == 2
        assert not {"authorization", "x-team"} & elsewhere.requests[-1].headers.keys()
        await source.aclose()


async def test_a_lost_idle_connection_is_no_error() -> None:
    """Servers close idle connections whenever they like; the next read just takes a new one."""
    closed = asyncio.Event()

    async def script(request: Request, client: Connection) -> None:
        await server.right(request, client)
        client.writer.close()
        closed.set()

    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        server.script = script
        source = await open_http(server.url(), remote_settings())
        for number in range(3):
            await closed.wait()
            closed.clear()
            await source.read_into(number, memoryview(bytearray(4096)), lambda count: None)
        await source.aclose()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_a_read_anew_trusts_no_connection_that_is_there(tls: bool, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    context = server_context(tmp_path) if tls else None
    async with OddServer(CONTENT, tls=context) as server, asyncio.timeout(DEADLINE_S):
        source = await open_http(server.url(), remote_settings(ca_file=str(tmp_path / "ca.pem")))
        buffer = bytearray(4096)
        await source.read_into(0, memoryview(buffer), lambda count: None)
        assert server.connections == 1
        await source.read_anew(7, memoryview(buffer), lambda count: None)
        assert buffer == CONTENT[7 : 7 + 4096]
        assert server.connections == 2
        await source.read_into(0, memoryview(buffer), lambda count: None)
        assert server.connections == 2, "the new one is kept"
        assert source.direct_bodies == 3
        await source.aclose()


async def test_a_request_that_is_swallowed_does_not_hold_a_reader(tmp_path: Path) -> None:
    """Long before read_timeout: a second request goes out on a new connection."""

    async def script(request: Request, client: Connection) -> None:
        if len(server.requests) == 2:
            await client.stall()
        await server.right(request, client)

    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        server.script = script
        settings = remote_settings(read_timeout="60s")
        source = await open_http(server.url(), settings)
        fetcher, buffer = Fetcher(source, settings), bytearray(LENGTH)
        tasks_before = asyncio.all_tasks()
        await fetcher.fetch(0, memoryview(buffer), lambda count: None)
        assert buffer == CONTENT[:LENGTH]
        assert (server.connections, fetcher.counters.retries, fetcher.counters.in_flight) == (2, 1, 0)
        assert open_responses(source) == 0
        assert {task for task in asyncio.all_tasks() - tasks_before if "_serve" not in repr(task)} == set()
        await source.aclose()


async def test_opening_asks_once_more_when_the_answer_does_not_fit() -> None:
    async def script(request: Request, client: Connection) -> None:
        if len(server.requests) == 1:
            await client.send(server.head(request, content_encoding="gzip"), server.body(request))
        else:
            await server.right(request, client)

    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        server.script = script
        source = await open_http(server.url(), remote_settings())
        assert len(server.requests) == server.connections == 2
        await source.aclose()


async def test_the_same_bytes_on_the_wire_whoever_asks() -> None:
    """What goes around aiohttp's client is what that client sent, but for the range."""
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        settings = remote_settings(headers={"X-Of-Ours": "a: b"})
        source = await open_http(server.url() + "?a=%2f&b", settings)
        buffer = bytearray(4096)
        for at in (0, 8192, 512):
            await source.read_into(at, memoryview(buffer), lambda count: None)
            assert buffer == CONTENT[at : at + 4096]
        assert server.connections == 1
        assert source.direct_bodies == 3
        _, first, *others = server.requests
        assert [other.first_byte for other in others] == [8192, 512]
        for other in others:
            assert other.path == first.path
            assert {**other.headers, "range": ""} == {**first.headers, "range": ""}
            assert other.headers["if-match"]
        await source.aclose()


async def test_another_version_is_not_asked_for_as_the_old_one() -> None:
    """After a repin requests are made anew."""
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        source = await opened(server, "again", remote_settings())
        server.etag = '"another"'
        await source.probe()
        buffer = bytearray(4096)
        await source.read_into(0, memoryview(buffer), lambda count: None)
        assert server.requests[-1].headers["if-match"] == '"another"'
        await source.aclose()


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_said_before_an_answer_is_no_answer(way: str) -> None:
    """Whatever comes behind it counts: a refusal, the way elsewhere, the bytes. The connection is kept."""

    async def script(request: Request, client: Connection) -> None:
        await client.send(EARLY_HINTS)
        if request.path == "/image" and moods:
            mood = moods.pop()
            await client.send(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % mood)
        else:
            await server.right(request, client)

    moods = [b"307 There\r\nLocation: /other", b"503 Busy\r\nRetry-After: 7"]
    async with OddServer(CONTENT) as server, asyncio.timeout(DEADLINE_S):
        source = await opened(server, way, remote_settings())
        server.script = script
        buffer = bytearray(4096)
        with pytest.raises(RemoteUnavailable) as caught:
            await source.read_into(0, memoryview(buffer), lambda count: None)
        assert caught.value.retry_after_s == 7
        before = server.connections
        for at in range(0, 10 * 4096, 4096):
            await source.read_into(at, memoryview(buffer), lambda count: None)
            assert buffer == CONTENT[at : at + 4096]
        assert server.connections <= before + 1
        await source.aclose()
