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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp

from tierblk.remote.bucket import BucketStore, Place, Request, bucket_and_prefix, endpoint_parts
from tierblk.remote.exchange import Answer
from tierblk.remote.listing import BucketWords, error_code
from tierblk.remote.sigv4 import EMPTY_SHA256, Credentials, encoded_query, signed_headers
from tierblk.remote.store import Bytes
from tierblk.remote.wallet import Wallet

_STALE_CREDENTIALS = frozenset({"ExpiredToken", "TokenRefreshRequired"})  # with 400, where others say 401


@dataclass(frozen=True, slots=True)
class S3Settings:
    """endpoint: http(s)://HOST[:PORT], None for Amazon's. path_style: the bucket in the path, as most servers
    want it that are not Amazon's; None: wherever there is an endpoint."""

    region: str = "us-east-1"
    endpoint: str | None = None
    path_style: bool | None = None


class S3Store(BucketStore[Credentials]):
    """See Store for what its methods promise."""

    def __init__(
        self,
        url: str,
        settings: S3Settings,
        wallet: Wallet[Credentials],
        session: aiohttp.ClientSession,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """session: this store's from now on, see client.new_session. ConfigError for an address or endpoint
        that is none."""
        bucket, prefix = bucket_and_prefix(url, "s3", "s3://BUCKET/PREFIX")
        dialect = _S3(_place(bucket, settings), settings.region, now)
        super().__init__(url, prefix, dialect, wallet, session)


@dataclass(frozen=True, slots=True)
class _S3(BucketWords):
    """See Dialect."""

    place: Place
    region: str
    now: Callable[[], datetime]

    @property
    def creation(self) -> Mapping[str, str]:
        return {"if-none-match": "*"}

    def authorised(self, request: Request, credentials: Credentials) -> tuple[str, Mapping[str, str]]:
        query = encoded_query(request.query)
        return query, signed_headers(
            request.method,
            self.place.host,
            request.path,
            query,
            request.headers,
            _sha256(request.pieces),
            credentials,
            self.region,
            self.now(),
        )

    def is_stale(self, answer: Answer) -> bool:
        return error_code(answer) in _STALE_CREDENTIALS


def _place(bucket: str, settings: S3Settings) -> Place:
    scheme, host, _ = endpoint_parts(settings.endpoint or f"https://s3.{settings.region}.amazonaws.com")
    path_style = settings.path_style if settings.path_style is not None else settings.endpoint is not None
    if path_style or "." in bucket:  # a certificate for *.HOST has no dots before it
        return Place(f"{scheme}://{host}", f"/{bucket}")
    return Place(f"{scheme}://{bucket}.{host}", "")


def _sha256(pieces: Sequence[Bytes]) -> str:
    if not pieces:
        return EMPTY_SHA256
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
