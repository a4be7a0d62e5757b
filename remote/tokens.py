"""Tokens of OAuth: one blocking request, for the threads that ask for them, and the lease in its answer.

What a server says never gets into a message: it may be the secret, or a part of it.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from tierblk import address
from tierblk.errors import RemoteUnavailable
from tierblk.remote.wallet import Lease, Token

REQUEST_S = 10.0
ANSWER_BYTES_MAX = 1 << 20

_SENDABLE = re.compile(r"[\x21-\x7e]{1,16384}")


@dataclass(frozen=True, slots=True)
class Reply:
    """headers: looked up without regard to case."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


def ask(
    url: str,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    body: bytes | None = None,
    through_proxy: bool = False,
) -> Reply:
    """The answer, whatever its status; a redirect is one too. Blocks. RemoteUnavailable: there is none.

    through_proxy: as the environment says. Servers of metadata are beside the machine, never behind a proxy.
    """
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.UnknownHandler(),  # no files: what names the address may be a downloaded one
    ]
    if through_proxy:
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(url, body, dict(headers), method=method)
        with opener.open(request, timeout=REQUEST_S) as response:
            return Reply(response.status, response.headers, response.read(ANSWER_BYTES_MAX))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RemoteUnavailable(
            f"{address.shown(url)!r:.200} does not answer who asks for a token ({type(error).__name__})"
        ) from None


def fields_of(body: bytes, who: str) -> dict[str, object]:
    """A JSON object. RemoteUnavailable when it is none. who: gave it."""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RemoteUnavailable(f"{who} gave something else than a token")
    return found


def lease_of(text: object, until_unix_s: float | None, who: str) -> Lease[Token]:
    """The lease of a token that can be sent in a header. RemoteUnavailable when it is none."""
    if not isinstance(text, str) or not _SENDABLE.fullmatch(text):
        raise RemoteUnavailable(f"{who} gave something else than a token")
    return Lease(Token(text), until_unix_s)


def seconds(value: object, who: str) -> float:
    """A number of an answer, which some write as text. RemoteUnavailable when it is none."""
    try:
        number = float(str(value)[:40])
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e11:  # which no NaN is
        raise RemoteUnavailable(f"{who} gave a token without saying for how long")
    return number
