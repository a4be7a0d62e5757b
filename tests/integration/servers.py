"""Servers on loopback for tests of the remote tier: nginx (plain and TLS), and one that answers as told."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import shutil
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tierblk.config import RemoteSettings
from tierblk.remote.http import HttpSource, open_http

STOP_S = 20.0

NGINX_CONF = """\
daemon off;
user {user};
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/error.log info;
events {{ worker_connections 512; }}
http {{
    log_format line '$connection $connection_requests $status "$request_uri" "$http_range" $body_bytes_sent';
    access_log {home}/access.log line;
    client_body_temp_path {home}/tmp; proxy_temp_path {home}/tmp; fastcgi_temp_path {home}/tmp;
    uwsgi_temp_path {home}/tmp; scgi_temp_path {home}/tmp;
    sendfile on;
    keepalive_requests 100000;
    server {{
        listen {plain};
        root {root};
        location /moved/ {{ rewrite ^/moved/(.*)$ http://{plain}/$1 redirect; }}
        location /secure/ {{ rewrite ^/secure/(.*)$ https://{tls}/$1 redirect; }}
        location /loop/ {{ rewrite ^ http://{plain}$uri redirect; }}
    }}
    server {{
        listen {tls} ssl;
        ssl_certificate {home}/server.pem;
        ssl_certificate_key {home}/server.key;
        root {root};
        location /insecure/ {{ rewrite ^/insecure/(.*)$ http://{plain}/$1 redirect; }}
    }}
}}
"""


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def make_certificates(home: Path) -> None:
    """A throw-away CA (ca.pem), its certificate for 127.0.0.1 (server.pem, server.key), and another CA."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for name in ("ca", "stranger"):
        where = ["-keyout", str(home / f"{name}.key"), "-out", str(home / f"{name}.pem")]
        _openssl("req", "-x509", *key, "-subj", f"/CN=tierblk test {name}", *where)
    _openssl(
        *("req", "-x509", *key, "-subj", "/CN=127.0.0.1"),
        *("-CA", str(home / "ca.pem"), "-CAkey", str(home / "ca.key")),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"),
        *("-keyout", str(home / "server.key"), "-out", str(home / "server.pem")),
    )


@dataclass(frozen=True)
class LogLine:
    """One request as nginx saw it."""

    connection: int
    request_of_connection: int
    status: int
    uri: str
    range: str
    body_bytes: int


class Nginx:
    """A real nginx that serves the folder root on two loopback ports, until the with block ends.

    The ports are bound here and handed to nginx the way its own upgrade does it: they are free for certain,
    and a client that connects before nginx is up waits in the queue, so nobody polls. home: for its files.
    """

    def __init__(self, home: Path, root: Path) -> None:
        self._home = home
        self._root = root
        self.ca_file = home / "ca.pem"
        self.stranger_ca_file = home / "stranger.pem"

    def __enter__(self) -> Self:
        make_certificates(self._home)
        sockets = [socket.create_server(("127.0.0.1", 0), backlog=256) for _ in range(2)]
        self.plain, self.tls = ("{}:{}".format(*each.getsockname()) for each in sockets)
        config = self._home / "nginx.conf"
        config.write_text(
            NGINX_CONF.format(
                user=f"{pwd.getpwuid(os.geteuid()).pw_name} {grp.getgrgid(os.getegid()).gr_name}",
                home=self._home,
                root=self._root,
                plain=self.plain,
                tls=self.tls,
            )
        )
        # sbin is not in everybody's PATH
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if program is None:
            raise FileNotFoundError("nginx is not installed (Debian: apt-get install nginx-light)")
        self._output = (self._home / "output").open("wb")
        self._process = subprocess.Popen(
            [program, "-p", str(self._home), "-c", str(config), "-e", str(self._home / "error.log")],
            env={**os.environ, "NGINX": "".join(f"{each.fileno()};" for each in sockets)},
            pass_fds=[each.fileno() for each in sockets],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        for each in sockets:
            each.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.close()
        if self._process.poll() is not None:
            said = (self._home / "output").read_text() + (self._home / "error.log").read_text()
            raise RuntimeError(f"nginx ended by itself ({self._process.returncode}): {said}")
        self._process.terminate()
        self._process.wait(STOP_S)

    def url(self, path: str, *, tls: bool = False) -> str:
        """The address of a file below root."""
        return f"https://{self.tls}/{path}" if tls else f"http://{self.plain}/{path}"

    def log(self) -> list[LogLine]:
        """All requests whose answers were sent completely or broken off, so far."""
        lines = []
        for line in (self._home / "access.log").read_text().splitlines():
            connection, nth, status, uri, *byte_range, body_bytes = line.split()
            lines.append(
                LogLine(
                    int(connection),
                    int(nth),
                    int(status),
                    uri.strip('"'),
                    " ".join(byte_range).strip('"'),
                    int(body_bytes),
                )
            )
        return lines


def server_context(home: Path) -> ssl.SSLContext:
    """For a TLS server with the certificate that make_certificates put into home."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(home / "server.pem", home / "server.key")
    return context


WAYS = ("direct", "again", "read")
"""How a body can come: into the buffer, by aiohttp's client; the same by a request that goes around it, over
a connection that is there; out of aiohttp's stream."""


async def opened(server: OddServer, way: str, settings: RemoteSettings) -> HttpSource:
    """A source whose next read goes that way."""
    source = await open_http(server.url(), settings, may_go_direct=way != "read")
    if way == "again":
        script, server.script = server.script, None
        await source.read_into(0, memoryview(bytearray(4096)), lambda count: None)
        assert source.direct_bodies == 1
        server.script = script
    return source


def remote_settings(**keys: object) -> RemoteSettings:
    """The table [remote] as a config file would say it; a retry waits as little as it may."""
    return RemoteSettings.model_validate({"retry_delay": "1ms", **keys})


@dataclass(frozen=True)
class Request:
    """What a client sent, header names in lower case."""

    path: str
    headers: dict[str, str]
    first_byte: int
    last_byte: int

    @property
    def is_probe(self) -> bool:
        """Whether it is the first look of a source."""
        return self.last_byte == 0


@dataclass
class Connection:
    """One client, as a script sees it. hold: set it to let go whoever waits in `stall`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    hold: asyncio.Event

    async def send(self, *parts: bytes) -> None:
        """Put bytes on the wire, whatever they are."""
        for part in parts:
            self.writer.write(part)
        await self.writer.drain()

    async def stall(self) -> None:
        """Say nothing more until the server stops."""
        await self.hold.wait()

    async def reset(self) -> None:
        """End the connection here."""
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed its end."""
        with suppress(ConnectionError):
            await self.reader.read()


Script = Callable[[Request, Connection], Awaitable[None]]


@dataclass
class OddServer:
    """An HTTP server that gives right answers out of `content`, or whatever a script does instead.

    script: gets every request; it may call `right`, or send what it likes. requests: all that came.
    """

    content: bytes
    script: Script | None = None
    etag: str | None = '"one"'
    last_modified: str | None = None
    tls: ssl.SSLContext | None = None
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    async def __aenter__(self) -> Self:
        self._hold = asyncio.Event()
        self.connected = asyncio.Event()  # somebody was here
        self._running: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hold.set()
        self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def url(self, path: str = "image") -> str:
        """The address of a path of this server."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/{path}"

    def head(self, request: Request, status: str = "206 Partial Content", **changes: str | None) -> bytes:
        """The head of the right answer. changes: headers by name, _ for -; None leaves one out."""
        headers: dict[str, str | None] = {
            "content_range": f"bytes {request.first_byte}-{request.last_byte}/{len(self.content)}",
            "content_length": str(request.last_byte + 1 - request.first_byte),
            "etag": self.etag,
            "last_modified": self.last_modified,
        }
        headers |= changes
        lines = [
            f"{name.replace('_', '-').title()}: {text}\r\n"
            for name, text in headers.items()
            if text is not None
        ]
        return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode("latin-1")

    def body(self, request: Request) -> bytes:
        """The bytes that a request asks for."""
        return self.content[request.first_byte : request.last_byte + 1]

    async def right(self, request: Request, client: Connection) -> None:
        """Answer as a good server does."""
        await client.send(self.head(request), self.body(request))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self.connections += 1
        self.connected.set()
        client = Connection(reader, writer, self._hold)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    request = _parse(await reader.readuntil(b"\r\n\r\n"))
                    self.requests.append(request)
                    await (self.script or self.right)(request, client)
        except asyncio.CancelledError:
            pass  # the server stops
        finally:
            self._running.discard(task)
            writer.transport.abort()


def _parse(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): text.strip() for name, text in (line.split(":", 1) for line in lines)}
    begin, end = headers["range"].removeprefix("bytes=").split("-")
    return Request(first.split()[1], headers, int(begin), int(end))
