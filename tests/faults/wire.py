"""One answer of the server: the right one, and what each fault makes of it (the table is in __init__.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from tests.faults.content import Content
from tests.faults.ledger import Entry, Ledger
from tests.faults.peer import Peer
from tests.faults.plan import REQUEST_FAULTS, Decision
from tests.faults.request import Request

DRIP_BYTES = 1024
DRIP_BYTES_PER_S: Final = 32768.0
RETRY_AFTER_S: Final = 1.0
SHIFT_MAX_BYTES = 64 * 1024
STATUS_TEXTS = {500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable"}


class Exchange:
    """A request that asks for a range that exists, and everything that answering it needs."""

    def __init__(
        self, peer: Peer, request: Request, content: Content, entry: Entry, ledger: Ledger, decision: Decision
    ) -> None:
        self.peer = peer
        self.request = request
        self.content = content
        self.entry = entry
        self.ledger = ledger
        self.rng = decision.rng
        self.value = decision.value
        self.first = entry.first
        self.count = entry.last + 1 - entry.first

    async def head(self, status: str = "206 Partial Content", **changes: str | None) -> None:
        """The right head. changes: headers by name, _ for -; None leaves one out."""
        await self._send_head(
            status,
            {
                "content_type": "application/octet-stream",
                "accept_ranges": "bytes",
                "content_range": self.range_of(self.first, self.count),
                "content_length": str(self.count),
                "etag": self.content.etag,
                **changes,
            },
        )

    async def empty(self, status: str, **headers: str | None) -> None:
        """An answer without a body."""
        await self._send_head(status, {"content_length": "0", **headers})

    async def _send_head(self, status: str, headers: dict[str, str | None]) -> None:
        self.entry.status = int(status[:3])
        lines = [
            f"{name.replace('_', '-').title()}: {text}\r\n"
            for name, text in headers.items()
            if text is not None
        ]
        await self.peer.send(f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode("latin-1"))

    def range_of(self, first: int, count: int) -> str:
        """A Content-Range."""
        return f"bytes {first}-{first + count - 1}/{self.content.size_bytes}"

    async def body(self, begin: int = 0, end: int | None = None, piece_bytes: int | None = None) -> None:
        """The right bytes, or those from begin to end of them."""
        at, stop = self.first + begin, self.first + (self.count if end is None else end)
        while at < stop:
            count = min(piece_bytes or self.peer.link.piece_bytes, stop - at)
            await self.peer.link.pass_through(count)
            await self.peer.send(self.content.view[at : at + count])
            self.ledger.sent(self.entry, at, count)
            at += count

    async def useless(self, first: int, count: int) -> None:
        """Bytes of that place with every bit turned over."""
        at = first
        while at < first + count:
            piece = min(self.peer.link.piece_bytes, first + count - at)
            await self.peer.link.pass_through(piece)
            await self.peer.send(self.content.turned_over(at, piece))
            self.ledger.useless_bytes += piece
            at += piece

    def cut(self) -> int:
        """Where the body breaks off: before its end, mostly after its begin."""
        return self.rng.randrange(self.count)

    async def right(self) -> bool:
        """What a good server says. Returns, as all that follow, whether the connection may be used again."""
        await self.head()
        await self.body()
        return True

    async def redirect(self, via: str, hop: int) -> bool:
        """302 to this server."""
        self.ledger.redirects += 1
        await self.empty("302 Found", location=f"/{via}/{hop}{self.request.path}")
        return True


async def truncate(x: Exchange) -> bool:
    await x.head()
    await x.body(0, x.cut())
    return False


async def whole(x: Exchange) -> bool:
    await x.head("200 OK", content_range=None, content_length=str(x.content.size_bytes))
    await x.useless(0, x.content.size_bytes)
    return True


async def other_range(x: Exchange) -> bool:
    """Shifted within the object where it has room for that, else shorter."""
    size, first, count = x.content.size_bytes, x.first, x.count
    shifts = [
        shift
        for shift in (x.rng.randint(1, SHIFT_MAX_BYTES), -x.rng.randint(1, SHIFT_MAX_BYTES))
        if 0 <= first + shift <= size - count
    ]
    if shifts and (count == 1 or x.rng.random() < 0.7):
        first += x.rng.choice(shifts)
    elif count > 1:
        count = x.rng.randrange(1, count)
    else:
        first = (first + 1) % size
    await x.head(content_range=x.range_of(first, count), content_length=str(count))
    at = first
    while at < first + count:
        piece = min(x.peer.link.piece_bytes, first + count - at)
        await x.peer.link.pass_through(piece)
        await x.peer.send(x.content.view[at : at + piece])
        x.ledger.useless_bytes += piece
        at += piece
    return True


async def other_etag(x: Exchange) -> bool:
    await x.head(etag=f'"other-{x.rng.randrange(1 << 32):x}"')
    await x.useless(x.first, x.count)
    return True


async def no_etag(x: Exchange) -> bool:
    await x.head(etag=None)
    await x.useless(x.first, x.count)
    return True


async def wrong_length(x: Exchange) -> bool:
    shorter = x.count > 1 and x.rng.random() < 0.5
    count = x.rng.randrange(1, x.count) if shorter else x.count + x.rng.randint(1, 8192)
    await x.head(content_length=str(count))
    await x.useless(x.first, count)
    return True


async def encoding(x: Exchange) -> bool:
    await x.head(content_encoding="gzip")
    await x.useless(x.first, x.count)
    return True


async def error(x: Exchange) -> bool:
    status = x.rng.choice((500, 502, 503, 504)) if x.value is None else int(x.value)
    text = b"the server has a bad day\n"
    await x.head(
        f"{status} {STATUS_TEXTS.get(status, 'Gateway Timeout')}",
        content_type="text/plain",
        content_range=None,
        content_length=str(len(text)),
        etag=None,
    )
    await x.peer.send(text)
    return True


async def busy(x: Exchange) -> bool:
    await x.empty("429 Too Many Requests", retry_after=f"{x.value or RETRY_AFTER_S:g}")
    return True


async def reset_head(x: Exchange) -> bool:
    x.peer.reset()
    return False


async def reset(x: Exchange) -> bool:
    await x.head()
    await x.body(0, x.cut())
    x.peer.reset()
    return False


async def stall_head(x: Exchange) -> bool:
    await x.peer.silence(x.value)
    return await x.right()


async def stall(x: Exchange) -> bool:
    cut = x.cut()
    await x.head()
    await x.body(0, cut)
    await x.peer.silence(x.value)
    await x.body(cut)
    return True


async def drip(x: Exchange) -> bool:
    loop = asyncio.get_running_loop()
    await x.head()
    begun_s, sent = loop.time(), 0
    while sent < x.count:
        end = min(sent + DRIP_BYTES, x.count)
        await x.body(sent, end)
        sent = end
        late_s = begun_s + sent / (x.value or DRIP_BYTES_PER_S) - loop.time()
        if late_s > 0 and await x.peer.silence(late_s):
            await x.body(sent)
            break
    return True


async def redirect(x: Exchange) -> bool:
    if x.request.via == "moved":
        return await x.right()
    return await x.redirect("moved", x.entry.n)


async def redirect_always(x: Exchange) -> bool:
    return await x.redirect("chain", x.request.hop + 1 if x.request.via == "chain" else 0)


async def redirect_loop(x: Exchange) -> bool:
    return await x.redirect("loop", 1 - x.request.hop % 2 if x.request.via == "loop" else 0)


async def no_http(x: Exchange) -> bool:
    await x.peer.send(b"220 mail.example ESMTP\r\n\r\n")
    return False


async def hangup(x: Exchange) -> bool:
    await x.right()
    return False


ANSWERS: dict[str, Callable[[Exchange], Awaitable[bool]]] = dict(
    zip(
        REQUEST_FAULTS,
        (
            *(truncate, whole, other_range, other_etag, no_etag, wrong_length, encoding, error, busy),
            *(reset_head, reset, stall_head, stall, drip, redirect, redirect_always, redirect_loop),
            *(no_http, hangup),
        ),
        strict=True,
    )
)
# The rest of what began with one unlucky request: these addresses go on as their fault says.
CONTINUED = {"chain": "redirect-always", "loop": "redirect-loop"}


async def outside_the_range(x: Exchange, byte_range: tuple[int, int] | None) -> bool | None:
    """The answer to what is no plain GET of a range that exists; None: it is one."""
    content, head_only = x.content, x.request.method == "HEAD"
    if x.request.method not in ("GET", "HEAD"):
        await x.empty("405 Method Not Allowed", allow="GET, HEAD")
    elif not x.request.matches(content):
        await x.empty("412 Precondition Failed", etag=content.etag)
    elif byte_range is not None and byte_range[0] > byte_range[1]:
        await x.empty("416 Range Not Satisfiable", content_range=f"bytes */{content.size_bytes}")
    elif head_only or byte_range is None:
        x.first, x.count = 0, content.size_bytes
        await x.head("200 OK", content_range=None)
        if not head_only:
            await x.body()
    else:
        return None
    return True
