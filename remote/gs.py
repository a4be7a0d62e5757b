"""Stores behind gs://BUCKET/PREFIX: Google Cloud Storage by its XML interface, with tokens of OAuth.

What an answer means (R16: what is not known is never guessed):

    answer                                     to `create`             to the others
    -----------------------------------------  ----------------------  -----------------
    200                                        it was made             done
    404                                        RemoteRefused (bucket)  there is none
    412 (generation 0 asked for)               there is one already    RemoteRefused
    408, 409, 429 (also: one name too often),
    5xx, no answer                             RemoteUnavailable       RemoteUnavailable
    401, 403                                   once more with a fresh token, then RemoteRefused
    any other                                  RemoteRefused           RemoteRefused

Tried against a model server only, not against Google's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from tierblk.remote.bucket import BucketStore, Place, Request, bucket_and_prefix, endpoint_parts
from tierblk.remote.exchange import Answer
from tierblk.remote.listing import BucketWords
from tierblk.remote.sigv4 import encoded_query
from tierblk.remote.wallet import Token, Wallet


@dataclass(frozen=True, slots=True)
class GsSettings:
    """endpoint: http(s)://HOST[:PORT] that the token is sent to."""

    endpoint: str = "https://storage.googleapis.com"


class GsStore(BucketStore[Token]):
    """See Store for what its methods promise."""

    def __init__(
        self, url: str, settings: GsSettings, wallet: Wallet[Token], session: aiohttp.ClientSession
    ) -> None:
        """wallet: RenewingWallet(google.from_places). session: this store's from now on, see
        client.new_session. ConfigError for an address or endpoint that is none."""
        bucket, prefix = bucket_and_prefix(url, "gs", "gs://BUCKET/PREFIX")
        scheme, host, _ = endpoint_parts(settings.endpoint)
        super().__init__(url, prefix, _Gs(Place(f"{scheme}://{host}", f"/{bucket}")), wallet, session)


@dataclass(frozen=True, slots=True)
class _Gs(BucketWords):
    """See Dialect."""

    place: Place

    @property
    def creation(self) -> Mapping[str, str]:
        return {"x-goog-if-generation-match": "0"}

    def authorised(self, request: Request, credentials: Token) -> tuple[str, Mapping[str, str]]:
        headers = {**request.headers, "authorization": f"Bearer {credentials.text}"}
        return encoded_query(request.query), headers

    def is_stale(self, answer: Answer) -> bool:
        return False  # 401 says it
