"""AWS Signature Version 4 for S3 requests (as the Amazon S3 API reference describes it). Pure.

The signature covers method, path, query, the headers named, the time and the body's hash, so what arrives is
what was sent. Of a day, region and secret the key is derived once.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who asks. token: of temporary ones. They are never shown."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


def encoded_path(path: str) -> str:
    """A path as S3 wants it signed and sent: each byte but the unreserved ones and the slash."""
    return quote(path, safe="/-_.~")


def encoded_query(query: Iterable[tuple[str, str]]) -> str:
    """The pairs in the order and form in which they are signed, and so sent."""
    return "&".join(
        sorted(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in query)
    )


def signed_headers(
    method: str,
    host: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    payload_sha256: str,
    credentials: Credentials,
    region: str,
    now: datetime,
) -> dict[str, str]:
    """What to send: `headers` and those that make the request signed.

    host: with the port, where it is sent. path, query: encoded, see above. headers: names in lower case, all
    of them are signed. payload_sha256: hex, of the whole body. now: with its time zone.
    """
    stamp = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    signed = {
        **headers,
        "host": host,
        "x-amz-content-sha256": payload_sha256,
        "x-amz-date": stamp,
        **({"x-amz-security-token": credentials.token} if credentials.token else {}),
    }
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{' '.join(signed[name].split())}\n" for name in sorted(signed))
    request = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{payload_sha256}"
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.new(_key(credentials.secret_key, stamp[:8], region), to_sign.encode(), "sha256")
    signed["authorization"] = (
        f"{_ALGORITHM} Credential={credentials.access_key}/{scope}, SignedHeaders={names}, "
        f"Signature={signature.hexdigest()}"
    )
    return signed


@lru_cache(maxsize=16)
def _key(secret_key: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
