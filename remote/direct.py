"""The body of a 206 goes from the socket straight into the caller's buffer: no stream reader, no copy in
Python.

aiohttp's client protocol receives `bytes` and collects them. Here it is an asyncio.BufferedProtocol as well,
which is asked where the next bytes shall go: while the head is awaited into a scratch buffer, of which
aiohttp's parser gets the head alone; after it, when the head passed every check, into the Sink of the
request. At most what came along with the head is copied. TLS works the same way, the SSL protocol of asyncio
decrypts into what get_buffer returns.

This rests on private names of aiohttp: BaseConnector._factory, and _get and _conns (for reads that want a new
connection, and for those that go around its client); ResponseHandler._parser, _payload, _read_timeout,
_read_timeout_handle, _reschedule_timeout, _drop_timeout and _on_read_timeout; and on set_response_params
beginning each exchange and feed_data ending each head. So aiohttp is pinned to one release, `fault` tries the
whole path in memory before it is used, and whoever does not find the body in the sink reads it the ordinary
way.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from aiohttp import ClientRequest, ClientTimeout, ServerDisconnectedError, TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from yarl import URL

HEAD_READ_BYTES = 4096  # little: what arrives with the head is what must be copied
HEAD_BYTES_MAX = 64 * 1024  # above it the parser, which has limits of its own, may say what is wrong
SCRATCH_BYTES = 256 * 1024

_BLANK_LINE = re.compile(rb"\n\r?\n")


class Sink:
    """Where the body of one exchange shall go, and how much of it is there.

    view: bytes, exactly as many as were asked for. accepts(status, headers): whether an answer's head is the
    one asked for and says how long its body is. progress(n): called for every piece, n bytes of view are
    valid.
    """

    __slots__ = ("_accepts", "_progress", "_view", "filled_bytes", "owner")

    def __init__(
        self,
        view: memoryview,
        accepts: Callable[[int, Mapping[str, str]], bool],
        progress: Callable[[int], None],
    ) -> None:
        self._view: memoryview | None = view
        self._accepts = accepts
        self._progress = progress
        self.filled_bytes = 0
        self.owner: object | None = None  # the connection whose answer was accepted; no other may write

    def claim(self, owner: object, status: int, headers: Mapping[str, str]) -> bool:
        """Whether the body that follows this head goes into the view; only the first fitting one does."""
        if self._view is None or self.owner is not None or not self._accepts(status, headers):
            return False
        self.owner = owner
        return True

    def room(self) -> memoryview | None:
        """The part of the view that is still to be filled; None once the sink is closed."""
        return None if self._view is None else self._view[self.filled_bytes :]

    def advance(self, count: int) -> bool:
        """Count bytes more are in the view. Whether it is full now."""
        assert self._view is not None
        self.filled_bytes += count
        full = self.filled_bytes == len(self._view)
        self._progress(self.filled_bytes)
        return full

    def close(self) -> None:
        """From here on nothing writes to the view (I6), not even a TLS connection that flushes at its end."""
        self._view = None


# The one way to hand something to the protocol of the connection that aiohttp will pick: set_response_params
# runs in the task that makes the request, once for each exchange.
CURRENT_SINK: ContextVar[Sink | None] = ContextVar("tierblk_current_sink", default=None)


_NEW_CONNECTION: ContextVar[bool] = ContextVar("tierblk_new_connection", default=False)


@contextmanager
def on_new_connection() -> Iterator[None]:
    """What is asked in here does not go over a connection that is already there."""
    token = _NEW_CONNECTION.set(True)
    try:
        yield
    finally:
        _NEW_CONNECTION.reset(token)


class DirectHandler(ResponseHandler, asyncio.BufferedProtocol):
    """aiohttp's client protocol, with the body of an accepted answer in the sink instead of the stream
    reader.

    scratch: shared by all connections of a loop, because bytes stay in it only from get_buffer to
    buffer_updated, which asyncio calls without a pause between them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, scratch: memoryview) -> None:
        super().__init__(loop)
        self._scratch = scratch
        self._sink: Sink | None = None
        self._into_sink = False  # the head was accepted and the body is not complete
        self._in_head = False  # an exchange with a sink has begun, its head is not complete
        self._head = bytearray()
        self._message: Any = None
        self._listens = False  # silence counts
        self._heard_s = 0.0
        self._params: dict[str, Any] = {}  # of the last exchange that aiohttp began here
        self._outcome: asyncio.Future[bool] | None = None  # of one that began with `ask_again`

    # aiohttp makes a timer anew for every piece that comes, four for the smallest answer. Here there is one,
    # which looks back when it rings, and goes on over the exchanges of the connection.

    def _reschedule_timeout(self) -> None:
        self._listens = True
        self._heard_s = self._loop.time()
        if self._read_timeout_handle is None and self._read_timeout:
            self._read_timeout_handle = self._loop.call_later(self._read_timeout, self._on_read_timeout)

    def _drop_timeout(self) -> None:
        self._listens = False
        if self.transport is None or self.transport.is_closing():
            super()._drop_timeout()

    def _on_read_timeout(self) -> None:
        self._read_timeout_handle = None
        if not self._listens or not self._read_timeout:
            return
        rest_s = self._heard_s + self._read_timeout - self._loop.time()
        if rest_s > 0:
            self._read_timeout_handle = self._loop.call_later(rest_s, self._on_read_timeout)
        else:
            super()._on_read_timeout()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The end of the connection: no timer outlives it."""
        super().connection_lost(exc)
        super()._drop_timeout()
        self._fail_outcome(ServerDisconnectedError())

    def set_exception(self, exc: BaseException, *cause: Any) -> None:
        """The exchange has failed."""
        super().set_exception(exc, *cause)
        self._fail_outcome(exc)

    def _fail_outcome(self, error: BaseException) -> None:
        if self._outcome is not None and not self._outcome.done():
            # What happened to the body says more than what happened to the connection.
            of_body = self._payload.exception() if self._into_sink and self._payload is not None else None
            self._outcome.set_exception(of_body or error)

    def _settle(self, *, in_sink: bool) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(in_sink)

    async def ask_again(self, request: bytes, sink: Sink) -> bool:
        """Sends a request over a connection on which aiohttp's client had an exchange before. True: the body
        is in the sink. False: the sink did not accept the answer, which `read` gives. Raises what the
        connection fails with."""
        transport = self.transport
        if transport is None or not self._params:
            raise ServerDisconnectedError
        self._begin_exchange(sink, self._params)
        self._outcome = self._loop.create_future()
        try:
            transport.write(request)
            self.start_timeout()
            return await self._outcome
        finally:
            self._outcome = None

    def set_response_params(self, **params: Any) -> None:
        """An exchange of aiohttp's client begins on this connection."""
        self._params = params
        self._begin_exchange(CURRENT_SINK.get(), params)

    def _begin_exchange(self, sink: Sink | None, params: Mapping[str, Any]) -> None:
        self._sink = sink
        self._into_sink = False
        self._in_head = self._sink is not None
        self._head.clear()
        super().set_response_params(**params)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """The parser is through with a head; data is (message, payload)."""
        self._message = data[0]
        super().feed_data(data, size)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport shall put the next bytes; never empty."""
        if self._into_sink:
            assert self._sink is not None
            return self._sink.room() or self._scratch
        return self._scratch[:HEAD_READ_BYTES] if self._in_head else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """The transport has put nbytes where the last get_buffer said."""
        if self._into_sink:
            assert self._sink is not None
            if self._sink.room() is not None:
                self._reschedule_timeout()
                if self._sink.advance(nbytes):
                    self._end_body()
            return  # else nobody wants the rest, the connection is about to be closed
        if self._parser is None:
            # Nothing was asked: kept, these bytes would be taken for the head of the next answer.
            self.close()
            return
        data = bytes(self._scratch[:nbytes])
        if self._in_head:
            self._collect_head(data)
        else:
            self.data_received(data)

    def _collect_head(self, data: bytes) -> None:
        """Give the parser one head after the other, but no byte of a body that the sink accepts."""
        self._reschedule_timeout()
        self._head += data
        while self._in_head:
            blank = _BLANK_LINE.search(self._head)
            if blank is None:
                if len(self._head) <= HEAD_BYTES_MAX:
                    return
                head, rest = bytes(self._head), b""
            else:
                head, rest = bytes(self._head[: blank.end()]), bytes(self._head[blank.end() :])
            self._head = bytearray(rest)
            self._message = None
            self.data_received(head)
            interim = (
                self._message is not None and 100 <= self._message.code <= 199 and self._message.code != 101
            )
            self._in_head = interim and blank is not None
        rest = bytes(self._head)
        self._head.clear()
        if self._begin_body():
            self._copy_first(rest)
            return
        self._settle(in_sink=False)
        if rest:
            self.data_received(rest)

    def _begin_body(self) -> bool:
        message, payload, sink = self._message, self._payload, self._sink
        self._message = None
        if message is None or payload is None or sink is None:
            return False  # the parser found no message, or no body
        if (
            payload.is_eof()
            or payload.total_bytes
            or message.chunked
            or message.upgrade
            or message.compression
        ):
            return False
        self._into_sink = sink.claim(self, message.code, message.headers)
        return self._into_sink

    def _copy_first(self, data: bytes) -> None:
        """The part of the body that came along with the head."""
        assert self._sink is not None
        room = self._sink.room()
        assert room is not None
        count = min(len(room), len(data))
        if count:
            room[:count] = data[:count]
            if self._sink.advance(count):
                self._end_body()
        if data[count:]:
            self.close()  # more than the body: this connection is not used again

    def _end_body(self) -> None:
        """The body is complete: aiohttp shall think that it read it."""
        payload = self._payload
        assert payload is not None
        self._into_sink = False
        self._sink = None
        self._parser = None  # it still waits for the body, and would call its absence an error
        payload.feed_eof()  # wakes the reader and gives the connection back to the pool
        self._settle(in_sink=True)


class DirectConnector(TCPConnector):
    """A connection pool whose connections are DirectHandlers. AttributeError where aiohttp has changed."""

    _asked: tuple[URL, ConnectionKey] | None = None  # the host that was asked last

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        loop = asyncio.get_running_loop()
        if not callable(self._factory):
            raise AttributeError("the connector's _factory cannot be called")
        self._factory = functools.partial(  # type: ignore[assignment]  # partial is invariant
            DirectHandler, loop=loop, scratch=scratch
        )

    async def connect(self, req: ClientRequest, traces: list[Any], timeout: ClientTimeout) -> Connection:
        """A connection for a request of aiohttp's client."""
        self._asked = req.url.origin(), req.connection_key
        return await super().connect(req, traces, timeout)

    async def idle(self, url: URL) -> Connection | None:
        """A connection to the host of url that is not in use, on which there was an exchange before."""
        if self._asked is None or _NEW_CONNECTION.get() or url.origin() != self._asked[0]:
            return None
        return await self._get(self._asked[1], [])

    async def _get(self, key: ConnectionKey, traces: list[Any]) -> Connection | None:
        """An idle connection for the request that is made now; None: a new one shall be made."""
        if not _NEW_CONNECTION.get():
            return await super()._get(key, traces)
        for idle, _ in self._conns.pop(key, ()):
            idle.close()  # what made the caller distrust one makes all of them suspicious
        return None


def fault() -> str | None:
    """Try an exchange in memory, without a network: None if it works, else what does not.

    Needs a running loop. It is how a changed private name of aiohttp is noticed at start instead of at a
    read.
    """
    try:
        return _try_exchange(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 8\r\n\r\n", b"all of it")
    except Exception as error:  # whatever it is, the ordinary way works without it
        return f"{type(error).__name__}: {error}"


def _try_exchange(head: bytes, body: bytes) -> str | None:
    target = bytearray(8)
    sink = Sink(
        memoryview(target), lambda status, headers: status == 206 and len(headers) == 1, lambda count: None
    )
    handler = DirectHandler(asyncio.get_running_loop(), memoryview(bytearray(HEAD_READ_BYTES)))
    token = CURRENT_SINK.set(sink)
    try:
        handler.set_response_params(read_timeout=None)
    finally:
        CURRENT_SINK.reset(token)
    payload = None
    for piece in (head[:-3], head[-3:] + body[:3], body[3:8]):
        handler.get_buffer(-1)[: len(piece)] = piece
        handler.buffer_updated(len(piece))
        payload = payload or handler._payload
    if target != body[:8] or sink.owner is not handler:
        return "the body did not reach the buffer"
    if payload is None or not payload.is_eof() or handler.exception() is not None:
        return "the answer did not end"
    return None
