"""Stores behind az://ACCOUNT/CONTAINER/PREFIX: Azure Blob; an object is a block blob, made by one Put Blob.

What an answer means (R16: what is not known is never guessed):

    answer                                     to `create`                to the others
    -----------------------------------------  -------------------------  -----------------
    201; 200, 206, 202 of the others           it was made                done
    404 BlobNotFound                           RemoteRefused              there is none
    404 of another kind (container, account)   RemoteRefused              RemoteRefused
    409 BlobAlreadyExists, 412                 there is one already       RemoteRefused
    409 of another kind, 408, 429, 5xx,
    no answer                                  RemoteUnavailable          RemoteUnavailable
    401, 403                                   once more with a fresh token, then RemoteRefused
    any other                                  RemoteRefused              RemoteRefused

Tried against a model server only, not against Azure's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from xml.etree.ElementTree import Element

import aiohttp

from tierblk import address
from tierblk.errors import ConfigError, RemoteMismatch
from tierblk.remote.bucket import BucketStore, Place, Request, bucket_and_prefix, endpoint_parts
from tierblk.remote.exchange import Answer
from tierblk.remote.listing import Page, error_code, parsed, plain
from tierblk.remote.sharedkey import SharedKey, authorization, string_to_sign
from tierblk.remote.sigv4 import encoded_query
from tierblk.remote.wallet import Token, Wallet

VERSION = "2021-12-02"
EMPTY_PAGES_MAX = 1000  # it may stop a page anywhere, also before the first name
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}", re.ASCII)
_CONTAINER = re.compile(r"\$?[a-z0-9-]{3,63}", re.ASCII)
_SAS = re.compile(r"[A-Za-z0-9%&=._~+/:,-]+")


@dataclass(frozen=True, slots=True)
class Sas:
    """A signed query (shared access signature), encoded. It is never shown."""

    query: str = field(repr=False)

    @classmethod
    def of_text(cls, text: str) -> Sas:
        """text: with or without the question mark. ConfigError when it is none."""
        query = text.strip().removeprefix("?").strip("&")
        if not _SAS.fullmatch(query) or "sig=" not in query:
            raise ConfigError("the SAS token is none", "it looks like sv=...&sp=...&sig=...")
        return cls(query)


AzCredentials = SharedKey | Sas | Token


@dataclass(frozen=True, slots=True)
class AzSettings:
    """endpoint: of the account, http(s)://HOST[:PORT][/ACCOUNT]; None: Azure's."""

    endpoint: str | None = None


class AzStore(BucketStore[AzCredentials]):
    """See Store for what its methods promise."""

    def __init__(
        self,
        url: str,
        settings: AzSettings,
        wallet: Wallet[AzCredentials],
        session: aiohttp.ClientSession,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """wallet: see azure.found. session: this store's from now on, see client.new_session. ConfigError for
        an address or endpoint that is none."""
        account, container, prefix = az_parts(url)
        scheme, host, path = endpoint_parts(
            settings.endpoint or f"https://{account}.blob.core.windows.net", with_path=True
        )
        dialect = _Az(Place(f"{scheme}://{host}", f"{path}/{container}"), now)
        super().__init__(url, prefix, dialect, wallet, session)


def az_parts(url: str) -> tuple[str, str, str]:
    """(account, container, prefix) of an address. ConfigError when it is none."""
    pattern = "az://ACCOUNT/CONTAINER/PREFIX"
    account, path = bucket_and_prefix(url, "az", pattern)
    container, _, prefix = path.partition("/")
    if not _ACCOUNT.fullmatch(account) or not _CONTAINER.fullmatch(container):
        raise ConfigError(f"{address.shown(url)!r:.200} is no address of a store", f"use {pattern}")
    return account, container, prefix.strip("/")


@dataclass(frozen=True, slots=True)
class _Az:
    """See Dialect."""

    place: Place
    now: Callable[[], datetime]

    @property
    def creation(self) -> Mapping[str, str]:
        return {"if-none-match": "*", "x-ms-blob-type": "BlockBlob"}

    @property
    def empty_pages_max(self) -> int:
        return EMPTY_PAGES_MAX

    def authorised(self, request: Request, credentials: AzCredentials) -> tuple[str, Mapping[str, str]]:
        query = encoded_query(request.query)
        headers = {
            **request.headers,
            "x-ms-version": VERSION,
            "x-ms-date": format_datetime(self.now().astimezone(UTC), usegmt=True),
        }
        match credentials:
            case SharedKey():
                body_bytes = sum(memoryview(piece).nbytes for piece in request.pieces)
                text = string_to_sign(
                    request.method, credentials.account, request.path, request.query, headers, body_bytes
                )
                headers["authorization"] = authorization(credentials, text)
            case Sas():
                query = f"{query}&{credentials.query}" if query else credentials.query
            case Token():
                headers["authorization"] = f"Bearer {credentials.text}"
        return query, headers

    def code(self, answer: Answer) -> str:
        if answer.status < 400:
            return ""
        return plain(answer.headers.get("x-ms-error-code", "")) or error_code(answer)

    def is_there_already(self, answer: Answer) -> bool:
        return answer.status == 412 or (answer.status == 409 and self.code(answer) == "BlobAlreadyExists")

    def is_missing_bucket(self, answer: Answer) -> bool:
        return self.code(answer) != "BlobNotFound"

    def is_stale(self, answer: Answer) -> bool:
        return False  # 401 and 403 say it

    def is_unknown(self, answer: Answer) -> bool:
        return False  # its status says it

    def listing_query(self, prefix: str, after: str, token: str | None) -> list[tuple[str, str]]:
        """Of what sorts behind `after` this version cannot be asked."""
        query = [("restype", "container"), ("comp", "list"), ("prefix", prefix)]
        return [*query, ("marker", token)] if token else query

    def page(self, body: bytes, asked: str) -> Page:
        tree = parsed(body)
        if tree is None or tree.tag != "EnumerationResults":
            raise RemoteMismatch(f"{asked}, but the answer is no listing")
        try:
            objects = [
                (
                    blob.findtext("Name") or "",
                    int(blob.findtext("Properties/Content-Length") or ""),
                    _born(blob),
                )
                for blob in tree.iterfind("Blobs/Blob")
                # An account with folders lists these too.
                if blob.findtext("Properties/ResourceType") != "directory"
            ]
        except (ValueError, TypeError, IndexError, OverflowError):
            raise RemoteMismatch(f"{asked}, but the answer is no listing that can be read") from None
        return Page(objects, tree.findtext("NextMarker") or None)


def _born(blob: Element) -> float:
    """Unix time: when it was created, which a change of its tier or its metadata leaves alone."""
    text = blob.findtext("Properties/Creation-Time") or blob.findtext("Properties/Last-Modified") or ""
    return parsedate_to_datetime(text).timestamp()
