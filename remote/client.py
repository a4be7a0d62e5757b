"""HTTP connections: a session as the settings want it, and what its exceptions mean.

With http.py and direct.py the only file that knows aiohttp's client."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from tierblk import address
from tierblk.errors import ConfigError, RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import direct
from tierblk.remote.answer import quoted

if TYPE_CHECKING:
    from tierblk.config import RemoteSettings

log = logging.getLogger(__name__)

Session = aiohttp.ClientSession
"""For those who hand one on and need not know whose it is."""

IDLE_CONNECTION_S = 55.0  # below the 60 s after which servers and middle boxes like to forget one
READ_BUFFER_BYTES = 256 * 1024  # of the ordinary way only


async def new_session(settings: RemoteSettings, *, may_go_direct: bool = False) -> aiohttp.ClientSession:
    """Without cookies, and bodies as they are. may_go_direct: as far as aiohttp lets them, bodies can go
    straight into a buffer (direct.py). ConfigError for a ca_file that cannot be used."""
    context = await asyncio.to_thread(_tls_context, settings.ca_file)
    return aiohttp.ClientSession(
        connector=_connector(context, may_go_direct),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "tierblk"},
        auto_decompress=False,
        read_bufsize=READ_BUFFER_BYTES,
        timeout=aiohttp.ClientTimeout(
            total=None,
            connect=settings.connect_timeout,  # with the look-up of the name, and the TLS handshake
            sock_connect=settings.connect_timeout,
            sock_read=settings.read_timeout,
            ceil_threshold=settings.connect_timeout + 1,  # longer ones would be rounded up to whole seconds
        ),
    )


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Trust what the system trusts, or what ca_file holds instead. ConfigError when it cannot be read."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # SSLError is one
        raise ConfigError(
            f"remote.ca_file {ca_file} cannot be used: {error.strerror or error}",
            "it must be a file of PEM certificates",
        ) from None


def _connector(context: ssl.SSLContext, may_go_direct: bool) -> aiohttp.TCPConnector:
    """A pool without a limit of its own: the fetcher has one."""
    why_not = direct.fault() if may_go_direct else "it was not asked for"
    if why_not is None:
        try:
            return direct.DirectConnector(limit=0, ssl=context, keepalive_timeout=IDLE_CONNECTION_S)
        except AttributeError as error:
            why_not = str(error)
    if may_go_direct:
        log.warning("aiohttp %s: bodies cannot go straight into the buffer: %s", aiohttp.__version__, why_not)
    return aiohttp.TCPConnector(limit=0, ssl=context, keepalive_timeout=IDLE_CONNECTION_S)


@contextmanager
def translated(asked: str) -> Iterator[None]:
    """The one place where aiohttp's exceptions become ours."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise translate(error, asked) from error


def translate(error: Exception, asked: str) -> TierblkError:
    """What an exception of aiohttp means to the caller. asked: how the message begins. Subclasses come before
    their bases."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            why = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
            return RemoteRefused(
                f"{asked}, but the server's certificate is not trusted: {why}",
                "name the CA's certificate in remote.ca_file",
            )
        case aiohttp.ClientConnectorSSLError():
            return RemoteRefused(
                f"{asked}, but TLS failed: {getattr(error.os_error, 'reason', error.os_error)}"
            )
        case aiohttp.ClientConnectorDNSError():
            return RemoteUnavailable(f"{asked}, but the host name does not resolve: {error.host}")
        case aiohttp.ClientConnectorError():
            why = os.strerror(error.errno) if error.errno else error.os_error
            return RemoteUnavailable(
                f"{asked}, but there is no connection to {error.host}:{error.port}: {why}"
            )
        case aiohttp.ConnectionTimeoutError():
            return RemoteUnavailable(f"{asked}, but the connection was not established in time")
        case TimeoutError():
            return RemoteUnavailable(f"{asked}, but the server stalled")
        case aiohttp.ClientPayloadError():
            return RemoteUnavailable(f"{asked}, but the connection ended in the middle of the body")
        case aiohttp.ClientResponseError():
            return RemoteMismatch(f"{asked}, but what came is not HTTP: {quoted(error.message)}")
        case aiohttp.ClientConnectionError() | OSError():
            return RemoteUnavailable(f"{asked}, but the connection was lost")
        case aiohttp.InvalidURL():
            where = quoted(address.shown(str(error.url)))
            return RemoteRefused(f"{asked}, but {where} is no address that can be asked")
        case _:
            return RemoteRefused(f"{asked}, but the request is impossible: {quoted(str(error))}")
