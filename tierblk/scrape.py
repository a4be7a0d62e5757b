"""Where Prometheus asks: GET /metrics on a loopback port (`[daemon] metrics`), and what the control socket
answers to the same.

Whoever has an account on this machine can ask here. So there is one answer being made at a time, however many
ask; only so many may be connected; and nothing else can be asked."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import ModuleType

from aiohttp import web

from tierblk import values
from tierblk.snapshot import Snapshot

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
_AGAIN_S = 15.0
"""How soon a port that somebody else has is tried again."""
_KEEP_S = 30.0
_SHUTDOWN_S = 0.5


class Scraper:
    """Makes the answer, on the event loop and in pieces: in a thread it would hold the interpreter, and so
    misses, for longer."""

    def __init__(self, snapshot: Callable[[], Awaitable[Snapshot]]) -> None:
        self._snapshot = snapshot
        self._running: asyncio.Task[tuple[bytes, str]] | None = None

    async def answer(self, _: web.Request) -> web.Response:
        """Handles GET /metrics."""
        if self._running is None:
            self._running = asyncio.create_task(self._text(), name="metrics")
            self._running.add_done_callback(self._made)
        text, content_type = await asyncio.shield(self._running)
        return web.Response(body=text, headers={"Content-Type": content_type})

    def _made(self, task: asyncio.Task[tuple[bytes, str]]) -> None:
        self._running = None
        if not task.cancelled():
            task.exception()  # those who wait, if they still do, have got it

    async def _text(self) -> tuple[bytes, str]:
        metrics = await asyncio.to_thread(_metrics)
        texts = [await asyncio.to_thread(metrics.process)]
        for piece in metrics.pieces(await self._snapshot(), time.time()):
            texts.append(piece)
            await asyncio.sleep(0)
        return b"".join(texts), metrics.CONTENT_TYPE


def _metrics() -> ModuleType:
    """Most daemons are never asked: what this takes to import costs none of their start."""
    from tierblk import metrics

    return metrics


class MetricsServer:
    """Serves a Scraper at a loopback address from `start` to `close`. While somebody else has the port it
    says so in `warnings`, and tries again now and then: devices are served all the same."""

    def __init__(self, scraper: Scraper, address: str, warnings: list[str]) -> None:
        """address: as values.loopback takes it."""
        self.address = address
        self._warnings = warnings
        self._warning: str | None = None
        self._listener: asyncio.Server | None = None
        self._trying: asyncio.Task[None] | None = None
        self._again_s = _AGAIN_S
        app = web.Application()
        app.add_routes([web.get("/metrics", scraper.answer)])
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=_KEEP_S,
            shutdown_timeout=_SHUTDOWN_S,
        )

    async def start(self) -> None:
        """Listens, or goes on trying to."""
        await self._runner.setup()
        if not await self._listen():
            self._trying = asyncio.create_task(self._listen_later(), name="metrics port")

    async def close(self) -> None:
        """Whoever is connected gets a moment. Can be called twice."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    async def _listen_later(self) -> None:
        while True:
            await asyncio.sleep(self._again_s)
            if await self._listen():
                return

    async def _listen(self) -> bool:
        host, port = values.host_and_port(self.address)
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._protocol, host, port, backlog=CONNECTIONS_MAX)
        except OSError as error:
            if self._warning is None:
                # asyncio's own words repeat the address.
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                self._warning = f"no metrics at daemon.metrics = {self.address}: {reason}; it is tried again"
                self._warnings.append(self._warning)
                log.error("%s; `tierblk metrics` works without it", self._warning)
            return False
        if self._warning is not None:
            with suppress(ValueError):
                self._warnings.remove(self._warning)
            log.warning("metrics are at %s now", self.address)
        else:
            log.info("metrics are at http://%s/metrics", self.address)
        return True

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None or len(server.connections) >= CONNECTIONS_MAX:
            return _Refused()
        return server()


class _Refused(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
