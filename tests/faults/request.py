"""Requests as they come over the wire, parsed. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.faults.content import Content

HEAD_BYTES_MAX = 32 * 1024

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_MOVED = re.compile(r"/(moved|chain|loop)/(\d{1,9})(/.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent, header names in lower case. path: without the part that a redirect of this server
    put before it; that part is (via, hop), ("", 0) when there is none."""

    method: str
    path: str
    via: str
    hop: int
    headers: dict[str, str]

    @property
    def wants_close(self) -> bool:
        """Whether the client ends the connection after this answer."""
        return self.headers.get("connection", "").lower() == "close"

    def byte_range(self, size_bytes: int) -> tuple[int, int] | None:
        """(first, last) as asked for, cut to the object; None without a Range that a server has to mind. A
        first behind the end is left as it is: 416."""
        match = _RANGE.fullmatch(self.headers.get("range", "").strip())
        if match is None or match[1] == match[2] == "":
            return None
        if not match[1]:
            return max(0, size_bytes - int(match[2])), size_bytes - 1
        return int(match[1]), min(int(match[2]), size_bytes - 1) if match[2] else size_bytes - 1

    def matches(self, content: Content) -> bool:
        """Whether If-Match lets this version pass."""
        wanted = self.headers.get("if-match")
        if wanted is None:
            return True
        return content.etag in [part.strip() for part in wanted.split(",")] or wanted.strip() == "*"


def parse(head: bytes) -> Request | None:
    """The request of a head that ends in an empty line; None when that is no HTTP."""
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or any(":" not in line for line in lines):
        return None
    headers = {
        name.strip().lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)
    }
    if words[2] == "HTTP/1.0":
        headers.setdefault("connection", "close")
    moved = _MOVED.fullmatch(words[1])
    via, hop, path = (moved[1], int(moved[2]), moved[3]) if moved else ("", 0, words[1])
    return Request(words[0], path, via, hop, headers)
