"""SharedKey signatures for requests to Azure Blob (as its reference describes them for 2015-02-21 and later).
Pure.

The signature covers method, path, query, the headers named and the length of the body, but not its bytes.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tierblk.errors import ConfigError

_SIGNED_IN_ORDER = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)


@dataclass(frozen=True, slots=True)
class SharedKey:
    """The key of an account. It is never shown."""

    account: str
    key: bytes = field(repr=False)

    @classmethod
    def of_text(cls, account: str, text: str) -> SharedKey:
        """text: in base64, as the portal shows it. ConfigError when it is none."""
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not key:
            raise ConfigError(f"the key of the storage account {account} is not in base64")
        return cls(account, key)


def string_to_sign(
    method: str,
    account: str,
    path: str,
    query: Iterable[tuple[str, str]],
    headers: Mapping[str, str],
    body_bytes: int,
) -> str:
    """What the signature is made of.

    path: encoded, as it is sent; where it begins with the account, that is there twice. query: not encoded,
    no name twice. headers: all that are sent and count, names in lower case, with x-ms-date and without date.
    """
    # An empty body has a length of nothing.
    counted = {**headers, "content-length": str(body_bytes) if body_bytes else ""}
    lines = [method, *(counted.get(name, "").strip() for name in _SIGNED_IN_ORDER)]
    lines += [f"{name}:{headers[name].strip()}" for name in sorted(headers) if name.startswith("x-ms-")]
    lines.append(f"/{account}{path}")
    lines += [f"{name.lower()}:{value}" for name, value in sorted(query)]
    return "\n".join(lines)


def authorization(key: SharedKey, text: str) -> str:
    """The header's value. text: see string_to_sign."""
    signature = base64.b64encode(hmac.digest(key.key, text.encode(), "sha256")).decode()
    return f"SharedKey {key.account}:{signature}"
