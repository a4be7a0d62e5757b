"""What the stores behind HTTP have in common: objects are keys of a bucket, a creation is one PUT that only
the first may win, a listing comes in pages. In what they differ, a Dialect says.

What an answer means (R16: what is not known is never guessed); the dialects' own tables say what is special:

    answer                                  to `create`             to the others
    --------------------------------------  ----------------------  -----------------
    200, 201, 202, 204, 206 where it is
    the one of that request                 it was made             done
    404                                     RemoteRefused (bucket)  there is none
    412                                     there is one already    RemoteRefused
    408, 409, 429, 5xx, no answer           RemoteUnavailable       RemoteUnavailable
    401, 403                                once more with fresh credentials, then RemoteRefused
    any other                               RemoteRefused           RemoteRefused
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from tierblk import address
from tierblk.errors import ConfigError, RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.answer import Want, check_partial, retry_after_of
from tierblk.remote.exchange import ERROR_BYTES_MAX, Answer, exchange
from tierblk.remote.listing import Page
from tierblk.remote.sigv4 import encoded_path
from tierblk.remote.store import Bytes, Found, check_name
from tierblk.remote.wallet import Wallet

LISTING_BYTES_MAX = 8 << 20
THREAD_BYTES = 256 * 1024
"""A body of fewer is hashed before a thread would have begun."""
_UNKNOWN = frozenset({408, 409, 429})  # and every 5xx

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the keys of a bucket are. origin: http(s)://HOST[:PORT]. path: before them, without the last
    slash."""

    origin: str
    path: str

    @property
    def host(self) -> str:
        """With the port, where there is one: what the header Host says."""
        return self.origin.partition("://")[2]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, not authorised yet. path: encoded. query: not encoded. headers: names in lower case."""

    method: str
    path: str
    query: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[Bytes] = ()


class Dialect(Protocol[C_contra]):
    """How one vendor speaks of what all of them do. No I/O; C_contra: the credentials that it takes."""

    @property
    def place(self) -> Place:
        """Of the bucket."""

    @property
    def creation(self) -> Mapping[str, str]:
        """The headers of a PUT which the server refuses when there is an object of that name."""

    @property
    def empty_pages_max(self) -> int:
        """How many pages of a listing may follow each other that have nothing but the way to the next."""

    def authorised(self, request: Request, credentials: C_contra) -> tuple[str, Mapping[str, str]]:
        """(query, headers) as they are sent, the query encoded. Called in a thread for a large body."""

    def code(self, answer: Answer) -> str:
        """The vendor's word for what is wrong, empty when there is none; letters and digits only."""

    def is_there_already(self, answer: Answer) -> bool:
        """Whether a creation was refused since there is one."""

    def is_missing_bucket(self, answer: Answer) -> bool:
        """Whether a 404 is not about the object."""

    def is_stale(self, answer: Answer) -> bool:
        """Whether the credentials hold no longer, where the status is neither 401 nor 403."""

    def is_unknown(self, answer: Answer) -> bool:
        """Whether another request may have another outcome, where the status does not say so."""

    def listing_query(self, prefix: str, after: str, token: str | None) -> list[tuple[str, str]]:
        """What asks for a page of the keys that begin with prefix, and sort behind after if it can say so."""

    def page(self, body: bytes, asked: str) -> Page:
        """The page. RemoteMismatch when it is none."""


class BucketStore(Generic[C]):
    """See Store for what its methods promise."""

    def __init__(
        self, url: str, prefix: str, dialect: Dialect[C], wallet: Wallet[C], session: aiohttp.ClientSession
    ) -> None:
        """url: as messages show it. prefix: of the keys, without slashes around it. session: this store's
        from now on, see client.new_session."""
        self._url = url.rstrip("/")
        self._prefix = prefix
        self._dialect = dialect
        self._place = dialect.place
        self._wallet = wallet
        self._session = session
        self._clock_unix_s = 0.0

    @property
    def shown(self) -> str:
        """See Store.shown."""
        return self._url

    @property
    def clock_unix_s(self) -> float:
        """See Store.clock_unix_s."""
        return self._clock_unix_s

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        """See Store.create."""
        check_name(name)
        asked = f"{self._url}/{name}: asked to create it"
        request = Request("PUT", self._key(name), headers=self._dialect.creation, pieces=pieces)
        answer = await self._ask(asked, request)
        if self._dialect.is_there_already(answer):
            return False
        self._expect(answer, asked, 200, 201)
        return True

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        """See Store.read."""
        check_name(name)
        asked = f"{self._url}/{name}: asked for it"
        answer = await self._ask(
            asked, Request("GET", self._key(name)), limit_bytes=max(limit_bytes, ERROR_BYTES_MAX)
        )
        if answer.status == 404 and not self._dialect.is_missing_bucket(answer):
            return None
        self._expect(answer, asked, 200)
        if len(answer.body) > limit_bytes:
            raise RemoteRefused(f"{asked}, but it has more than {limit_bytes} bytes, which none has")
        return answer.body

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """See Store.read_into."""
        check_name(name)
        view = buffer.cast("B")
        want = Want(f"{self._url}/{name}", offset_bytes, len(view))
        answer = await self._ask(
            want.asked,
            Request("GET", self._key(name), headers={"range": f"bytes={offset_bytes}-{want.last_byte}"}),
            into=view,
            accept=lambda headers: check_partial(206, headers, want),
        )
        self._expect(answer, want.asked, 206)

    async def names(self, folder: str, after: str = "") -> list[Found]:
        """See Store.names."""
        check_name(folder)
        asked = f"{self._url}/{folder}/: asked what is there"
        prefix, behind = self._below(f"{folder}/"), self._below(after) if after else ""
        found: list[Found] = []
        last_key, empty_pages = "", 0
        token: str | None = None
        while True:
            query = self._dialect.listing_query(prefix, behind, token)
            answer = await self._ask(
                asked, Request("GET", self._place.path or "/", query), limit_bytes=LISTING_BYTES_MAX
            )
            self._expect(answer, asked, 200)
            page = self._dialect.page(answer.body, asked)
            empty_pages = 0 if page.objects else empty_pages + 1
            # Whatever a server says: a listing ends (I12).
            stuck = empty_pages > self._dialect.empty_pages_max or (page.token == token)
            if page.token is not None and (stuck or (page.objects and page.objects[0][0] <= last_key)):
                raise RemoteMismatch(f"{asked}, but the listing does not get on")
            found += [
                Found(key[len(self._below("")) :], size, when)
                for key, size, when in page.objects
                if key.startswith(prefix) and key > behind
            ]
            if page.objects:
                last_key = page.objects[-1][0]
            if page.token is None:
                return sorted(found)
            token = page.token

    async def delete(self, name: str) -> None:
        """See Store.delete."""
        check_name(name)
        asked = f"{self._url}/{name}: asked to delete it"
        answer = await self._ask(asked, Request("DELETE", self._key(name)))
        if answer.status != 404 or self._dialect.is_missing_bucket(answer):
            self._expect(answer, asked, 200, 202, 204)

    async def aclose(self) -> None:
        """See Store.aclose."""
        await self._session.close()

    def _below(self, name: str) -> str:
        """The key of an object, or of all that begin so."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def _key(self, name: str) -> str:
        return encoded_path(f"{self._place.path}/{self._below(name)}")

    async def _ask(
        self,
        asked: str,
        request: Request,
        *,
        into: memoryview | None = None,
        accept: Callable[[Mapping[str, str]], object] | None = None,
        limit_bytes: int = ERROR_BYTES_MAX,
    ) -> Answer:
        """An answer that is neither a refusal of credentials that can be renewed nor one of no outcome."""

        async def once(credentials: C) -> Answer:
            query, headers = await self._authorised(request, credentials)
            url = URL(f"{self._place.origin}{request.path}{'?' if query else ''}{query}", encoded=True)
            return await exchange(
                self._session,
                asked,
                request.method,
                url,
                headers,
                request.pieces,
                into=into,
                accept=accept,
                limit_bytes=limit_bytes,
            )

        answer = await self._with_credentials(once)
        self._clock_unix_s = answer.date_unix_s or self._clock_unix_s
        if self._dialect.is_there_already(answer):
            return answer  # Azure says it with 409, which elsewhere says nothing
        if answer.status in _UNKNOWN or answer.status >= 500 or self._dialect.is_unknown(answer):
            raise RemoteUnavailable(
                f"{asked}, but the server cannot say now {self._said(answer)}",
                retry_after_s=retry_after_of(answer.headers),
            )
        return answer

    async def _authorised(self, request: Request, credentials: C) -> tuple[str, Mapping[str, str]]:
        """Off the loop when there is much to hash: of an object that is 10 ms and more."""
        if sum(map(len, request.pieces)) < THREAD_BYTES:
            return self._dialect.authorised(request, credentials)
        return await asyncio.to_thread(self._dialect.authorised, request, credentials)

    async def _with_credentials(self, once: Callable[[C], Awaitable[Answer]]) -> Answer:
        credentials = await self._wallet.current()
        answer = await once(credentials)
        if answer.status in (401, 403) or self._dialect.is_stale(answer):
            fresh = await self._wallet.renewed(credentials)
            if fresh is not None and fresh != credentials:
                return await once(fresh)
        return answer

    def _expect(self, answer: Answer, asked: str, *statuses: int) -> None:
        if answer.status not in statuses:
            raise self._refusal(answer, asked)

    def _refusal(self, answer: Answer, asked: str) -> TierblkError:
        hints = {
            301: "set the region, or the endpoint, to where the bucket is",
            307: "set the region, or the endpoint, to where the bucket is",
            401: "check the credentials",
            403: "check the credentials and what they allow, and this machine's clock",
            404: "check the name of the bucket",
        }
        return RemoteRefused(
            f"{asked}, but the server refuses it {self._said(answer)}", hints.get(answer.status)
        )

    def _said(self, answer: Answer) -> str:
        """`(403 AccessDenied)`: status, and the code that came with it."""
        code = self._dialect.code(answer)
        return f"({answer.status}{' ' if code else ''}{code})"


def endpoint_parts(endpoint: str, *, with_path: bool = False) -> tuple[str, str, str]:
    """(scheme, host and port, path without the last slash) of an endpoint. ConfigError when it is none."""
    parts = urlsplit(endpoint)
    path = parts.path.rstrip("/")
    if (
        parts.scheme not in ("http", "https")
        or not parts.netloc
        or "@" in parts.netloc
        or parts.query
        or (path and not with_path)
    ):
        raise ConfigError(
            f"{address.shown(endpoint)!r:.200} is no endpoint of a store",
            "use https://HOST or http://HOST:PORT",
        )
    return parts.scheme, parts.netloc, path


def bucket_and_prefix(url: str, scheme: str, pattern: str) -> tuple[str, str]:
    """The host of an address and the path behind it. ConfigError: it is none; pattern: how one looks."""
    parts = urlsplit(url)
    if parts.scheme != scheme or not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(f"{address.shown(url)!r:.200} is no address of a store", f"use {pattern}")
    return parts.netloc, parts.path.strip("/")
