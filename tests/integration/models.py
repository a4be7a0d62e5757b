"""Small servers of ours on loopback, for what cannot be run here: a function says what they answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, unquote

PAGE_OBJECTS = 100


@dataclass(frozen=True)
class Asked:
    """raw_path: as it came, without the query. query: decoded. headers: names in lower case."""

    method: str
    raw_path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: bytes

    def word(self, name: str) -> str:
        """What the query says of a name; empty when it says nothing."""
        return dict(self.query).get(name, "")

    @property
    def path(self) -> str:
        """Decoded."""
        return unquote(self.raw_path)


@dataclass(frozen=True)
class Answered:
    """Date and Content-Length come by themselves."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class _Threads(ThreadingHTTPServer):
    request_queue_size = 64  # with 5, eight that connect at once wait for a second
    daemon_threads = True
    block_on_close = False  # connections stay open until their clients go


class Server:
    """Threads that answer as a function says; a context manager."""

    def __init__(self, answers: Callable[[Asked], Answered]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1  # an answer is one packet

            def _answer(self) -> None:
                raw_path, _, query = self.path.partition("?")
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                headers = {name.lower(): value for name, value in self.headers.items()}
                pairs = parse_qsl(query, keep_blank_values=True)
                answered = answers(Asked(self.command, raw_path, pairs, headers, body))
                self.send_response(answered.status)
                for name, value in answered.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answered.body)))
                self.end_headers()
                self.wfile.write(answered.body)

            do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815  # names of http.server

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = _Threads(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Kept:
    """An object of a model."""

    body: bytes
    born_unix_s: float


class Shelf:
    """The objects of a model. is_liar: it takes a second creation of a name for the first one."""

    def __init__(self) -> None:
        self.is_liar = False
        self._kept: dict[str, Kept] = {}
        self._lock = threading.Lock()

    def put(self, key: str, body: bytes, *, only_new: bool) -> bool:
        """Whether it was kept."""
        with self._lock:
            if key in self._kept and only_new and not self.is_liar:
                return False
            self._kept[key] = Kept(body, time.time())
            return True

    def get(self, key: str) -> Kept | None:
        """The object."""
        with self._lock:
            return self._kept.get(key)

    def drop(self, key: str) -> bool:
        """Whether there was one."""
        with self._lock:
            return self._kept.pop(key, None) is not None

    def page(self, prefix: str, first: str, behind: str = "") -> tuple[list[tuple[str, Kept]], str]:
        """A page of what begins with prefix, from `first` on and behind `behind`; the key of the next one."""
        with self._lock:
            keys = [key for key in sorted(self._kept) if key.startswith(prefix) and key >= first]
            keys = [key for key in keys if key > behind][: PAGE_OBJECTS + 1]
            more = keys[PAGE_OBJECTS] if len(keys) > PAGE_OBJECTS else ""
            return [(key, self._kept[key]) for key in keys[:PAGE_OBJECTS]], more


def in_range(kept: Kept, text: str | None) -> tuple[int, bytes, dict[str, str]]:
    """(status, body, headers) of a GET with that Range."""
    whole = kept.body
    if text is None:
        return 200, whole, {}
    first, last = map(int, text.removeprefix("bytes=").split("-"))
    if first >= len(whole):
        return 416, b"", {"Content-Range": f"bytes */{len(whole)}"}
    part = whole[first : last + 1]
    return 206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(whole)}"}
