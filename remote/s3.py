"""Stores behind s3://BUCKET/PREFIX: Amazon S3 and what speaks its protocol, by requests signed with SigV4.

What an answer means (R16: what is not known is never guessed):

    answer                                            to `create`             to the others
    ------------------------------------------------  ----------------------  -----------------
    200                                               it was made             done
    404                                               RemoteRefused (bucket)  there is none
    412                                               there is one already    RemoteRefused
    409 of racing creations, 408, 429, 5xx, no answer,
    400 RequestTimeout                                RemoteUnavailable       RemoteUnavailable
    401, 403, 400 ExpiredToken                        once more with fresh credentials, then RemoteRefused
    301, 307, any other                               RemoteRefused           RemoteRefused
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from tierblk.errors import ConfigError, RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.answer import Want, check_partial
from tierblk.remote.exchange import ERROR_BYTES_MAX, Answer, exchange
from tierblk.remote.sigv4 import EMPTY_SHA256, Credentials, encoded_path, encoded_query, signed_headers
from tierblk.remote.store import Bytes, Found, check_name

LISTING_BYTES_MAX = 8 << 20
_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"
_UNKNOWN = frozenset({408, 409, 429})  # and every 5xx
_STALE_CREDENTIALS = frozenset({"ExpiredToken", "TokenRefreshRequired"})  # with 400, where others say 401


class Wallet(Protocol):
    """Where credentials come from. Both may raise RemoteUnavailable or RemoteRefused."""

    async def current(self) -> Credentials:
        """Those that hold now, renewed before they expire."""

    async def renewed(self, refused: Credentials) -> Credentials | None:
        """Others than those which were refused; None when there are none."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    """endpoint: http(s)://HOST[:PORT], None for Amazon's. path_style: the bucket in the path, as most servers
    want it that are not Amazon's; None: wherever there is an endpoint."""

    region: str = "us-east-1"
    endpoint: str | None = None
    path_style: bool | None = None


class S3Store:
    """See Store for what its methods promise."""

    def __init__(
        self,
        url: str,
        settings: S3Settings,
        wallet: Wallet,
        session: aiohttp.ClientSession,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """session: this store's from now on, see client.new_session. ConfigError for an address or endpoint
        that is none."""
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        if parts.scheme != "s3" or not self._bucket or parts.query or parts.fragment or "@" in self._bucket:
            raise ConfigError(f"{url!r:.200} is no address of a store", "use s3://BUCKET/PREFIX")
        self._url = url.rstrip("/")
        self._origin, self._base_path = _place(self._bucket, settings)
        self._region = settings.region
        self._wallet = wallet
        self._session = session
        self._now = now
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
        answer = await self._ask(asked, "PUT", self._key(name), pieces=pieces, headers={"if-none-match": "*"})
        if answer.status == 412:
            return False
        self._expect(answer, asked, 200)
        return True

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        """See Store.read."""
        check_name(name)
        asked = f"{self._url}/{name}: asked for it"
        answer = await self._ask(asked, "GET", self._key(name), limit_bytes=max(limit_bytes, ERROR_BYTES_MAX))
        if answer.status == 404 and not _names_bucket(answer):
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
            "GET",
            self._key(name),
            headers={"range": f"bytes={offset_bytes}-{want.last_byte}"},
            into=view,
            accept=lambda headers: check_partial(206, headers, want),
        )
        self._expect(answer, want.asked, 206)

    async def names(self, folder: str, after: str = "") -> list[Found]:
        """See Store.names."""
        check_name(folder)
        asked = f"{self._url}/{folder}/: asked what is there"
        found: list[Found] = []
        query = [("list-type", "2"), ("prefix", self._below(f"{folder}/"))]
        if after:
            query.append(("start-after", self._below(after)))
        token: str | None = None
        while True:
            more = [("continuation-token", token)] if token else []
            answer = await self._ask(
                asked, "GET", self._base_path or "/", query=query + more, limit_bytes=LISTING_BYTES_MAX
            )
            self._expect(answer, asked, 200)
            page, token = _listing(answer.body, asked)
            if token is not None and (not page or (found and page[0][0] <= self._below(found[-1].name))):
                raise RemoteMismatch(f"{asked}, but the listing does not get on")
            found += [
                Found(key[len(self._below("")) :], size, when)
                for key, size, when in page
                if key.startswith(self._below(f"{folder}/")) and key > self._below(after)
            ]
            if token is None:
                return sorted(found)

    async def delete(self, name: str) -> None:
        """See Store.delete."""
        check_name(name)
        asked = f"{self._url}/{name}: asked to delete it"
        answer = await self._ask(asked, "DELETE", self._key(name))
        if answer.status != 404 or _names_bucket(answer):
            self._expect(answer, asked, 200, 204)

    async def aclose(self) -> None:
        """See Store.aclose."""
        await self._session.close()

    def _below(self, name: str) -> str:
        """The key of an object, or of all that begin so."""
        return f"{self._prefix}/{name}" if self._prefix else name

    def _key(self, name: str) -> str:
        return encoded_path(f"{self._base_path}/{self._below(name)}")

    async def _ask(
        self,
        asked: str,
        method: str,
        path: str,
        *,
        query: Iterable[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        pieces: Sequence[Bytes] = (),
        into: memoryview | None = None,
        accept: Callable[[Mapping[str, str]], object] | None = None,
        limit_bytes: int = ERROR_BYTES_MAX,
    ) -> Answer:
        """An answer that is neither a refusal of credentials that can be renewed nor one of no outcome."""
        digest = _sha256(pieces)
        encoded = encoded_query(query)
        url = URL(f"{self._origin}{path}{'?' if encoded else ''}{encoded}", encoded=True)
        host = self._origin.partition("://")[2]

        async def once(credentials: Credentials) -> Answer:
            signed = signed_headers(
                method, host, path, encoded, headers or {}, digest, credentials, self._region, self._now()
            )
            return await exchange(
                self._session,
                asked,
                method,
                url,
                signed,
                pieces,
                into=into,
                accept=accept,
                limit_bytes=limit_bytes,
            )

        answer = await self._with_credentials(once)
        self._clock_unix_s = answer.date_unix_s or self._clock_unix_s
        if answer.status in _UNKNOWN or answer.status >= 500 or _error_code(answer) == "RequestTimeout":
            raise RemoteUnavailable(f"{asked}, but the server cannot say now {_said(answer)}")
        return answer

    async def _with_credentials(self, once: Callable[[Credentials], Awaitable[Answer]]) -> Answer:
        credentials = await self._wallet.current()
        answer = await once(credentials)
        if answer.status in (401, 403) or _error_code(answer) in _STALE_CREDENTIALS:
            fresh = await self._wallet.renewed(credentials)
            if fresh is not None and fresh != credentials:
                return await once(fresh)
        return answer

    def _expect(self, answer: Answer, asked: str, *statuses: int) -> None:
        if answer.status not in statuses:
            raise _refusal(answer, asked)


def _place(bucket: str, settings: S3Settings) -> tuple[str, str]:
    """(scheme and host, path before the keys) of a bucket."""
    endpoint = settings.endpoint or f"https://s3.{settings.region}.amazonaws.com"
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ConfigError(
            f"{endpoint!r:.200} is no endpoint of a store", "use https://HOST or http://HOST:PORT"
        )
    path_style = settings.path_style if settings.path_style is not None else settings.endpoint is not None
    if path_style or "." in bucket:  # a certificate for *.HOST has no dots before it
        return f"{parts.scheme}://{parts.netloc}", f"/{bucket}"
    return f"{parts.scheme}://{bucket}.{parts.netloc}", ""


def _sha256(pieces: Sequence[Bytes]) -> str:
    if not pieces:
        return EMPTY_SHA256
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _refusal(answer: Answer, asked: str) -> TierblkError:
    hints = {
        301: "set the region, or the endpoint, to where the bucket is",
        307: "set the region, or the endpoint, to where the bucket is",
        401: "check the credentials",
        403: "check the credentials and what they allow, and this machine's clock",
        404: "check the name of the bucket",
    }
    return RemoteRefused(f"{asked}, but the server refuses it {_said(answer)}", hints.get(answer.status))


def _said(answer: Answer) -> str:
    """`(403 AccessDenied)`: status, and the code that the body has."""
    code = _error_code(answer)
    return f"({answer.status}{' ' if code else ''}{code})"


def _error_code(answer: Answer) -> str:
    if answer.status < 400:
        return ""
    tree = _parsed(answer.body)
    code = "" if tree is None else (tree.findtext("Code") or tree.findtext(f"{_NAMESPACE}Code") or "")
    return "".join(letter for letter in code[:60] if letter.isalnum())


def _names_bucket(answer: Answer) -> bool:
    return _error_code(answer) == "NoSuchBucket"


def _parsed(body: bytes) -> ElementTree.Element | None:
    """XML without a document type, which no answer of a store has and which can make a parser grow (I12)."""
    if b"<!" in body:
        return None
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return None


def _listing(body: bytes, asked: str) -> tuple[list[tuple[str, int, float]], str | None]:
    """(key, bytes, Unix time of creation) of a page of a listing, and the token of the next one."""
    tree = _parsed(body)
    if tree is None:
        raise RemoteMismatch(f"{asked}, but the answer is no listing")
    space = _NAMESPACE if tree.tag.startswith("{") else ""
    try:
        page = [
            (
                item.findtext(f"{space}Key") or "",
                int(item.findtext(f"{space}Size") or ""),
                datetime.fromisoformat(item.findtext(f"{space}LastModified") or "").timestamp(),
            )
            for item in tree.iterfind(f"{space}Contents")
        ]
    except (ValueError, OverflowError):
        raise RemoteMismatch(f"{asked}, but the answer is no listing that can be read") from None
    token = tree.findtext(f"{space}NextContinuationToken")
    if tree.findtext(f"{space}IsTruncated") == "true" and not token:
        raise RemoteMismatch(f"{asked}, but the listing goes on without saying where")
    return page, token if tree.findtext(f"{space}IsTruncated") == "true" else None
