"""Every wrong answer gets the verdict of the table in remote/http.py, in one sentence that says what came."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.integration.servers import (
    WAYS,
    Connection,
    OddServer,
    Request,
    Script,
    make_certificates,
    opened,
    remote_settings,
    server_context,
)
from tierblk import errors
from tierblk.errors import RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import http
from tierblk.remote.http import HttpSource, open_http

CONTENT = bytes(range(256)) * 512
OFFSET, LENGTH = 4096, 65536
ASKED = f"asked for bytes {OFFSET}-{OFFSET + LENGTH - 1}"

VERDICTS: dict[str, type[TierblkError]] = {
    row.strip(): getattr(errors, verdict)
    for row, verdict in re.findall(
        r"^    (\S.*?) {2,}(Remote(?:Unavailable|Refused|Mismatch))$", http.__doc__ or "", re.MULTILINE
    )
}

Answer = Callable[[OddServer, Request, Connection], Awaitable[None]]


def head(status: str = "206 Partial Content", **changes: str | None) -> Answer:
    """The right answer with another status, or with some headers changed."""

    async def answer(server: OddServer, request: Request, client: Connection) -> None:
        await client.send(server.head(request, status, **changes), server.body(request))

    return answer


def bare(text: str = "206 Partial Content", **changes: str | None) -> Answer:
    """A head, and nothing after it."""

    async def answer(server: OddServer, request: Request, client: Connection) -> None:
        await client.send(server.head(request, text, **changes))

    return answer


def status(text: str) -> Answer:
    """An answer without a body."""
    return bare(text, content_range=None, content_length="0", etag=None)


async def silence(server: OddServer, request: Request, client: Connection) -> None:
    await client.stall()


async def half_a_body(server: OddServer, request: Request, client: Connection) -> None:
    await client.send(server.head(request), server.body(request)[:1000])
    await client.stall()


async def close_at_once(server: OddServer, request: Request, client: Connection) -> None:
    await client.reset()


async def close_in_the_body(server: OddServer, request: Request, client: Connection) -> None:
    await client.send(server.head(request), server.body(request)[:-1])
    client.writer.close()


async def no_http(server: OddServer, request: Request, client: Connection) -> None:
    await client.send(b"SSH-2.0-nobody\r\n\r\n")


def chunked(*pieces: int) -> Answer:
    """A body of chunks of these lengths, so that the head does not say how long it is."""

    async def answer(server: OddServer, request: Request, client: Connection) -> None:
        await client.send(server.head(request, content_length=None, transfer_encoding="chunked"))
        for length in pieces:
            await client.send(b"%x\r\n%s\r\n" % (length, bytes(length)))
        await client.send(b"0\r\n\r\n")

    return answer


CASES: list[tuple[str, str, Answer]] = [
    ("connection closed before an answer", "the connection was lost", close_at_once),
    ("no byte for read_timeout, before or in the body", "stalled", silence),
    ("no byte for read_timeout, before or in the body", "stalled", half_a_body),
    ("body shorter than announced", "in the middle of the body", close_in_the_body),
    ("body shorter than announced", "ended after 5 of 65536 bytes", chunked(5)),
    ("status 408, 429 or 5xx", "status 408", status("408 Request Timeout")),
    ("status 408, 429 or 5xx", "status 429", status("429 Too Many Requests")),
    ("status 408, 429 or 5xx", "status 500", status("500 Internal Server Error")),
    ("status 408, 429 or 5xx", "status 503", status("503 Slow Down")),
    ("something that is not HTTP", "not HTTP", no_http),
    ("redirect without or with an unusable Location", "no Location", status("302 Found")),
    (
        "redirect without or with an unusable Location",
        "leads to 'file:///etc/passwd'",
        head("302 Found", location="file:///etc/passwd"),
    ),
    (
        "redirect without or with an unusable Location",
        "cannot be asked",
        head("302 Found", location=f"http://{'a' * 70}.example/"),
    ),
    ("more than 5 redirects, or a loop of them", "more than 5 times", head("308 Moved", location="/image")),
    ("status 200: the range was ignored", "200 with the whole file", head("200 OK", content_range=None)),
    ("status 401, 403, 404, 410 or any other 4xx", "(401)", status("401 Unauthorized")),
    ("status 401, 403, 404, 410 or any other 4xx", "(403)", status("403 Forbidden")),
    ("status 401, 403, 404, 410 or any other 4xx", "(404)", status("404 Not Found")),
    ("status 401, 403, 404, 410 or any other 4xx", "(410)", status("410 Gone")),
    (
        "status 412, or a 416 that names another size",
        'opened as ETag "one", 131072 bytes, and the server now has ETag "one", 9 bytes',
        head("416 No", content_range="bytes */9"),
    ),
    (
        "status 412 or 416 though the version and size are there",
        "(416, 'bytes */131072')",
        head("416 No", content_range="bytes */131072"),
    ),
    ("status 401, 403, 404, 410 or any other 4xx", "got status 418", status("418 Teapot")),
    ("any other status", "got status 304", status("304 Not Modified")),
    (
        "206 with another ETag, Last-Modified or total size",
        'opened as ETag "one", 131072 bytes, and the server now has ETag "two"',
        head(etag='"two"'),
    ),
    (
        "206 with another ETag, Last-Modified or total size",
        'now has ETag W/"one"',
        head(etag='W/"one"'),
    ),
    (
        "206 with another ETag, Last-Modified or total size",
        "now has 131072 bytes",
        head(etag=None),
    ),
    (
        "206 with another ETag, Last-Modified or total size",
        "now has ETag",
        head(content_range=f"bytes {OFFSET}-{OFFSET + LENGTH - 1}/131073"),
    ),
    (
        "Content-Encoding other than identity",
        "came with Content-Encoding 'gzip'",
        head(content_encoding="gzip"),
    ),
    (
        "Content-Type multipart/byteranges",
        "multipart/byteranges",
        head(content_type="multipart/byteranges; boundary=x"),
    ),
    (
        "Content-Range missing, malformed or of another range",
        "has no Content-Range",
        head(content_range=None),
    ),
    (
        "Content-Range missing, malformed or of another range",
        "does not say which it has",
        head(content_range="bytes */131072"),
    ),
    (
        "Content-Range missing, malformed or of another range",
        "does not say which it has",
        head(content_range=f"bytes {OFFSET}-{OFFSET + LENGTH - 1}/*"),
    ),
    (
        "Content-Range missing, malformed or of another range",
        "got Content-Range 'bytes 0-65535/131072'",
        head(content_range="bytes 0-65535/131072"),
    ),
    ("Content-Length other than the range's", "Content-Length '65535'", bare(content_length="65535")),
    ("Content-Length other than the range's", "Content-Length '65537'", bare(content_length="65537")),
    ("body longer than the range", "more than 65536 bytes", chunked(65536, 1)),
]


def after_probe(server: OddServer, answer: Answer) -> Script:
    """Right answers until the source is open, then this one."""

    async def script(request: Request, client: Connection) -> None:
        if request.is_probe:
            await server.right(request, client)
        else:
            await answer(server, request, client)

    return script


async def fails(source: HttpSource, *, some_bytes: bool = False) -> TierblkError:
    """The error that a read ends in. Bytes count as arrived only if all was right until then (I6)."""
    buffer, arrived = bytearray(LENGTH), [0]
    async with aclosing(source):
        with pytest.raises(TierblkError) as caught:
            await source.read_into(OFFSET, memoryview(buffer), arrived.append)
    assert buffer[: arrived[-1]] == CONTENT[OFFSET : OFFSET + arrived[-1]]
    assert (arrived[-1] > 0) is some_bytes
    return caught.value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("row", "message", "answer"), CASES, ids=[f"{number}-{case[1]}" for number, case in enumerate(CASES)]
)
async def test_wrong_answer(row: str, message: str, answer: Answer, way: str) -> None:
    async with OddServer(CONTENT) as server:
        server.script = after_probe(server, answer)
        source = await opened(server, way, remote_settings(read_timeout="200ms"))
        error = await fails(source, some_bytes=answer in (half_a_body, close_in_the_body))
        assert type(error) is VERDICTS[row]
        assert message in str(error)
        assert server.url() in str(error)
        assert ASKED in str(error) or "has changed" in str(error)
        assert "\n" not in str(error)


async def test_every_row_of_the_table_is_tried() -> None:
    elsewhere = {
        "host name does not resolve",
        "connection refused",
        "connection not established within connect_timeout",
        "certificate not trusted, or no TLS behind https://",
        "redirect from https to http",
    }
    assert {row for row, _, _ in CASES} | elsewhere == set(VERDICTS)


async def opening_fails(url: str, row: str, **keys: object) -> str:
    """The message with which open_http ends, after a look at its class."""
    with pytest.raises(TierblkError) as caught:
        await open_http(url, remote_settings(**keys))
    assert type(caught.value) is VERDICTS[row]
    assert url in str(caught.value)
    return str(caught.value)


async def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    message = await opening_fails("http://nowhere.example/image", "host name does not resolve")
    assert "nowhere.example" in message


async def test_connection_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    message = await opening_fails(f"http://127.0.0.1:{port}/image", "connection refused")
    assert f"no connection to 127.0.0.1:{port}: Connection refused" in message


async def test_connection_in_vain() -> None:
    async with OddServer(CONTENT) as server:  # it waits for a request, the client for the TLS handshake
        url = server.url().replace("http:", "https:")
        row = "connection not established within connect_timeout"
        assert "in time" in await opening_fails(url, row, connect_timeout="100ms")


async def test_from_https_to_http(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    async with OddServer(CONTENT, tls=server_context(tmp_path)) as server:

        async def script(request: Request, client: Connection) -> None:
            await head("307 Moved", location=server.url().replace("https:", "http:"))(server, request, client)

        server.script = script
        message = await opening_fails(
            server.url(), "redirect from https to http", ca_file=str(tmp_path / "ca.pem")
        )
        assert "unencrypted" in message


async def test_stranger_certificate(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    async with OddServer(CONTENT, tls=server_context(tmp_path)) as server:
        row = "certificate not trusted, or no TLS behind https://"
        assert "not trusted" in await opening_fails(server.url(), row, ca_file=str(tmp_path / "stranger.pem"))


async def test_server_without_ranges() -> None:
    async with OddServer(CONTENT) as server:

        async def script(request: Request, client: Connection) -> None:
            everything = Request(request.path, {}, 0, len(CONTENT) - 1)
            await client.send(server.head(everything, "200 OK", content_range=None), server.body(everything))

        server.script = script
        with pytest.raises(RemoteRefused, match="ignored the range") as caught:
            await open_http(server.url(), remote_settings())
        assert "range requests" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("etag", "last_modified", "validator", "condition"),
    [
        ('"one"', None, 'etag:"one"', ("if-match", '"one"')),
        ('"one"', "Mon, 01 Jun 2026 00:00:00 GMT", 'etag:"one"', ("if-match", '"one"')),
        (
            'W/"one"',
            "Mon, 01 Jun 2026 00:00:00 GMT",
            "last-modified:Mon, 01 Jun 2026 00:00:00 GMT",
            ("if-unmodified-since", "Mon, 01 Jun 2026 00:00:00 GMT"),
        ),
        ('W/"one"', None, f"size:{len(CONTENT)}", None),
        ("unquoted", None, f"size:{len(CONTENT)}", None),
        (None, None, f"size:{len(CONTENT)}", None),
    ],
)
async def test_what_is_pinned(
    etag: str | None,
    last_modified: str | None,
    validator: str,
    condition: tuple[str, str] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with OddServer(CONTENT, etag=etag, last_modified=last_modified) as server:
        source = await open_http(server.url(), remote_settings())
        assert source.identity.validator == validator
        assert ("no strong ETag" in caplog.text) == (not validator.startswith("etag:"))
        buffer = bytearray(LENGTH)
        await source.read_into(OFFSET, memoryview(buffer), lambda count: None)
        assert buffer == CONTENT[OFFSET : OFFSET + LENGTH]
        sent = server.requests[-1].headers
        conditions = {name: text for name, text in sent.items() if name.startswith("if-")}
        assert conditions == (dict([condition]) if condition else {})
        assert sent["accept-encoding"] == "identity"
        await source.aclose()


@pytest.mark.parametrize(
    ("etag", "last_modified", "later"),
    [
        ('W/"one"', None, {"etag": 'W/"two"'}),
        ('W/"one"', "Mon, 01 Jun 2026 00:00:00 GMT", {"last_modified": "Tue, 02 Jun 2026 00:00:00 GMT"}),
        (None, "Mon, 01 Jun 2026 00:00:00 GMT", {"last_modified": None}),
    ],
)
async def test_weak_pins_are_compared_on_every_answer(
    etag: str | None, last_modified: str | None, later: dict[str, str | None]
) -> None:
    async with OddServer(CONTENT, etag=etag, last_modified=last_modified) as server:
        server.script = after_probe(server, head("206 Partial Content", **later))
        error = await fails(await open_http(server.url(), remote_settings()))
        assert isinstance(error, RemoteRefused)
        assert "has changed" in str(error)


async def test_same_strong_etag_uploaded_again_is_no_change() -> None:
    async with OddServer(CONTENT, last_modified="Mon, 01 Jun 2026 00:00:00 GMT") as server:
        server.script = after_probe(server, head(last_modified="Tue, 02 Jun 2026 00:00:00 GMT"))
        source = await open_http(server.url(), remote_settings())
        await source.read_into(OFFSET, memoryview(bytearray(LENGTH)), lambda count: None)
        await source.aclose()


async def test_412_names_both_versions() -> None:
    async with OddServer(CONTENT) as server:
        source = await open_http(server.url(), remote_settings())

        async def script(request: Request, client: Connection) -> None:
            if "if-match" in request.headers:
                await status("412 Precondition Failed")(server, request, client)
            else:
                await head(etag='"three"')(server, request, client)

        server.script = script
        error = await fails(source)
        assert 'opened as ETag "one", 131072 bytes, and the server now has ETag "three"' in str(error)


async def test_412_though_the_version_is_there() -> None:
    async def answer(server: OddServer, request: Request, client: Connection) -> None:
        if "if-match" in request.headers:
            await status("412 Precondition Failed")(server, request, client)
        else:
            await server.right(request, client)

    async with OddServer(CONTENT) as server:
        server.script = after_probe(server, answer)
        source = await open_http(server.url(), remote_settings())
        server.script = lambda request, client: answer(server, request, client)
        error = await fails(source)
        assert isinstance(error, RemoteMismatch)
        assert "412 though the version asked for is there" in str(error)


async def test_412_from_a_server_that_says_no_more() -> None:
    async with OddServer(CONTENT) as server:
        server.script = after_probe(server, status("412 Precondition Failed"))
        source = await open_http(server.url(), remote_settings())
        server.script = lambda request, client: status("412 No")(server, request, client)
        error = await fails(source)
        assert isinstance(error, RemoteRefused)
        assert "does not have that version any more (412)" in str(error)


async def test_chunked_206_is_read_the_ordinary_way() -> None:
    async with OddServer(CONTENT) as server:
        server.content = bytes(len(CONTENT))
        server.script = after_probe(server, chunked(1, 65000, 535))
        source = await open_http(server.url(), remote_settings())
        buffer, seen = bytearray(b"?" * LENGTH), list[int]()
        await source.read_into(OFFSET, memoryview(buffer), seen.append)
        assert buffer == bytes(LENGTH)
        assert seen == [LENGTH], "before its end nothing proves that the body has the right length"
        assert (source.direct_bodies, source.read_bodies) == (0, 1)
        await source.aclose()


async def test_interim_answers_come_first() -> None:
    async def answer(server: OddServer, request: Request, client: Connection) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        await client.send(early + early + server.head(request)[:40])
        await client.send(server.head(request)[40:] + server.body(request))

    async with OddServer(CONTENT) as server:
        server.script = after_probe(server, answer)
        source = await open_http(server.url(), remote_settings())
        buffer = bytearray(LENGTH)
        await source.read_into(OFFSET, memoryview(buffer), lambda count: None)
        assert buffer == CONTENT[OFFSET : OFFSET + LENGTH]
        assert source.direct_bodies == 1
        await source.aclose()


async def test_bytes_behind_the_body_end_the_connection() -> None:
    async def answer(server: OddServer, request: Request, client: Connection) -> None:
        await client.send(server.head(request) + server.body(request) + b"HTTP/1.1 206 Smuggled\r\n\r\n")

    async with OddServer(CONTENT) as server:
        server.script = after_probe(server, answer)
        source = await open_http(server.url(), remote_settings())
        for _ in range(3):
            buffer = bytearray(100)  # short, so that all comes at once
            await source.read_into(OFFSET, memoryview(buffer), lambda count: None)
            assert buffer == CONTENT[OFFSET : OFFSET + 100]
        assert server.connections == 3
        await source.aclose()


async def test_error_does_not_hurt_the_next_read() -> None:
    async with OddServer(CONTENT) as server:
        source = await open_http(server.url(), remote_settings(read_timeout="200ms"))
        for _, _, answer in CASES:
            server.script = after_probe(server, answer)
            with pytest.raises((RemoteRefused, RemoteUnavailable)):
                await source.read_into(OFFSET, memoryview(bytearray(LENGTH)), lambda count: None)
            server.script = None
            buffer = bytearray(LENGTH)
            await source.read_into(OFFSET, memoryview(buffer), lambda count: None)
            assert buffer == CONTENT[OFFSET : OFFSET + LENGTH]
        await source.aclose()
