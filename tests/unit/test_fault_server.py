"""The fault server, looked at on the wire: each fault is what its table says, and nothing else is wrong."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import FaultServer
from tests.faults.content import Content
from tests.integration.servers import make_certificates, server_context

CONTENT = random.Random(3).randbytes(300_000)
FIRST, COUNT = 4096, 100_000
RIGHT = CONTENT[FIRST : FIRST + COUNT]
TURNED_OVER = bytes(255 - value for value in RIGHT)
DEADLINE_S = 10.0
ETAG = Content(CONTENT).etag


@dataclass
class Answer:
    """What came back. end: "open" (nothing more came for a while), "FIN" or "RST"."""

    status: int
    headers: dict[str, str]
    body: bytes
    end: str


class Wire:
    """A connection of a client that knows just enough HTTP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(
        self,
        first: int = FIRST,
        count: int = COUNT,
        path: str = "/image",
        method: str = "GET",
        **headers: str,
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Range: bytes={first}-{first + count - 1}"]
        lines += [f"{name.replace('_', '-')}: {text}" for name, text in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        await self.writer.drain()

    async def answer(self, patience_s: float = DEADLINE_S) -> Answer:
        """The next answer: all that its Content-Length announces, or what came within patience_s."""
        got, end = bytearray(), "open"
        try:
            async with asyncio.timeout(patience_s):
                while not _complete(got):
                    piece = await self.reader.read(65536)
                    if not piece:
                        end = "FIN"
                        break
                    got += piece
        except TimeoutError:
            pass
        except ConnectionResetError:
            end = "RST"
        head, _, body = bytes(got).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 "):
            return Answer(0, {}, bytes(got), end)
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return Answer(int(first.split()[1]), headers, body, end)

    async def end(self) -> str:
        """How the server ends the connection after what was read so far."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                return "more" if await self.reader.read(1) else "FIN"
        except ConnectionResetError:
            return "RST"


def _complete(got: bytearray) -> bool:
    head, blank, body = bytes(got).partition(b"\r\n\r\n")
    for line in head.decode("latin-1").split("\r\n"):
        if line.lower().startswith("content-length: "):
            return bool(blank) and len(body) >= int(line.split(": ")[1])
    return False


@asynccontextmanager
async def connected(server: FaultServer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=tls)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


async def one(server: FaultServer, patience_s: float = DEADLINE_S, path: str = "/image") -> Answer:
    """The answer on a connection of its own."""
    async with connected(server) as wire:
        await wire.ask(path=path)
        return await wire.answer(patience_s)


def assert_right(answer: Answer, content: bytes = CONTENT) -> None:
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes {FIRST}-{FIRST + COUNT - 1}/{len(content)}"
    assert answer.headers["content-length"] == str(COUNT)
    assert answer.headers["etag"] == Content(content).etag
    assert answer.body == content[FIRST : FIRST + COUNT]


# -- a good server ---


async def test_right_answers() -> None:
    async with FaultServer(CONTENT) as server, connected(server) as wire:
        for _ in range(3):
            await wire.ask(if_match=ETAG)
            assert_right(await wire.answer())
        await wire.ask(if_match='"one", ' + ETAG)
        assert (await wire.answer()).status == 206
        await wire.ask(if_match='"one"')
        assert (await wire.answer()).status == 412
        await wire.ask(len(CONTENT), 5)
        answer = await wire.answer()
        assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
        await wire.ask(len(CONTENT) - 5, 10)
        assert (await wire.answer()).body == CONTENT[-5:]
        await wire.ask(0, 10, "/", "POST")
        assert (await wire.answer()).status == 405
        wire.writer.write(b"GET /whole HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = await wire.answer()
        assert (answer.status, answer.body) == (200, CONTENT)
        assert await wire.end() == "FIN"
    assert server.ledger.requests == 9
    assert server.connections == 1


async def test_head_requests_and_suffix_ranges() -> None:
    async with FaultServer(CONTENT, "reset") as server, connected(server) as wire:
        wire.writer.write(b"HEAD / HTTP/1.1\r\n\r\n")
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in head
        assert b"Accept-Ranges: bytes" in head
        assert b"Content-Length: %d\r\n" % len(CONTENT) in head
        server.set_faults("")
        wire.writer.write(
            b"GET / HTTP/1.1\r\nRange: bytes=-7\r\n\r\nGET / HTTP/1.1\r\nRange: bytes=299999-\r\n\r\n"
        )
        body = b""
        while not body.endswith(CONTENT[-1:]) or body.count(b"HTTP/1.1 206") < 2:
            body += await wire.reader.read(4096)
        assert CONTENT[-7:] in body
        wire.writer.write(b"SSH-2.0\r\n\r\n")
        assert (await wire.answer()).status == 400


async def test_the_log_tells_what_went_out_twice() -> None:
    async with FaultServer(CONTENT) as server, connected(server) as wire:
        for first, count in ((0, 1000), (5000, 1000), (500, 1000)):
            await wire.ask(first, count)
            await wire.answer()
        await server.until(lambda: all(entry.ended for entry in server.ledger.entries))
        assert server.ledger.served() == server.ledger.asked()
        assert server.ledger.served().repeated == ((500, 999, 2),)
        assert server.ledger.served().repeated_bytes == 500
        entry = server.ledger.entries[-1]
        assert (entry.n, entry.first, entry.last, entry.status) == (2, 500, 1499, 206)
        assert (entry.sent_bytes, entry.fault) == (1000, None)
        server.ledger.forget()
        assert server.ledger.summary()["served"]["total_bytes"] == 0


async def test_another_version() -> None:
    other = CONTENT[::-1]
    async with FaultServer(CONTENT) as server, connected(server) as wire:
        server.replace(other)
        await wire.ask(if_match=ETAG)
        answer = await wire.answer()
        assert (answer.status, answer.headers["etag"]) == (412, Content(other).etag)
        await wire.ask()
        assert_right(await wire.answer(), other)


def test_etags_of_files(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    etag = Content(path).etag
    assert Content(path).etag == etag
    assert Content(path).view == CONTENT
    assert Content(path, '"own"').etag == '"own"'
    path.write_bytes(CONTENT[:-1])
    assert Content(path).etag != etag


async def test_latency_and_bandwidth() -> None:
    async with FaultServer(CONTENT, latency_s=0.05, bytes_per_s=2_000_000) as server:
        begun_s = time.monotonic()
        answers = await asyncio.gather(*(one(server) for _ in range(4)))
        taken_s = time.monotonic() - begun_s
        for answer in answers:
            assert_right(answer)
        assert taken_s > 0.05 + 4 * COUNT / 2_000_000 - 0.01, "all connections share the link"
        server.shape(latency_s=0, bytes_per_s=0)
        assert_right(await one(server))


# -- requests that fail ---


async def test_cut_bodies() -> None:
    async with FaultServer(CONTENT, "truncate") as server:
        for fault, end in (("truncate", "FIN"), ("reset", "RST")):
            server.set_faults(fault, seed=1)
            answers = [await one(server) for _ in range(8)]
            for answer in answers:
                assert answer.end == end
                assert answer.headers["content-length"] == str(COUNT)
                assert answer.body == RIGHT[: len(answer.body)]
            lengths = [len(answer.body) for answer in answers]
            assert len(set(lengths)) > 4
            assert max(lengths) < COUNT
            server.set_faults(fault)
            assert [len((await one(server)).body) for _ in range(8)] == lengths, (
                "the same seed, the same cuts"
            )


async def test_resets_and_silence_before_the_head() -> None:
    async with FaultServer(CONTENT, "reset-head") as server:
        answer = await one(server)
        assert (answer.body, answer.end) == (b"", "RST")
        server.set_faults("stall-head")
        async with connected(server) as wire:
            await wire.ask()
            await server.until(lambda: server.stalled == 1)
            server.release()
            assert_right(await wire.answer())
        server.set_faults("stall-head=1:0.01")
        assert_right(await one(server))


async def test_stall_in_the_body() -> None:
    async with FaultServer(CONTENT, "stall") as server:
        async with connected(server) as wire:
            await wire.ask()
            await server.until(lambda: server.stalled == 1)
            part = await wire.answer(0.02)
            assert part.end == "open"
            assert part.body == RIGHT[: len(part.body)]
            assert len(part.body) < COUNT
            server.release()
            rest = await wire.reader.readexactly(COUNT - len(part.body))
            assert part.body + rest == RIGHT
            await wire.ask()  # the connection is as good as before
            await server.until(lambda: server.stalled == 1)
        await server.until(lambda: server.open_connections == 0)  # it notices that the client left


async def test_drip() -> None:
    async with FaultServer(CONTENT, "drip=1:1000000") as server:
        begun_s = time.monotonic()
        assert_right(await one(server))
        assert time.monotonic() - begun_s > COUNT / 1_000_000 - 0.01
        server.set_faults("drip")
        async with connected(server) as wire:
            await wire.ask()
            part = await wire.answer(0.1)
            assert 0 < len(part.body) < COUNT / 2
            assert part.body == RIGHT[: len(part.body)]


async def test_answers_that_must_not_be_used() -> None:
    async with FaultServer(CONTENT) as server:
        server.force("whole", "other-etag", "no-etag", "wrong-length", "wrong-length", "encoding")
        whole = await one(server)
        assert (whole.status, len(whole.body)) == (200, len(CONTENT))
        assert whole.body[FIRST : FIRST + COUNT] == TURNED_OVER
        assert "content-range" not in whole.headers
        other = await one(server)
        assert other.body == TURNED_OVER
        assert other.headers["etag"] != ETAG
        assert "etag" not in (await one(server)).headers
        for _ in range(2):
            wrong = await one(server)
            assert wrong.headers["content-range"] == f"bytes {FIRST}-{FIRST + COUNT - 1}/{len(CONTENT)}"
            assert int(wrong.headers["content-length"]) == len(wrong.body) != COUNT
            assert wrong.body[:1] == TURNED_OVER[:1]
        coded = await one(server)
        assert (coded.headers["content-encoding"], coded.body) == ("gzip", TURNED_OVER)
        assert server.ledger.served().total_bytes == 0
        assert server.ledger.faults["wrong-length"] == 2
        assert_right(await one(server))


@pytest.mark.parametrize(("first", "count"), [(FIRST, COUNT), (0, len(CONTENT)), (0, 1), (299_999, 1)])
async def test_another_range(first: int, count: int) -> None:
    async with FaultServer(CONTENT, "other-range") as server, connected(server) as wire:
        for _ in range(6):
            await wire.ask(first, count)
            answer = await wire.answer()
            begin, end = map(int, answer.headers["content-range"].split()[1].split("/")[0].split("-"))
            assert (begin, end) != (first, first + count - 1)
            assert 0 <= begin <= end < len(CONTENT)
            assert answer.body == CONTENT[begin : end + 1]
            assert answer.headers["content-length"] == str(len(answer.body))


async def test_statuses() -> None:
    async with FaultServer(CONTENT, "error") as server:
        assert {(await one(server)).status for _ in range(20)} == {500, 502, 503, 504}
        server.set_faults("error=1:503")
        assert (await one(server)).status == 503
        server.set_faults("busy=1:2")
        answer = await one(server)
        assert (answer.status, answer.headers["retry-after"]) == (429, "2")
        server.set_faults("no-http")
        answer = await one(server)
        assert (answer.status, answer.end) == (0, "FIN")
        assert answer.body


async def test_redirects() -> None:
    async with FaultServer(CONTENT, "redirect") as server:
        moved = (await one(server)).headers["location"]
        assert_right(await one(server, path=moved))
        server.expire()
        assert (await one(server, path=moved)).status == 403
        fresh = (await one(server)).headers["location"]
        assert_right(await one(server, path=fresh))
        for fault, places in (("redirect-always", 12), ("redirect-loop", 2)):
            server.set_faults(f"{fault}=0.5", seed=4)
            path, seen = "/image", []
            while path == "/image":
                path = (await one(server)).headers.get("location", "/image")
            for _ in range(12):
                answer = await one(server, path=path)
                assert (answer.status, answer.body) == (302, b"")
                path = answer.headers["location"]
                seen.append(path)
            assert len(set(seen)) == places
            server.set_faults("")
            assert_right(await one(server, path=path))


async def test_hangup_says_nothing_of_it() -> None:
    async with FaultServer(CONTENT, "hangup") as server, connected(server) as wire:
        await wire.ask()
        answer = await wire.answer()
        assert_right(answer)
        assert "connection" not in answer.headers
        assert await wire.end() == "FIN"


async def test_forced_faults_come_in_order() -> None:
    async with FaultServer(CONTENT) as server, connected(server) as wire:
        server.force("error", "busy")
        with pytest.raises(ValueError, match="no fault of a request"):
            server.force("mute")
        for status in (503, 429, 206):
            await wire.ask()
            assert (await wire.answer()).status in ({500, 502, 504, 503} if status == 503 else {status})


# -- connections that fail ---


async def test_dropped_and_mute_connections() -> None:
    async with FaultServer(CONTENT, "drop") as server:
        async with connected(server) as wire:
            assert await wire.end() == "RST"
        server.set_faults("mute")
        answer = await one(server, 0.03)
        assert (answer.body, answer.end) == (b"", "open")
        await server.until(lambda: server.open_connections == 0)
        server.set_faults("")
        assert_right(await one(server))


async def test_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    stranger = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    stranger.load_cert_chain(tmp_path / "stranger.pem", tmp_path / "stranger.key")
    server = FaultServer(CONTENT, tls=server_context(tmp_path), stranger=stranger)
    trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    async with server, asyncio.timeout(DEADLINE_S):
        assert server.url().startswith("https://127.0.0.1:")
        async with connected(server, trust) as wire:
            for _ in range(2):
                await wire.ask()
                assert_right(await wire.answer())
            server.set_faults("truncate")
            await wire.ask()
            answer = await wire.answer()
            assert (answer.end, answer.body) == ("FIN", RIGHT[: len(answer.body)])
        server.set_faults("stranger")
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connected(server, trust):
                pass
        server.set_faults("plain-http")
        with pytest.raises(ssl.SSLError, match=r"(?i)wrong.version.number"):
            async with connected(server, trust):
                pass
        server.set_faults("reset")
        async with connected(server, trust) as wire:
            await wire.ask()
            assert (await wire.answer()).end == "RST"
        server.set_faults("mute")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), connected(server, trust):
                pass


# -- a server that is away ---


async def test_gone_and_back() -> None:
    async with FaultServer(CONTENT, "stall") as server:
        async with connected(server) as wire:
            await wire.ask()
            await server.until(lambda: server.stalled == 1)
            await server.gone()
            assert (await wire.answer()).end == "RST"
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", server.port)
        server.set_faults("")
        server.back()
        assert_right(await one(server))
        await server.gone()


async def test_blackhole_and_back() -> None:
    async with FaultServer(CONTENT, bytes_per_s=1_000_000) as server:
        async with connected(server) as running, connected(server) as idle:
            await running.ask()
            part = await running.answer(0.03)
            assert 0 < len(part.body) < COUNT
            server.blackhole()
            async with connected(server) as fresh:  # the kernel takes it
                await fresh.ask()
                await idle.ask()
                assert (await fresh.answer(0.02)).end == "open"
                assert (await idle.answer(0.02)).body == b""
                got = len(server.ledger.entries)
                server.back()
                assert_right(await fresh.answer())
                assert_right(await idle.answer())
                assert len(server.ledger.entries) == got + 2
            rest = RIGHT[len(part.body) :]
            more = await running.reader.read(-1) if not rest else await running.reader.readexactly(len(rest))
            assert more == rest
        server.blackhole()
        await server.gone()
        server.blackhole()


async def test_closing_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    async with FaultServer(CONTENT, "stall") as server:
        async with connected(server) as wire:
            await wire.ask()
            await server.until(lambda: server.stalled == 1)
            await server.aclose()
            assert (await wire.answer()).end == "RST"
            assert asyncio.all_tasks() == before
        await server.start()


def test_faults_of_tls_need_tls() -> None:
    with pytest.raises(ValueError, match="server with TLS"):
        FaultServer(CONTENT, "plain-http")
