"""Where the tokens for Google's storage come from: the places where its own tools look, in their order.

    GOOGLE_APPLICATION_CREDENTIALS     a file: a service account's key, or what gcloud makes for a user
    application_default_credentials    of gcloud, in CLOUDSDK_CONFIG or ~/.config/gcloud: the same
    the metadata server                of the machine or cluster; GCE_METADATA_HOST: HOST[:PORT] of another

google-auth makes of a file the request for a token, and signs it. It blocks and takes long to import, so it
is loaded when the first file is used and runs in threads. Its own client of the metadata server needs one
more package and reads the environment at import; a GET does as well.

Tried against model servers only, not against Google's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import tokens
from tierblk.remote.wallet import Lease, Token

if TYPE_CHECKING:
    import google.auth.credentials

KEY_FILE_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
METADATA_VARIABLE = "GCE_METADATA_HOST"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_TOKEN_URI = "https://oauth2.googleapis.com/token"
_TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
_FLAVOR = ("Metadata-Flavor", "Google")  # asked for and answered: neither a browser nor another server does
_HINT = f"set {KEY_FILE_VARIABLE} to a key file, or run `gcloud auth application-default login`"


def from_places() -> Lease[Token]:
    """The token of the first place that has something. Blocks. RemoteRefused: what it has gives none;
    RemoteUnavailable: it gives none now, or no place has anything."""
    named = os.environ.get(KEY_FILE_VARIABLE)
    if named:
        return from_file(Path(named))
    folder = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    path = Path(folder) / "application_default_credentials.json"
    return from_file(path) if path.is_file() else from_metadata()


def from_file(path: Path) -> Lease[Token]:
    """The token that a file gives. Blocks; errors as from_places."""
    import google.auth.exceptions

    try:
        fields = json.loads(path.read_bytes())
        credentials = _credentials(fields)
    except TierblkError:
        raise
    except OSError as error:
        raise RemoteRefused(f"{path} cannot be read: {error.strerror}", _HINT) from None
    except Exception as error:
        # Not its words: they may quote the key.
        raise RemoteRefused(f"{path} is no file of credentials ({type(error).__name__})", _HINT) from None
    try:
        credentials.refresh(_transport())  # type: ignore[no-untyped-call]
    except TierblkError:
        raise
    except Exception as error:
        message = f"{path} gives no token for Google's storage ({type(error).__name__})"
        if isinstance(error, google.auth.exceptions.GoogleAuthError) and not error.retryable:
            raise RemoteRefused(message, "the key may have been deleted, or the clock be wrong") from None
        raise RemoteUnavailable(message) from None
    expiry = credentials.expiry  # UTC, without saying so
    until_unix_s = None if expiry is None else expiry.replace(tzinfo=UTC).timestamp()
    return tokens.lease_of(credentials.token, until_unix_s, str(path))


def from_metadata(clock: Callable[[], float] = time.time) -> Lease[Token]:
    """The token of the account that this machine runs as. Blocks; errors as from_places. clock: Unix time."""
    host = os.environ.get(METADATA_VARIABLE) or "metadata.google.internal"
    who = f"the metadata server {host!r:.200}"
    try:
        reply = tokens.ask(f"http://{host}{_TOKEN_PATH}", dict([_FLAVOR]))
    except RemoteUnavailable as error:
        raise RemoteUnavailable(f"there are no credentials for Google's storage: {error}", _HINT) from None
    if reply.headers.get(_FLAVOR[0]) != _FLAVOR[1]:
        raise RemoteRefused(f"{who} is none of Google's", _HINT)
    if reply.status == 404:
        raise RemoteRefused(f"{who} knows no service account of this machine", _HINT)
    if reply.status != 200:
        raise RemoteUnavailable(f"{who} gives no token now (status {reply.status})")
    fields = tokens.fields_of(reply.body, who)
    until_unix_s = clock() + tokens.seconds(fields.get("expires_in"), who)
    return tokens.lease_of(fields.get("access_token"), until_unix_s, who)


def _credentials(fields: Mapping[str, Any]) -> google.auth.credentials.Credentials:
    """What google-auth makes of a file. Raises anything when it is none."""
    import google.oauth2.credentials
    import google.oauth2.service_account

    match fields["type"]:
        case "service_account":
            account = google.oauth2.service_account.Credentials
            return account.from_service_account_info(fields, scopes=[SCOPE])  # type: ignore[no-any-return, no-untyped-call]
        case "authorized_user":  # its scopes were agreed upon when it was made
            return google.oauth2.credentials.Credentials(  # type: ignore[no-untyped-call]
                None,
                refresh_token=fields["refresh_token"],
                token_uri=fields.get("token_uri") or _TOKEN_URI,
                client_id=fields["client_id"],
                client_secret=fields["client_secret"],
            )
        case _:
            raise RemoteRefused(
                "credentials for Google's storage of that type are not supported",
                "use a service account's key, a user's file of gcloud, or the metadata server",
            )


def _transport() -> Any:
    """How google-auth sends its requests."""
    import google.auth.transport

    class Response(google.auth.transport.Response):
        def __init__(self, reply: tokens.Reply) -> None:
            self._reply = reply

        @property
        def status(self) -> int:
            return self._reply.status

        @property
        def headers(self) -> Mapping[str, str]:
            return self._reply.headers

        @property
        def data(self) -> bytes:
            return self._reply.body

    class Request(google.auth.transport.Request):
        def __call__(
            self,
            url: str,
            method: str = "GET",
            body: bytes | None = None,
            headers: Mapping[str, str] | None = None,
            timeout: float | None = None,
            **more: Any,
        ) -> Response:
            return Response(tokens.ask(url, headers or {}, method=method, body=body, through_proxy=True))

    return Request()
