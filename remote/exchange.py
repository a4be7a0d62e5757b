"""One request and all of its answer, for the calls of a store. What a status means, the store says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from tierblk.errors import RemoteMismatch, RemoteRefused, RemoteUnavailable
from tierblk.remote.client import translated
from tierblk.remote.store import Bytes

ERROR_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """headers: looked up without regard to case. body: all of it, unless it went into a buffer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def date_unix_s(self) -> float | None:
        """What time the server says that it is."""
        try:
            return parsedate_to_datetime(self.headers.get("Date", "")).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None


async def exchange(
    session: aiohttp.ClientSession,
    asked: str,
    method: str,
    url: URL,
    headers: Mapping[str, str],
    pieces: Sequence[Bytes] = (),
    *,
    into: memoryview | None = None,
    accept: Callable[[Mapping[str, str]], object] | None = None,
    limit_bytes: int = ERROR_BYTES_MAX,
) -> Answer:
    """The answer, whatever its status; redirects are answers too.

    asked: how messages begin. into: where the body of a 206 goes; it has to have that length. accept: looks
    at a 206's headers before that, and raises if it is another answer (I6). limit_bytes: of other bodies; a
    longer one is RemoteMismatch. RemoteUnavailable: whether the server has done it is not known.
    """
    if session.closed:
        raise RemoteRefused(f"{asked}, but this store is closed")
    body = _Pieces(pieces) if pieces else None
    with translated(asked):
        response = await session.request(
            method, url, headers=dict(headers), data=body, allow_redirects=False, skip_auto_headers=_OURS
        )
        try:
            if into is not None and response.status == 206:
                if accept is not None:
                    accept(response.headers)
                await _read_into(response, into, asked)
                return Answer(response.status, response.headers, b"")
            return Answer(response.status, response.headers, await _read(response, limit_bytes, asked))
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()


_OURS = ("Accept", "Content-Type")  # not sent unless we say so
_PIECE_BYTES = 256 * 1024  # others run in between


class _Pieces(aiohttp.payload.Payload):
    """A body out of several buffers without a copy, which can be sent again over another connection."""

    def __init__(self, pieces: Sequence[Bytes]) -> None:
        super().__init__(pieces, content_type="application/octet-stream")
        self._pieces = [memoryview(piece).cast("B") for piece in pieces]
        self._size = sum(len(piece) for piece in self._pieces)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """aiohttp asks for it in messages only."""
        return f"{self._size} bytes"

    async def write(self, writer: AbstractStreamWriter) -> None:
        """All of it, to one connection."""
        for piece in self._pieces:
            for at in range(0, len(piece), _PIECE_BYTES):
                await writer.write(piece[at : at + _PIECE_BYTES])


async def _read(response: aiohttp.ClientResponse, limit_bytes: int, asked: str) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit_bytes:
            raise RemoteMismatch(f"{asked}, but the answer has more than {limit_bytes} bytes")
    return bytes(body)


async def _read_into(response: aiohttp.ClientResponse, into: memoryview, asked: str) -> None:
    filled_bytes = 0
    async for piece in response.content.iter_any():
        end = filled_bytes + len(piece)
        if end > len(into):
            raise RemoteMismatch(f"{asked}, but the body has more than {len(into)} bytes")
        into[filled_bytes:end] = piece
        filled_bytes = end
    if filled_bytes < len(into):
        raise RemoteUnavailable(f"{asked}, but the body ended after {filled_bytes} of {len(into)} bytes")
