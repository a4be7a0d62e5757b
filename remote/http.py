"""Sources behind http:// and https://.

A source pins the version that it saw first and asks for it in every request (If-Match, else
If-Unmodified-Since). What an answer must be is in answer.py. What each failure is called:

    what came                                                   error
    ----------------------------------------------------------  -----------------
    host name does not resolve                                  RemoteUnavailable
    connection refused                                          RemoteUnavailable
    connection not established within connect_timeout           RemoteUnavailable
    connection closed before an answer                          RemoteUnavailable
    no byte for read_timeout, before or in the body             RemoteUnavailable
    body shorter than announced                                 RemoteUnavailable
    status 408, 429 or 5xx                                      RemoteUnavailable
    certificate not trusted, or no TLS behind https://          RemoteRefused
    something that is not HTTP                                  RemoteMismatch
    redirect without or with an unusable Location               RemoteMismatch
    more than 5 redirects, or a loop of them                    RemoteMismatch
    redirect from https to http                                 RemoteRefused
    status 200: the range was ignored                           RemoteMismatch
    status 401, 403, 404, 410 or any other 4xx                  RemoteRefused
    status 412, or a 416 that names another size                RemoteRefused
    206 with another ETag, Last-Modified or total size          RemoteMismatch
    status 412 or 416 though the version and size are there     RemoteMismatch
    any other status                                            RemoteMismatch
    Content-Encoding other than identity                        RemoteMismatch
    Content-Type multipart/byteranges                           RemoteMismatch
    Content-Range missing, malformed or of another range        RemoteMismatch
    Content-Length other than the range's                       RemoteMismatch
    body longer than the range                                  RemoteMismatch

A RemoteMismatch is what a broken middle box makes of an answer: the fetcher asks once more, on a new
connection.

Redirects are followed by hand: the place where they end is kept and asked directly, until it fails; then the
configured address is asked again, at once when the place refused (a signed address expires). Configured
headers may hold credentials, so only the configured host gets them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from tierblk import address
from tierblk.errors import RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import direct
from tierblk.remote.again import Template
from tierblk.remote.answer import REDIRECTS, Pin, Want, changed, check_partial, is_exact_length, quoted
from tierblk.remote.client import new_session, translated
from tierblk.remote.source import Identity, Progress

if TYPE_CHECKING:
    from tierblk.config import RemoteSettings

log = logging.getLogger(__name__)

REDIRECTS_MAX = 5

_PLAIN_URL = re.compile(r"[!-~]+")


class HttpSource:
    """One object on an HTTP server. Made by open_http; see Source for what its methods promise."""

    def __init__(self, url: URL, session: aiohttp.ClientSession, headers: Mapping[str, str]) -> None:
        self._url = url
        self._session = session
        self._headers = dict(headers)
        self._target: URL | None = None  # where the redirects ended
        self._pin: Pin | None = None
        self._template: Template | None = None  # of the last request whose body went straight into the buffer
        self._identity: Identity | None = None
        self.direct_bodies = 0  # answers whose body went straight into the buffer
        self.read_bodies = 0  # answers whose body was copied out of aiohttp's stream
        self._expects_direct = isinstance(session.connector, direct.DirectConnector)

    @property
    def identity(self) -> Identity:
        """Known once open_http has returned."""
        assert self._identity is not None
        return self._identity

    def _set_pin(self, pin: Pin) -> None:
        self._pin = pin
        self._identity = Identity(str(self._url), pin.size_bytes, pin.validator)

    async def probe(self) -> None:
        """Learn size and version with a GET of the first byte: a HEAD is not what a signed URL allows."""
        try:
            pin = await self._look(self._url)
        except RemoteMismatch as error:
            log.warning("%s; asking once more on a new connection", error)
            with direct.on_new_connection():
                pin = await self._look(self._url)
        self._set_pin(pin)
        if pin.strong_etag is None:
            found = "only Last-Modified" if pin.last_modified else "neither ETag nor Last-Modified"
            log.warning(
                "%s: the server sends no strong ETag, %s: a changed file may go unnoticed",
                shown(self._url),
                found,
            )

    def trust(self, known: Identity) -> None:
        """Take the version that an earlier run pinned, without having asked: every read will be checked."""
        self._set_pin(Pin.of_identity(known.size_bytes, known.validator))

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """See Source.read_into."""
        view = buffer.cast("B")
        if not len(view):
            return
        want = Want(shown(self._url), offset_bytes, len(view), self._pin)
        target, delivered_bytes = self._target, 0

        def count(valid_bytes: int) -> None:
            nonlocal delivered_bytes
            delivered_bytes = valid_bytes
            progress(valid_bytes)

        try:
            await self._exchange(target or self._url, want, view, count)
        except (RemoteRefused, RemoteUnavailable) as error:
            if target is None:
                raise
            if self._target is target:  # else another reader has asked anew already
                self._target = None
            if delivered_bytes or isinstance(error, RemoteUnavailable | RemoteMismatch):
                raise  # the caller's next try begins at the configured address
            await self._exchange(self._url, want, view, progress)

    async def read_anew(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """See Renewable.read_anew. Names are resolved anew as well."""
        connector = self._session.connector
        if isinstance(connector, aiohttp.TCPConnector):
            connector.clear_dns_cache()
        with direct.on_new_connection():
            await self.read_into(offset_bytes, buffer, progress)

    async def aclose(self) -> None:
        """See Source.aclose."""
        await self._session.close()

    async def _exchange(self, url: URL, want: Want, view: memoryview, progress: Progress) -> None:
        """One answered request with its body in the view."""
        response: aiohttp.ClientResponse | None = None
        sink = direct.Sink(view, lambda status, headers: _may_go_direct(status, headers, want), progress)
        try:
            with translated(want.asked):
                if await self._ask_again(url, want, sink):
                    self._keep(url)
                    self.direct_bodies += 1
                    return
                response, final = await self._send(url, want, sink)
                if sink.owner is None:  # else the protocol has checked it
                    if response.status == 412:
                        response.close()
                    await self._check(response.status, response.headers, want, final)
                self._keep(final)
                if sink.owner is not None:
                    await response.read()  # returns when the protocol has put the last byte into the view
                    self.direct_bodies += 1
                    if self._template is None or not self._template.fits(final, want):
                        self._template = Template.of(final, want.pin, response.request_info.headers)
                else:
                    await self._read(response, want, view, progress)
        finally:
            # Also when cancelled: only after this may the caller use the buffer for something else (I6).
            sink.close()
            if response is not None:
                response.close()

    async def _ask_again(self, url: URL, want: Want, sink: direct.Sink) -> bool:
        """The last request for another range, over a connection that is there: the same bytes on the wire,
        without the work of aiohttp's client, which is half of what a small miss costs in Python, and with
        the same checks before a byte is taken (I6). False: it shall ask, nothing has come."""
        template, connector = self._template, self._session.connector
        if (
            template is None
            or not template.fits(url, want)
            or not isinstance(connector, direct.DirectConnector)
        ):
            return False
        connection = await connector.idle(url)
        if connection is None:
            return False
        handler = connection.protocol
        assert isinstance(handler, direct.DirectHandler)
        try:
            in_sink = await handler.ask_again(template.request(want), sink)
            message, _ = await handler.read()
            while 100 <= message.code <= 199 and message.code != 101:
                message, _ = await handler.read()  # what was said before the answer
            if in_sink:
                connection.release()
                return True
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            if sink.owner is not None:
                raise
            return False  # a server may close a connection that is idle at any time
        except HttpProcessingError as error:
            raise RemoteMismatch(
                f"{want.asked}, but what came is not HTTP: {quoted(error.message)}"
            ) from error
        finally:
            connection.close()  # unless it was released
        if message.code not in REDIRECTS:
            await self._check(message.code, message.headers, want, url)
        self._template = None  # the range, but not in a way that could go straight into the buffer
        return False

    async def _send(
        self, url: URL, want: Want, sink: direct.Sink | None
    ) -> tuple[aiohttp.ClientResponse, URL]:
        """The answer that is no redirect, its body not yet read, and who gave it."""
        for _ in range(REDIRECTS_MAX + 1):
            if self._session.closed:
                raise RemoteRefused(f"{want.asked}, but this source is closed")
            own = self._headers if _same_host(self._url, url) else {}
            token = direct.CURRENT_SINK.set(sink)
            try:
                response = await self._session.get(
                    url, headers={**own, **want.headers()}, allow_redirects=False
                )
            except UnicodeError as error:  # a redirect can lead to a name that no resolver takes (I12)
                raise RemoteMismatch(
                    f"{want.asked}, but {shown(url)} cannot be asked: {quoted(str(error))}"
                ) from error
            finally:
                direct.CURRENT_SINK.reset(token)
            if response.status not in REDIRECTS:
                return response, url
            response.release()
            url = _follow(url, response.headers.get("Location"), want)
        raise RemoteMismatch(
            f"{want.asked}, but was sent on more than {REDIRECTS_MAX} times, last to {shown(url)}"
        )

    def _keep(self, final: URL) -> None:
        self._target = None if final == self._url else final

    async def _look(self, url: URL, pin: Pin | None = None) -> Pin:
        """The version that the server has now, whatever was pinned. pin: for the wording of errors only."""
        want = Want(shown(self._url), 0, 1)
        with translated(want.asked):
            response, final = await self._send(url, want, None)
            try:
                now = check_partial(response.status, response.headers, want)
                await response.read()  # one byte; a connection that was read to the end can be used again
            finally:
                response.close()
            self._keep(final)
            return now

    async def _check(self, status: int, headers: Mapping[str, str], want: Want, url: URL) -> None:
        """check_partial; and for a 412, which does not say it, find out what the server has instead."""
        if status != 412:
            check_partial(status, headers, want)
            return
        try:
            now = await self._look(url)
        except TierblkError:
            raise changed(want, None) from None
        if want.pin is not None and want.pin.same_version(now):
            raise RemoteMismatch(f"{want.asked}, but got a 412 though the version asked for is there")
        raise changed(want, now)

    async def _read(
        self, response: aiohttp.ClientResponse, want: Want, view: memoryview, progress: Progress
    ) -> None:
        """The ordinary way: copy the body out of aiohttp's stream."""
        self.read_bodies += 1
        exact, filled_bytes = is_exact_length(response.headers, want), 0
        if exact and self._expects_direct:
            self._expects_direct = False  # say it once
            log.warning(
                "aiohttp %s: bodies do not go straight into the buffer, though they should",
                aiohttp.__version__,
            )
        async for piece in response.content.iter_any():
            end = filled_bytes + len(piece)
            if end > len(view):
                raise RemoteMismatch(f"{want.asked}, but the body has more than {len(view)} bytes")
            view[filled_bytes:end] = piece
            filled_bytes = end
            if exact:
                progress(filled_bytes)
        if filled_bytes < len(view):
            raise RemoteUnavailable(
                f"{want.asked}, but the body ended after {filled_bytes} of {len(view)} bytes"
            )
        if not exact:
            progress(filled_bytes)  # only its end proved that the body has the right length (I6)


async def open_http(
    url: str,
    settings: RemoteSettings,
    known: Identity | None = None,
    *,
    pin: Identity | None = None,
    may_go_direct: bool = True,
) -> HttpSource:
    """Connect, check that the server answers range requests, and pin the version. Errors: see open_source.

    known: what to pin when the server cannot be reached. pin: what to pin without asking.
    may_go_direct=False: the ordinary way only.
    """
    parsed = _parse(url)
    session = await new_session(settings, may_go_direct=may_go_direct)
    source = HttpSource(parsed, session, settings.headers)
    if pin is not None:
        source.trust(pin)
        return source
    try:
        await source.probe()
    except RemoteUnavailable as error:
        if known is None:
            await session.close()
            raise
        log.warning("%s; serving what is cached of the version known from last time", error)
        source.trust(known)
    except BaseException:
        await session.close()
        raise
    return source


def shown(url: URL) -> str:
    """An address for messages, see address.shown."""
    return address.shown(str(url))


def _parse(url: str) -> URL:
    try:
        return _usable(_verbatim(url))
    except ValueError:
        raise RemoteRefused(f"{address.shown(url)!r:.200} is no http or https address") from None


def _verbatim(text: str) -> URL:
    """Signed addresses go out byte for byte; only what no request line could carry is quoted. ValueError."""
    return URL(text, encoded=_PLAIN_URL.fullmatch(text) is not None)


def _usable(url: URL) -> URL:
    """The url without what is not sent to a server; ValueError when it is not for HTTP."""
    if not url.host or url.scheme not in ("http", "https"):
        raise ValueError(url)
    return url.with_user(None).with_fragment(None)


def _follow(url: URL, location: str | None, want: Want) -> URL:
    """Where a redirect leads. RemoteRefused when it may not be followed."""
    if not location:
        raise RemoteMismatch(f"{want.asked}, but the redirect from {shown(url)} has no Location")
    try:
        target = _usable(url.join(_verbatim(location)))
    except ValueError:
        raise RemoteMismatch(
            f"{want.asked}, but the redirect leads to {quoted(address.shown(location))}"
        ) from None
    if url.scheme == "https" and target.scheme == "http":
        raise RemoteRefused(
            f"{want.asked}, but the redirect leads from https to unencrypted {shown(target)}",
            "configure the http address itself, if that is wanted",
        )
    return target


def _same_host(origin: URL, url: URL) -> bool:
    """Whether url may get what was configured for origin: same host and port, or the same host by https."""
    if origin.host != url.host:
        return False
    upgraded = origin.scheme == "http" and url.scheme == "https" and origin.port == 80 and url.port == 443
    return origin.origin() == url.origin() or upgraded


def _may_go_direct(status: int, headers: Mapping[str, str], want: Want) -> bool:
    try:
        check_partial(status, headers, want)
    except TierblkError:
        return False
    return is_exact_length(headers, want)
