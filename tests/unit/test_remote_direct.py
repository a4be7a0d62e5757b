"""The protocol that puts a body where it belongs, fed piece by piece without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.remote.direct import CURRENT_SINK, HEAD_BYTES_MAX, DirectHandler, Sink, fault

BODY = bytes(range(256)) * 40
HEAD = (
    b"HTTP/1.1 206 Partial Content\r\nServer: x\r\nContent-Length: %d\r\nContent-Range: bytes 0-1/2\r\n\r\n"
    % len(BODY)
)
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
PRIVATE_NAMES = ["_parser", "_payload", "_read_timeout", "_read_timeout_handle", "_loop"]


class Wire:
    """A transport that only remembers that it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def get_extra_info(self, name: str) -> None:
        return None

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Exchange:
    """A handler in the middle of a request for BODY. Made in a running loop."""

    def __init__(self, accept: bool = True) -> None:
        self.target = bytearray(len(BODY))
        self.seen = list[int]()
        self.heads = list[tuple[int, Mapping[str, str]]]()
        self._accept = accept
        self.wire = Wire()
        scratch = memoryview(bytearray(16384))
        self.handler = DirectHandler(asyncio.get_running_loop(), scratch)
        self.handler.connection_made(self.wire)  # type: ignore[arg-type]  # all that is used of a transport
        self.begin()

    def begin(self) -> None:
        """Another request on the same connection."""
        self.sink = Sink(memoryview(self.target), self._check, self.seen.append)
        token = CURRENT_SINK.set(self.sink)
        self.handler.set_response_params(read_timeout=30, auto_decompress=False)
        CURRENT_SINK.reset(token)

    def _check(self, status: int, headers: Mapping[str, str]) -> bool:
        self.heads.append((status, dict(headers)))
        return self._accept and status == 206

    def receive(self, data: bytes) -> None:
        """What a transport does with bytes from the socket."""
        while data:
            room = self.handler.get_buffer(-1)
            assert len(room) > 0
            count = min(len(room), len(data))
            room[:count] = data[:count]
            self.handler.buffer_updated(count)
            data = data[count:]
            if self.wire.closed:
                return

    async def answer(self) -> tuple[Any, Any]:
        """Message and payload of the next answer that aiohttp would see; interim ones are passed over."""
        while True:
            message, payload = await self.handler.read()
            if message.code >= 200:
                return message, payload

    def end(self) -> None:
        """Nothing may be left to run."""
        self.handler.close()
        self.handler._drop_timeout()


def cut(data: bytes, lengths: list[int]) -> list[bytes]:
    pieces, begin = [], 0
    for length in lengths:
        pieces.append(data[begin : begin + length])
        begin += length
    return [*pieces, data[begin:]]


@given(lengths=st.lists(st.integers(0, 5000), max_size=40), early=st.integers(0, 3), accept=st.booleans())
def test_however_the_bytes_arrive(lengths: list[int], early: int, accept: bool) -> None:
    async def scenario() -> None:
        exchange = Exchange(accept)
        for _ in range(2):  # the second answer comes on the same connection
            for piece in cut(EARLY * early + HEAD + BODY, lengths):
                exchange.receive(piece)
            message, payload = await exchange.answer()
            assert message.code == 206
            body = await payload.read()
            if accept:
                assert (bytes(exchange.target), body) == (BODY, b"")
                assert exchange.seen == sorted(set(exchange.seen))
                assert exchange.seen[-1] == len(BODY)
                assert exchange.sink.owner is exchange.handler
            else:
                assert (bytes(exchange.target), body) == (bytes(len(BODY)), BODY)
                assert exchange.seen == []
            assert payload.is_eof()
            assert not exchange.handler.should_close, "the connection can be used again"
            exchange.target[:] = bytes(len(BODY))
            exchange.seen.clear()
            exchange.begin()
        exchange.end()

    asyncio.run(scenario())


async def test_self_test_passes() -> None:
    assert fault() is None


def _gone(self: object) -> object:
    raise AttributeError("renamed")


@pytest.mark.parametrize("name", PRIVATE_NAMES)
async def test_self_test_notices_a_changed_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens with a release of aiohttp that calls it something else."""
    assert hasattr(Exchange().handler, name), f"aiohttp has no {name} any more: remote/direct.py must change"
    monkeypatch.setattr(DirectHandler, name, property(_gone, lambda self, value: None), raising=False)
    assert "AttributeError: renamed" in (fault() or "")


@pytest.mark.parametrize("name", ["set_response_params", "feed_data"])
async def test_self_test_notices_a_hook_that_is_not_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(DirectHandler, name)
    assert fault() is not None


async def test_nothing_is_written_once_the_sink_is_closed() -> None:
    exchange = Exchange()
    exchange.receive(HEAD + BODY[:100])
    exchange.sink.close()
    exchange.target[:] = bytes(len(BODY))
    exchange.receive(BODY[100:])
    assert exchange.target == bytes(len(BODY))
    assert exchange.handler.should_close
    exchange.end()


async def test_a_sink_belongs_to_one_connection() -> None:
    first, second = Exchange(), Exchange()
    second.sink = second.handler._sink = first.sink  # as after a request that aiohttp sent again
    second.receive(HEAD + BODY[:10])
    first.receive(HEAD + b"?" * 10)
    assert first.target[:10] == BODY[:10]
    assert first.sink.filled_bytes == 10
    first.end()
    second.end()


async def test_end_of_the_connection_in_the_body() -> None:
    exchange = Exchange()
    exchange.receive(HEAD + BODY[:-1])
    _, payload = await exchange.answer()
    exchange.handler.connection_lost(None)
    with pytest.raises(Exception, match="not completed"):
        await payload.read()
    assert exchange.seen[-1] == len(BODY) - 1


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked"),
        HEAD.replace(b"206 Partial Content", b"302 Found"),
        HEAD.replace(b"206 Partial Content", b"204 No Content"),
        HEAD.replace(b"%d" % len(BODY), b"0"),
    ],
)
async def test_what_never_goes_direct(head: bytes) -> None:
    exchange = Exchange()
    exchange.receive(head)
    assert exchange.sink.owner is None
    assert exchange.target == bytes(len(BODY))
    exchange.end()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 206 OK\nContent-Length: 10240\n\n" + BODY,
        b"HTTP/1.1 206 OK\r\nX: " + b"x" * HEAD_BYTES_MAX * 2,
        HEAD.replace(b"Server", b"Content-Length: 5\r\nServer") + BODY,
        bytes(range(256)) * 10 + b"\r\n\r\n",
    ],
)
async def test_nonsense_never_reaches_the_buffer_as_a_body(nonsense: bytes) -> None:
    """It ends in an error of the parser, or in a body that is the body; never in anything else (I12)."""
    exchange = Exchange()
    exchange.receive(nonsense)
    assert bytes(exchange.target) in (bytes(len(BODY)), BODY)
    assert exchange.handler.exception() is not None or bytes(exchange.target) == BODY
    exchange.end()


async def test_blank_lines_before_the_head_are_left_to_the_parser() -> None:
    exchange = Exchange()
    exchange.receive(b"\r\n\r\n" + HEAD + BODY)
    _, payload = await exchange.answer()
    assert await payload.read() == BODY
    assert exchange.seen == []
    exchange.end()


async def test_bytes_without_a_request_end_the_connection() -> None:
    exchange = Exchange()
    exchange.receive(HEAD + BODY)
    assert not exchange.wire.is_closing()
    exchange.receive(b"HTTP/1.1 206 Unasked\r\n\r\n")
    assert exchange.wire.is_closing()
    assert not exchange.handler.is_connected(), "the pool drops it"
    exchange.end()


class Clock:
    """A loop's timers, and a time that goes on when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.made = 0
        self._timers = list[tuple[float, Any, "Clock.Timer"]]()

    class Timer:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Any) -> Clock.Timer:
        timer = Clock.Timer()
        self.made += 1
        self._timers.append((self.now_s + delay_s, callback, timer))
        return timer

    def go_on(self, until_s: float) -> None:
        """To that time; every timer rings at its own."""
        while due := [entry for entry in self._timers if entry[0] <= until_s and not entry[2].cancelled]:
            first = min(due, key=lambda entry: entry[0])
            self._timers.remove(first)
            self.now_s = first[0]
            first[1]()
        self.now_s = until_s

    @property
    def waiting(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._timers)


async def _timed() -> tuple[Exchange, Clock]:
    exchange, clock = Exchange(), Clock()
    exchange.handler._loop = clock  # type: ignore[assignment]  # all that a timer needs of a loop
    exchange.handler.start_timeout()
    return exchange, clock


async def test_silence_counts_from_the_last_piece() -> None:
    exchange, clock = await _timed()
    for until_s in (29.0, 58.0, 87.0):
        clock.go_on(until_s)
        exchange.receive(HEAD if until_s == 29.0 else BODY[:100])
    clock.go_on(116.9)
    assert exchange.handler.exception() is None
    clock.go_on(117.0)
    assert isinstance(exchange.handler.exception(), TimeoutError)


async def test_exchanges_share_a_timer_and_silence_between_them_is_none() -> None:
    exchange, clock = await _timed()
    for _ in range(3):
        exchange.receive(HEAD + BODY)
        exchange.begin()
        exchange.handler.start_timeout()
    exchange.receive(HEAD + BODY)
    assert clock.made == 1
    clock.go_on(1000.0)
    assert exchange.handler.exception() is None
    assert clock.waiting == 0
    exchange.begin()
    exchange.handler.start_timeout()
    clock.go_on(1029.0)
    assert exchange.handler.exception() is None
    clock.go_on(1030.0)
    assert isinstance(exchange.handler.exception(), TimeoutError)


@pytest.mark.parametrize("end", ["lost", "aborted"])
async def test_no_timer_outlives_its_connection(end: str) -> None:
    exchange, clock = await _timed()
    exchange.receive(HEAD)
    if end == "aborted":
        exchange.wire.abort = exchange.wire.close  # type: ignore[attr-defined]
        exchange.handler.abort()
    exchange.handler.connection_lost(None)
    assert clock.waiting == 0
