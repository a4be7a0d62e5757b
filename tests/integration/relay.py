"""Between a client and an S3 server on loopback: fails as told, counts what passes, and may look at it."""

from __future__ import annotations

import asyncio
import io
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

from tests.integration.models import Asked

HOST = "127.0.0.1"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, no time
_HOP = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive"})
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>asked too often</Message></Error>"


@dataclass(frozen=True)
class Faults:
    """Probabilities of a request. busy: 503, not passed on. reset: RST instead of passing it on. lost: passed
    on, and RST instead of its answer. broken: passed on, and 500 instead of its answer. cut: half of the
    answer's body, then RST. late: up to late_s before it is passed on."""

    busy: float = 0.0
    reset: float = 0.0
    lost: float = 0.0
    broken: float = 0.0
    cut: float = 0.0
    late: float = 0.0
    late_s: float = 0.05


NONE = Faults()


class Relay:
    """From `async with` on, in the loop of who uses it. A request that has come is passed on even if its
    sender has gone, so that it may arrive after its sender's death.

    refuse: the status that every request gets, if any, with the headers refuse_headers. latency_s, and
    bytes_per_s for what is sent there: of each request. look: called with each request before it is passed
    on; what it returns are the headers to pass on, or the status to answer with.
    """

    def __init__(self, port: int, *, faults: Faults = NONE, seed: int = 0) -> None:
        """port: of the server behind it."""
        self.faults = faults
        self.refuse: int | None = None
        self.refuse_headers: Mapping[str, str] = {}
        self.latency_s = 0.0
        self.bytes_per_s: float | None = None
        self.look: Callable[[Asked], Mapping[str, str] | int] | None = None
        self.asked: Counter[str] = Counter()
        """By method, as they come; what is not passed on counts as well."""
        self.answered: Counter[int] = Counter()
        """By status."""
        self.put_bytes = 0
        self.port = 0
        self._upstream = f"http://{HOST}:{port}"
        self._chance = random.Random(seed)
        self._listener: asyncio.Server | None = None
        self._stirred = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._server = web.Server(self._handle)
        await self.back()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gone()
        await self._server.shutdown(1.0)
        await self._session.close()

    @property
    def endpoint(self) -> str:
        """For [store]."""
        return f"http://{HOST}:{self.port}"

    def gone(self) -> None:
        """Nobody listens any more, and who is connected gets RST."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in self._server.connections:
            _reset(connection.transport)

    async def back(self) -> None:
        """As before `gone`, at the same port."""
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(self._server, HOST, self.port, backlog=128)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Returns when the condition holds; it is looked at whenever a request comes or is answered.
        TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._stirred.clear()
                await self._stirred.wait()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            body = await request.content.read()
        except ConnectionError:  # it died in the middle
            return self._ended(request)
        self.asked[request.method] += 1
        self.put_bytes += len(body)
        self._stirred.set()
        if self.latency_s or self.bytes_per_s:
            await asyncio.sleep(self.latency_s + len(body) / (self.bytes_per_s or float("inf")))
        if self.refuse is not None:
            return self._answer(self.refuse, self.refuse_headers, _SLOW_DOWN)
        fault = self._draw()
        if self.faults.late and self._chance.random() < self.faults.late:
            await asyncio.sleep(self._chance.random() * self.faults.late_s)
        if fault == "busy":
            return self._answer(503, {}, _SLOW_DOWN)
        if fault == "reset":
            return self._ended(request)
        headers: Mapping[str, str] | int = {name.lower(): value for name, value in request.headers.items()}
        if self.look is not None:
            assert not isinstance(headers, int)
            path, _, query = request.raw_path.partition("?")
            headers = self.look(
                Asked(request.method, path, list(URL(f"?{query}").query.items()), dict(headers), body)
            )
        if isinstance(headers, int):
            return self._answer(headers, {}, b"")
        async with self._session.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers={name: value for name, value in headers.items() if name not in _HOP},
            data=io.BytesIO(body) if body else None,  # of large ones aiohttp warns when they are bytes
            allow_redirects=False,
        ) as response:
            said = await response.read()
        if fault == "lost":
            return self._ended(request)
        if fault == "broken":
            return self._answer(500, {}, b"")
        passed = {name: value for name, value in response.headers.items() if name.lower() not in _HOP}
        if fault == "cut" and len(said) > 1:
            half = web.StreamResponse(
                status=response.status, headers={**passed, "Content-Length": str(len(said))}
            )
            with suppress(ConnectionError):  # the client may have gone
                await half.prepare(request)
                await half.write(said[: len(said) // 2])
            return self._ended(request)
        return self._answer(response.status, passed, said)

    def _draw(self) -> str | None:
        chance = self._chance.random()
        for name in ("busy", "reset", "lost", "broken", "cut"):
            chance -= getattr(self.faults, name)
            if chance < 0:
                return name
        return None

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> web.Response:
        self.answered[status] += 1
        self._stirred.set()
        return web.Response(status=status, headers=headers, body=body)

    def _ended(self, request: web.BaseRequest) -> web.Response:
        _reset(request.transport)
        self._stirred.set()
        return web.Response()  # nobody gets it


def _reset(transport: asyncio.BaseTransport | None) -> None:
    if transport is not None and (raw := transport.get_extra_info("socket")) is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        transport.abort()  # type: ignore[attr-defined]  # a stream's transport has it
