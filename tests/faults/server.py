"""The server: connections, the order of requests, and everything that can be switched while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.content import Content
from tests.faults.ledger import Entry, Ledger, now_s
from tests.faults.peer import Peer, Weather, reset_socket
from tests.faults.plan import CONNECTION_FAULTS, Decision, Plan
from tests.faults.request import HEAD_BYTES_MAX, Request, parse
from tests.faults.wire import ANSWERS, CONTINUED, Exchange, outside_the_range

BACKLOG = 1024
GOODBYE_S = 2.0  # how long a TLS connection may take to be closed in good order


class FaultServer:
    """Serves one object, whatever the path, on one port of `host`, from start to aclose, or in a with block.

    All methods are for the loop that it runs on. ledger: what came and went.
    """

    def __init__(
        self,
        content: Content | bytes | Path,
        plan: Plan | str = "",
        *,
        seed: int = 0,
        latency_s: float = 0.0,
        bytes_per_s: float | None = None,
        tls: ssl.SSLContext | None = None,
        stranger: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """stranger: a server context with a certificate that clients do not trust, for that fault."""
        self.content = content if isinstance(content, Content) else Content(content)
        self.tls = tls
        self.latency_s = latency_s
        self.ledger = Ledger()
        self.connections = 0
        self.open_connections = 0
        self.state = "stopped"  # "up", "gone" or "blackhole" after start
        self._stranger = stranger
        self._weather = Weather()
        self._weather.link.bytes_per_s = bytes_per_s
        self._address = (host, port)
        self._requests = 0
        self._forced: list[str] = []
        self._expired_before = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._peers: set[Peer] = set()
        self._plan_since = (0, 0)  # requests and connections before it
        self.plan = Plan(seed=seed)
        self.set_faults(plan)

    # -- life ---

    async def start(self) -> None:
        """Takes the port and listens. Raises OSError."""
        # It is bound as well and never listens: nobody else gets the port while the server is gone.
        self._placeholder = _bound(self._address)
        self._address = self._placeholder.getsockname()[:2]
        self._listen()

    async def aclose(self) -> None:
        """Ends everything; when it returns no task and no socket is left."""
        self._stop_accepting(close=True)
        await self._end_connections()
        self._placeholder.close()
        self.state = "stopped"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def port(self) -> int:
        return self._address[1]

    def url(self, path: str = "image") -> str:
        """The address of a path of this server; all paths have the same bytes."""
        return f"{'https' if self.tls else 'http'}://{self._address[0]}:{self.port}/{path}"

    # -- switches ---

    def set_faults(self, plan: Plan | str, seed: int | None = None) -> None:
        """From the next request and connection on, which are its number 0. A string is for Plan.parse; seed
        None: that of before. ValueError: it cannot be."""
        if isinstance(plan, str):
            plan = Plan.parse(plan, self.plan.seed if seed is None else seed)
        if self.tls is None and plan.names() & {"plain-http", "stranger"}:
            raise ValueError("plain-http and stranger are faults of a server with TLS")
        if self._stranger is None and "stranger" in plan.names():
            raise ValueError("the fault stranger needs a certificate of its own")
        self.plan = plan
        self._plan_since = (self._requests, self.connections)

    def force(self, *names: str) -> None:
        """The next requests that ask for a range get these faults, in this order, whatever the plan says."""
        for name in names:
            if self.plan.forced(name, 0).name in CONNECTION_FAULTS:
                raise ValueError(f"{name} is no fault of a request")
        self._forced += names

    def replace(self, content: Content | bytes | Path) -> None:
        """Another version of the object, from the next request on; answers that run keep theirs."""
        self.content = content if isinstance(content, Content) else Content(content)

    def shape(self, *, latency_s: float | None = None, bytes_per_s: float | None = None) -> None:
        """None leaves a value as it is; bytes_per_s 0 takes the limit away."""
        if latency_s is not None:
            self.latency_s = latency_s
        if bytes_per_s is not None:
            self._weather.link.bytes_per_s = bytes_per_s or None

    def release(self) -> None:
        """Who stalls or drips now goes on."""
        self._weather.release()

    def expire(self) -> None:
        """The addresses to which `redirect` has sent anybody so far answer 403 from now on, as a signed URL
        does after its time."""
        self._expired_before = self._requests

    async def gone(self) -> None:
        """Nobody listens any more, and who is connected gets RST."""
        self._stop_accepting(close=True)
        self.state = "gone"
        await self._end_connections()

    def blackhole(self) -> None:
        """The kernel takes connections, and nothing is said on any."""
        if self.state == "gone":
            self._listen()
        self._stop_accepting(close=False)
        self._weather.flowing.clear()
        self.state = "blackhole"

    def back(self) -> None:
        """As before `gone` or `blackhole`."""
        if self.state == "gone":
            self._listen()
        elif self.state == "blackhole":
            self._weather.flowing.set()
            self._accept()

    # -- looking ---

    @property
    def stalled(self) -> int:
        """Connections that stall, or drip, now."""
        return sum(peer.stalls for peer in self._peers)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Returns when the condition holds; it is looked at whenever a request or connection begins or ends
        or goes silent. TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._weather.stirred.clear()
                await self._weather.stirred.wait()

    def _stir(self) -> None:
        self._weather.stirred.set()

    # -- connections ---

    def _listen(self) -> None:
        self._listener = _bound(self._address)
        self._listener.listen(BACKLOG)
        self._accept()

    def _accept(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept_all)
        self.state = "up"

    def _stop_accepting(self, close: bool) -> None:
        """The state is to be set by the caller."""
        if self.state == "up":
            asyncio.get_running_loop().remove_reader(self._listener)
        if close and self.state in ("up", "blackhole"):
            self._listener.close()
        self._weather.flowing.set()

    async def _end_connections(self) -> None:
        for peer in self._peers:
            peer.reset()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept_all(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody is there any more
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number, self.connections = self.connections, self.connections + 1
            task = asyncio.create_task(self._connection(connection, number), name=f"fault server {number}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._stir()

    async def _connection(self, connection: socket.socket, number: int) -> None:
        self.open_connections += 1
        try:
            decision = self.plan.connection(number - self._plan_since[1])
            if decision.name is not None:
                self.ledger.faults[decision.name] += 1
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                if decision.name in ("drop", "mute", "plain-http"):
                    await _unserved(connection, decision.name)
                else:
                    await self._handshake(connection, number, decision.name == "stranger")
        finally:
            self.open_connections -= 1
            connection.close()
            self._stir()

    async def _handshake(self, connection: socket.socket, number: int, stranger: bool) -> None:
        reader = asyncio.StreamReader(HEAD_BYTES_MAX)
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=self._stranger if stranger else self.tls
        )
        peer = Peer(reader, asyncio.StreamWriter(transport, protocol, reader, loop), number, self._weather)
        self._peers.add(peer)
        try:
            while await self._exchange(peer):
                pass
            peer.writer.close()
            async with asyncio.timeout(GOODBYE_S):
                await peer.writer.wait_closed()
        finally:
            self._peers.discard(peer)
            transport.abort()
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()

    # -- requests ---

    async def _exchange(self, peer: Peer) -> bool:
        """One request and its answer. Whether another may follow."""
        head = await peer.reader.readuntil(b"\r\n\r\n")
        await self._weather.flowing.wait()
        request = parse(head)
        if request is None:
            await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return False
        content, n = self.content, self._requests
        self._requests += 1
        byte_range = request.byte_range(content.size_bytes)
        first, last = byte_range or (-1, -1)
        entry = Entry(n, peer.number, request.method, request.path, first, last, now_s())
        self.ledger.open(entry)
        self._stir()
        decision = self._decide(request, n, byte_range)
        exchange = Exchange(peer, request, content, entry, self.ledger, decision)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            again = await self._answer(exchange, decision, byte_range)
        finally:
            entry.ended = True
            self._stir()
        return again and not request.wants_close

    def _decide(self, request: Request, n: int, byte_range: tuple[int, int] | None) -> Decision:
        n -= self._plan_since[0]
        if byte_range is None or request.method != "GET":
            return Decision(None, None, self.plan.request(n).rng)
        if self._forced:
            return self.plan.forced(self._forced.pop(0), n)
        decision = self.plan.request(n)
        continued = CONTINUED.get(request.via)
        if continued is not None and continued in self.plan.names():
            return Decision(continued, None, decision.rng)
        return decision

    async def _answer(self, x: Exchange, decision: Decision, byte_range: tuple[int, int] | None) -> bool:
        if x.request.via == "moved" and x.request.hop < self._expired_before:
            await x.empty("403 Forbidden")
            return True
        answered = await outside_the_range(x, byte_range)
        if answered is not None:
            return answered
        if decision.name is None or decision.name in CONNECTION_FAULTS:
            return await x.right()
        x.entry.fault = decision.name
        self.ledger.faults[decision.name] += 1
        return await ANSWERS[decision.name](x)


async def _unserved(connection: socket.socket, fault: str) -> None:
    """A connection on which no request is answered."""
    loop = asyncio.get_running_loop()
    if fault == "drop":
        reset_socket(connection)
        return
    while await loop.sock_recv(connection, 4096):
        if fault == "plain-http":
            await loop.sock_sendall(connection, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            return


def _bound(address: tuple[str, int]) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener
