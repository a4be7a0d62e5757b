"""A source: the bytes at one address, pinned to the version that was opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import urlsplit

from tierblk import address
from tierblk.errors import RemoteRefused

if TYPE_CHECKING:
    from tierblk.config import RemoteSettings

REPIN_HINT = (
    "put the old version back, or show the new one: `tierblk repin NAME` while the device is not in use"
)

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two sources the same bytes: the cache keys a base by it.

    url: without user and password; it may still hold a signature, so people and logs get `shown`.
    size_bytes: length of the whole object. validator: the strongest sign of the version that the source has:
    'etag:"…"', 'last-modified:…', 'stat:dev-ino-size-mtime_ns', or 'size:N' where there is none.
    """

    url: str
    size_bytes: int
    validator: str

    @property
    def shown(self) -> str:
        """The address for messages, see address.shown."""
        return address.shown(self.url)


class Source(Protocol):
    """Bytes at an address. Any number of reads may run at once."""

    @property
    def identity(self) -> Identity:
        """The version that was opened; every byte that is ever delivered belongs to it."""

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """Fill the whole buffer with the bytes from offset_bytes on, which must lie inside the source.

        progress(n) says that the first n bytes of the buffer are there, passed every check (I6) and are not
        written again (R5); n only grows within one call. It is called from the loop and must not raise. Once
        this returned or raised, be it CancelledError, nothing writes to the buffer any more. Raises
        RemoteUnavailable (the same read may work later) or RemoteRefused (it will not).
        """

    async def aclose(self) -> None:
        """Close connections and descriptors; reads that still run end in an error."""


@runtime_checkable
class Renewable(Source, Protocol):
    """A source whose reads go over connections, of which one may be broken while the next one is not."""

    async def read_anew(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """read_into on a new connection, when the old ones, idle ones included, are not to be trusted."""


async def open_source(
    url: str, settings: RemoteSettings, known: Identity | None = None, *, pin: Identity | None = None
) -> Source:
    """Look at what lies at the url, pin its version, and return it ready to be read.

    known: the version that was pinned at this url last. When the server cannot be reached it is pinned again,
    so that what is cached of it can be served with no network; another version is still noticed, at the first
    read that reaches the server. pin: serve exactly this version, whatever the server has now, as a device
    does that already shows it: another version is an error at the first read, and nobody is asked here.

    Raises RemoteUnavailable or RemoteRefused (also for an address that is no http, https or file URL), and
    ConfigError for a ca_file or header that cannot be used.
    """
    # Imported here: aiohttp costs more start-up time than all the rest, and a file needs none of it.
    scheme = urlsplit(url).scheme.lower()
    if scheme in ("http", "https"):
        from tierblk.remote.http import open_http

        return await open_http(url, settings, known, pin=pin)
    if scheme == "file":
        from tierblk.remote.file import open_file

        return await open_file(url, pin, timeout_s=settings.read_timeout)
    raise RemoteRefused(
        f"{address.shown(url)!r:.200} is no address that can be read",
        "use http://HOST/PATH, https://HOST/PATH or file:///PATH",
    )
