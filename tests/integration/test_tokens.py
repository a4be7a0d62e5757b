"""Where the tokens for Google's storage and the credentials for Azure Blob come from: each place, with a
model server for who gives tokens; and renewal, by a clock that is moved."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.conftest import ROOT
from tests.integration import model_az, model_gs
from tests.integration.model_az import AzModel
from tests.integration.model_gs import GsModel
from tests.integration.models import Answered, Asked, Server
from tests.integration.servers import remote_settings
from tierblk.errors import ConfigError, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import azure, google, tokens
from tierblk.remote.az import AzCredentials, AzSettings, AzStore, Sas
from tierblk.remote.client import new_session
from tierblk.remote.gs import GsSettings, GsStore
from tierblk.remote.sharedkey import SharedKey
from tierblk.remote.wallet import Lease, RenewingWallet, Token, Wallet

HOUR_S = 3600.0
SECRET = "s3cr3t-of-somebody"
NOWHERE = "127.0.0.1:9"
Serve = Callable[[Callable[[Asked], Answered]], str]


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing of this machine's, and gcloud's folder."""
    for name in list(os.environ):
        if name.startswith(("GOOGLE_", "GCE_", "CLOUDSDK_", "AZURE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_HOST", NOWHERE)
    return tmp_path


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server; gives its origin."""
    with ExitStack() as servers:
        yield lambda answers: servers.enter_context(Server(answers)).origin


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def said(**fields: object) -> Answered:
    return Answered(200, json.dumps(fields).encode(), {"Metadata-Flavor": "Google"})


def holds_an_hour(lease: Lease[Token]) -> bool:
    return lease.until_unix_s is not None and abs(lease.until_unix_s - time.time() - HOUR_S) < 60


def account_file(folder: Path, key: rsa.RSAPrivateKey, token_uri: str) -> Path:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "account.json"
    fields = {
        "type": "service_account",
        "client_email": "tests@project.example",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(fields))
    return path


def claims_of(asked: Asked, key: rsa.RSAPrivateKey) -> dict[str, Any]:
    """What a signed request for a token claims. Raises InvalidSignature."""
    form = parse_qs(asked.body.decode())
    assert form["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
    head, claims, signature = form["assertion"][0].split(".")

    def decoded(part: str) -> bytes:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))

    assert json.loads(decoded(head))["alg"] == "RS256"
    key.public_key().verify(
        decoded(signature), f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256()
    )
    found: dict[str, Any] = json.loads(decoded(claims))
    return found


async def test_the_key_of_a_service_account(
    nothing: Path, serve: Serve, rsa_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file to an object in the model of the storage."""

    def answers(asked: Asked) -> Answered:
        claims = claims_of(asked, rsa_key)
        assert claims["iss"] == "tests@project.example"
        assert claims["aud"] == "https://oauth2.googleapis.com/token", "wherever it is exchanged"
        assert claims["scope"] == google.SCOPE
        assert claims["iat"] <= time.time() + 60 < claims["exp"]
        return said(access_token=model_gs.TOKEN, expires_in=HOUR_S, token_type="Bearer")

    path = account_file(nothing, rsa_key, f"{serve(answers)}/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    lease = google.from_places()
    assert lease.credentials == Token(model_gs.TOKEN)
    assert holds_an_hour(lease)
    with GsModel() as server:
        store = GsStore(
            f"gs://{model_gs.BUCKET}/x",
            GsSettings(server.origin),
            RenewingWallet(google.from_places),
            await new_session(remote_settings()),
        )
        assert await store.create("volume.json", [b"x"])
        await store.aclose()


def test_the_file_that_gcloud_makes_for_a_user(nothing: Path, serve: Serve) -> None:
    def answers(asked: Asked) -> Answered:
        form = {name: values[0] for name, values in parse_qs(asked.body.decode()).items()}
        assert form == {
            "grant_type": "refresh_token",
            "client_id": "client",
            "client_secret": SECRET,
            "refresh_token": "refresh",
        }
        return said(access_token="T", expires_in=HOUR_S)

    fields = {
        "type": "authorized_user",
        "client_id": "client",
        "client_secret": SECRET,
        "refresh_token": "refresh",
    }
    path = nothing / "application_default_credentials.json"
    path.write_text(json.dumps({**fields, "token_uri": serve(answers)}))
    lease = google.from_places()
    assert lease.credentials == Token("T")
    assert holds_an_hour(lease)


def test_the_metadata_server_of_google(nothing: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(asked: Asked) -> Answered:
        assert asked.headers["metadata-flavor"] == "Google"
        assert asked.raw_path == "/computeMetadata/v1/instance/service-accounts/default/token"
        return said(access_token="T", expires_in=3600, token_type="Bearer")

    monkeypatch.setenv("GCE_METADATA_HOST", serve(answers).removeprefix("http://"))
    monkeypatch.setenv("http_proxy", f"http://{NOWHERE}")
    lease = google.from_places()
    assert lease.credentials == Token("T")
    assert holds_an_hour(lease)


FLAVOR = {"Metadata-Flavor": "Google"}


@pytest.mark.parametrize(
    ("answered", "error", "words"),
    [
        (Answered(200, b'{"access_token": "T", "expires_in": 9}'), RemoteRefused, "none of Google's"),
        (Answered(404, b"", FLAVOR), RemoteRefused, "no service account"),
        (Answered(503, SECRET.encode(), FLAVOR), RemoteUnavailable, "status 503"),
        (Answered(302, b"", {**FLAVOR, "Location": f"http://{NOWHERE}"}), RemoteUnavailable, "status 302"),
        (Answered(200, SECRET.encode(), FLAVOR), RemoteUnavailable, "something else"),
        (said(access_token=SECRET + "\r\nHost: x", expires_in=9), RemoteUnavailable, "something else"),
        (said(access_token=SECRET), RemoteUnavailable, "for how long"),
        (said(access_token=SECRET, expires_in="NaN"), RemoteUnavailable, "for how long"),
        (said(expires_in=9), RemoteUnavailable, "something else"),
    ],
)
def test_what_the_metadata_server_of_google_may_say(
    nothing: Path,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    answered: Answered,
    error: type[TierblkError],
    words: str,
) -> None:
    origin = serve(lambda asked: answered)
    monkeypatch.setenv("GCE_METADATA_HOST", origin.removeprefix("http://"))
    with pytest.raises(error, match=words) as failed:
        google.from_places()
    assert SECRET not in str(failed.value)


def test_no_place_of_google_has_anything(nothing: Path) -> None:
    with pytest.raises(RemoteUnavailable, match="there are no credentials for Google's storage") as failed:
        google.from_places()
    assert "GOOGLE_APPLICATION_CREDENTIALS" in str(failed.value.hint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        (f"no JSON {SECRET}", "no file of credentials"),
        ("[]", "no file of credentials"),
        (f'{{"type": "authorized_user", "refresh_token": "{SECRET}"}}', "no file of credentials"),
        (
            '{"type": "service_account", "client_email": "x", "token_uri": "y", '
            f'"private_key": "{SECRET}"}}',
            "no file of credentials",
        ),
        (f'{{"type": "external_account", "audience": "{SECRET}"}}', "not supported"),
    ],
)
def test_files_that_give_no_token(
    nothing: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, words: str
) -> None:
    path = nothing / "key.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(RemoteRefused, match=words) as failed:
        google.from_places()
    assert SECRET not in f"{failed.value} {failed.value.hint}"


@pytest.mark.parametrize(("status", "error"), [(400, RemoteRefused), (503, RemoteUnavailable)])
def test_what_who_exchanges_a_key_may_say(
    nothing: Path,
    serve: Serve,
    rsa_key: rsa.RSAPrivateKey,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    error: type[TierblkError],
) -> None:
    said = json.dumps({"error": "invalid_grant", "error_description": SECRET}).encode()
    path = account_file(nothing, rsa_key, serve(lambda asked: Answered(status, said)))
    monkeypatch.setattr("google.auth._exponential_backoff.time.sleep", lambda seconds: None)
    with pytest.raises(error, match="gives no token") as failed:
        google.from_file(path)
    assert SECRET not in f"{failed.value} {failed.value.hint}"


def test_an_exchange_that_nobody_answers_or_that_is_a_file(nothing: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    for uri in (f"http://{NOWHERE}/?{SECRET}", f"file://{nothing}/account.json"):
        with pytest.raises(RemoteUnavailable, match="does not answer who asks for a token") as failed:
            google.from_file(account_file(nothing, rsa_key, uri))
        assert SECRET not in str(failed.value)


def test_google_auth_is_not_loaded_before_a_file_is_used() -> None:
    program = (
        "import sys, tierblk.remote.gs, tierblk.remote.google, tierblk.remote.azure\n"
        "print('google.auth' in sys.modules, 'cryptography' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert run.stdout == "False False\n"


def test_the_variables_of_azure(nothing: Path) -> None:
    def found(**environ: str) -> tuple[AzCredentials, str | None]:
        access = azure.found("account1", {f"AZURE_STORAGE_{name}": text for name, text in environ.items()})
        return asyncio.run(_current(access.wallet)), access.endpoint

    key, sas = SharedKey("account1", b"the key"), "sv=1&sig=abc%3D"
    text = base64.b64encode(key.key).decode()
    assert found(KEY=text) == (key, None)
    assert found(SAS_TOKEN=f"?{sas}") == (Sas(sas), None)
    assert found(CONNECTION_STRING=f"AccountName=account1;AccountKey={text}", KEY="other") == (key, None)
    assert found(CONNECTION_STRING=f"AccountKey={text};BlobEndpoint=http://h:1/account1;") == (
        key,
        "http://h:1/account1",
    )
    assert found(CONNECTION_STRING=f"SharedAccessSignature={sas};EndpointSuffix=core.example") == (
        Sas(sas),
        "https://account1.blob.core.example",
    )


async def _current(wallet: Wallet[AzCredentials]) -> AzCredentials:
    found = await wallet.current()
    assert await wallet.renewed(found) is None
    return found


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("KEY", SECRET, "not in base64"),
        ("SAS_TOKEN", SECRET, "SAS token"),
        ("SAS_TOKEN", f"sv=1&sig={SECRET}#x", "SAS token"),
        ("CONNECTION_STRING", SECRET, "neither"),
        ("CONNECTION_STRING", f"AccountName=other;AccountKey={SECRET}", "another account"),
        ("CONNECTION_STRING", f"AccountKey={SECRET}", "not in base64"),
    ],
)
def test_variables_of_azure_that_cannot_be_used(name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        azure.found("account1", {f"AZURE_STORAGE_{name}": text})
    assert SECRET not in f"{refused.value} {refused.value.hint}"


async def test_the_identity_of_a_machine_at_azure(nothing: Path, serve: Serve) -> None:
    """From the metadata server to an object in the model of the storage. The token is not new then."""

    def answers(asked: Asked) -> Answered:
        assert asked.headers["metadata"] == "true"
        assert asked.raw_path == "/metadata/identity/oauth2/token"
        assert (asked.word("resource"), asked.word("client_id")) == ("https://storage.azure.com/", "me")
        ends = str(int(time.time() + HOUR_S))
        return said(access_token=model_az.TOKEN, expires_in="86400", expires_on=ends, token_type="Bearer")

    fetch = partial(azure.from_identity, serve(answers), client_id="me")
    assert holds_an_hour(fetch())
    with AzModel() as server:
        store = AzStore(
            f"az://{model_az.ACCOUNT}/{model_az.CONTAINER}/x",
            AzSettings(server.endpoint),
            azure.found(model_az.ACCOUNT, {}, fetch=fetch).wallet,
            await new_session(remote_settings()),
        )
        assert await store.create("volume.json", [b"x"])
        await store.aclose()


@pytest.mark.parametrize(
    ("answered", "error"),
    [
        (Answered(400, SECRET.encode()), RemoteRefused),
        (Answered(404), RemoteUnavailable),
        (Answered(429), RemoteUnavailable),
        (Answered(200, SECRET.encode()), RemoteUnavailable),
        (said(access_token=SECRET), RemoteUnavailable),
    ],
)
def test_what_the_metadata_server_of_azure_may_say(
    nothing: Path, serve: Serve, answered: Answered, error: type[TierblkError]
) -> None:
    with pytest.raises(error) as failed:
        azure.from_identity(serve(lambda asked: answered))
    assert SECRET not in str(failed.value)


def test_a_machine_without_a_metadata_server_of_azure() -> None:
    with pytest.raises(RemoteUnavailable, match="there are no credentials for Azure Blob") as failed:
        azure.from_identity(f"http://{NOWHERE}")
    assert "AZURE_STORAGE_KEY" in str(failed.value.hint)


@pytest.mark.parametrize("vendor", ["google", "azure"])
async def test_tokens_are_renewed_while_the_old_ones_hold(
    nothing: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, vendor: str
) -> None:
    """Two hours of tokens that hold 20 minutes, half a minute at a time; the server is away for a while."""
    now_unix_s, life_s = 1_000_000.0, 1200
    born: dict[str, float] = {}

    def answers(asked: Asked) -> Answered:
        if 1_003_000 < now_unix_s < 1_003_400:
            return Answered(503, b"", FLAVOR)
        token = f"T{len(born)}"
        born[token] = now_unix_s
        return said(access_token=token, expires_in=life_s, expires_on=str(int(now_unix_s + life_s)))

    origin = serve(answers)
    monkeypatch.setenv("GCE_METADATA_HOST", origin.removeprefix("http://"))
    fetch = {
        "google": partial(google.from_metadata, lambda: now_unix_s),
        "azure": partial(azure.from_identity, origin),
    }[vendor]
    wallet = RenewingWallet(fetch, clock=lambda: now_unix_s)
    while now_unix_s < 1_007_200:
        token = await wallet.current()
        if wallet._renewal is not None:
            await asyncio.wait([wallet._renewal])
        await asyncio.sleep(0)  # what the renewal's end calls
        assert now_unix_s < born[token.text] + life_s, "an expired one was given away"
        now_unix_s += 30
    assert 8 <= len(born) <= 10, "renewed with 300 s left, not each time"


def test_a_reply_is_not_shown() -> None:
    assert SECRET not in repr(tokens.Reply(200, {"x": SECRET}, SECRET.encode()))
