"""Where the credentials for Azure Blob come from: the variables that its own tools know, else the identity of
this machine.

    AZURE_STORAGE_CONNECTION_STRING    a key or a SAS token, and perhaps an endpoint
    AZURE_STORAGE_KEY                  the account's key: requests are signed with it
    AZURE_STORAGE_SAS_TOKEN            a signed query that is sent with each request
    managed identity                   the metadata server gives tokens; AZURE_CLIENT_ID chooses among several

Tried against a model server only, not against Azure's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

from tierblk.errors import ConfigError, RemoteRefused, RemoteUnavailable
from tierblk.remote import tokens
from tierblk.remote.az import AzCredentials, Sas
from tierblk.remote.sharedkey import SharedKey
from tierblk.remote.wallet import FixedWallet, Lease, RenewingWallet, Token, Wallet

METADATA_ORIGIN = "http://169.254.169.254"
RESOURCE = "https://storage.azure.com/"
_CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
_HINT = (
    f"set {_CONNECTION}, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or give this machine an identity "
    "that may use the container"
)


@dataclass(frozen=True, slots=True)
class Access:
    """endpoint: where a connection string says that the account is; None: it does not."""

    wallet: Wallet[AzCredentials]
    endpoint: str | None = None


def found(
    account: str,
    environ: Mapping[str, str] = os.environ,
    *,
    fetch: Callable[[], Lease[Token]] | None = None,
) -> Access:
    """How an account is accessed. Asks nobody yet. ConfigError for a variable that cannot be used.

    fetch: what asks for the identity's token; blocks.
    """
    if text := environ.get(_CONNECTION):
        return _of_connection_string(account, text)
    if text := environ.get("AZURE_STORAGE_KEY"):
        return Access(FixedWallet[AzCredentials](SharedKey.of_text(account, text)))
    if text := environ.get("AZURE_STORAGE_SAS_TOKEN"):
        return Access(FixedWallet[AzCredentials](Sas.of_text(text)))
    ask = fetch or partial(from_identity, client_id=environ.get("AZURE_CLIENT_ID"))
    return Access(RenewingWallet[AzCredentials](ask))


def from_identity(origin: str = METADATA_ORIGIN, *, client_id: str | None = None) -> Lease[Token]:
    """The token of this machine's identity. Blocks. RemoteRefused: it has none; RemoteUnavailable: it cannot
    be had now, or there is no metadata server."""
    who = "the metadata server of Azure"
    query = {"api-version": "2018-02-01", "resource": RESOURCE}
    if client_id:
        query["client_id"] = client_id
    try:
        reply = tokens.ask(
            f"{origin}/metadata/identity/oauth2/token?{urlencode(query)}", {"Metadata": "true"}
        )
    except RemoteUnavailable as error:
        raise RemoteUnavailable(f"there are no credentials for Azure Blob: {error}", _HINT) from None
    if reply.status in (400, 401, 403):
        raise RemoteRefused(f"{who} gives this machine no identity (status {reply.status})", _HINT)
    if reply.status != 200:  # 404 and 410 while it is being updated
        raise RemoteUnavailable(f"{who} gives no token now (status {reply.status})")
    fields = tokens.fields_of(reply.body, who)
    # Not expires_in: that counts from when the token was made, which may be hours ago.
    until_unix_s = tokens.seconds(fields.get("expires_on"), who)
    return tokens.lease_of(fields.get("access_token"), until_unix_s, who)


def _of_connection_string(account: str, text: str) -> Access:
    fields = dict(part.partition("=")[::2] for part in text.strip().split(";") if part)
    named = fields.get("AccountName", account)
    if named != account:
        raise ConfigError(
            f"{_CONNECTION} is of another account than {account}", "unset it, or change the address"
        )
    endpoint = fields.get("BlobEndpoint")
    if endpoint is None and "EndpointSuffix" in fields:
        scheme = fields.get("DefaultEndpointsProtocol", "https")
        endpoint = f"{scheme}://{account}.blob.{fields['EndpointSuffix']}"
    if "AccountKey" in fields:
        key = SharedKey.of_text(account, fields["AccountKey"])
        return Access(FixedWallet[AzCredentials](key), endpoint)
    if "SharedAccessSignature" in fields:
        return Access(FixedWallet[AzCredentials](Sas.of_text(fields["SharedAccessSignature"])), endpoint)
    raise ConfigError(f"{_CONNECTION} has neither AccountKey nor SharedAccessSignature")
