"""The stores of Google and Azure where they differ from S3, and what both do with a server that is not as it
should be. The servers are models (model_gs.py, model_az.py)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.integration import model_az, model_gs
from tests.integration.model_az import AzModel
from tests.integration.model_gs import GsModel
from tests.integration.models import Answered, Server
from tests.integration.servers import remote_settings
from tierblk.errors import ConfigError, RemoteMismatch, RemoteRefused, RemoteUnavailable
from tierblk.remote.az import AzCredentials, AzSettings, AzStore, Sas
from tierblk.remote.client import new_session
from tierblk.remote.gs import GsSettings, GsStore
from tierblk.remote.sharedkey import SharedKey
from tierblk.remote.store import Store, prove
from tierblk.remote.wallet import FixedWallet, Lease, RenewingWallet, Token

GS_URL = f"gs://{model_gs.BUCKET}/volumes/one"
AZ_URL = f"az://{model_az.ACCOUNT}/{model_az.CONTAINER}/volumes/one"
ENTRIES = 250


class Opener:
    """Opens stores, which are closed at the end of the test."""

    def __init__(self) -> None:
        self.opened: list[Store] = []

    async def gs(self, origin: str, *tokens: str, url: str = GS_URL) -> GsStore:
        """tokens: each is given out until it is refused."""
        wallet = RenewingWallet(leases([Token(text) for text in tokens or [model_gs.TOKEN]]))
        store = GsStore(url, GsSettings(origin), wallet, await new_session(remote_settings()))
        self.opened.append(store)
        return store

    async def az(self, endpoint: str, *credentials: AzCredentials, url: str = AZ_URL) -> AzStore:
        """credentials: each is given out until it is refused."""
        wallet = RenewingWallet[AzCredentials](leases(list(credentials or [account_key()])))
        store = AzStore(url, AzSettings(endpoint), wallet, await new_session(remote_settings()))
        self.opened.append(store)
        return store


def leases(credentials: list[AzCredentials] | list[Token]) -> Callable[[], Lease[Token]]:
    left = list(credentials)
    return lambda: Lease(left.pop(0) if len(left) > 1 else left[0])  # type: ignore[arg-type]


def account_key(text: str = model_az.KEY) -> SharedKey:
    return SharedKey.of_text(model_az.ACCOUNT, text)


@pytest.fixture
async def opening() -> AsyncIterator[Opener]:
    opener = Opener()
    yield opener
    for store in opener.opened:
        await store.aclose()


@pytest.fixture
def google() -> Iterator[GsModel]:
    with GsModel() as server:
        yield server


@pytest.fixture
def azure() -> Iterator[AzModel]:
    with AzModel() as server:
        yield server


async def test_a_server_that_lets_all_of_them_win_is_refused(
    opening: Opener, google: GsModel, azure: AzModel
) -> None:
    for store, shelf in (
        (await opening.gs(google.origin), google.shelf),
        (await opening.az(azure.endpoint), azure.shelf),
    ):
        await prove(store)
        shelf.is_liar = True
        with pytest.raises(RemoteRefused, match="of 8 that created one object at once it told 8"):
            await prove(store)
        assert shelf.page("", "") == ([], ""), "the proof leaves nothing behind"


async def test_both_words_of_azure_for_there_is_one_already(opening: Opener, azure: AzModel) -> None:
    store = await opening.az(azure.endpoint)
    assert await store.create("epoch/1", [b"first"])
    for azure.refuses_with in ((409, "BlobAlreadyExists"), (412, "ConditionNotMet")):
        assert not await store.create("epoch/1", [b"second"])
    assert await store.read("epoch/1", 100) == b"first"


@pytest.mark.parametrize("code", ["ContainerBeingDeleted", "OperationTimedOut", "", "BlobAlreadyExistsNot"])
async def test_another_conflict_is_no_answer_to_a_creation(
    opening: Opener, azure: AzModel, code: str
) -> None:
    store = await opening.az(azure.endpoint)
    azure.trouble = (409, code)
    with pytest.raises(RemoteUnavailable, match=f"409.*{code}"):
        await store.create("epoch/1", [b"x"])


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (408, RemoteUnavailable),
        (409, RemoteUnavailable),
        (429, RemoteUnavailable),
        (500, RemoteUnavailable),
        (503, RemoteUnavailable),
        (301, RemoteRefused),
        (400, RemoteRefused),
        (403, RemoteRefused),
        (404, RemoteRefused),
        (204, RemoteRefused),
    ],
)
async def test_what_a_status_means_to_a_creation(
    opening: Opener, status: int, error: type[Exception]
) -> None:
    with Server(lambda asked: Answered(status, headers={"Location": "http://127.0.0.1:9/"})) as server:
        for store in (await opening.gs(server.origin), await opening.az(server.origin)):
            with pytest.raises(error, match=f"epoch/1.*{status}"):
                await store.create("epoch/1", [b"x"])


async def test_a_bucket_that_is_not_there_is_no_missing_object(
    opening: Opener, google: GsModel, azure: AzModel
) -> None:
    gs = await opening.gs(google.origin, url="gs://no-such-bucket/x")
    az = await opening.az(azure.endpoint, url=f"az://{model_az.ACCOUNT}/no-such/x")
    for store, code in ((gs, "NoSuchBucket"), (az, "ContainerNotFound")):
        with pytest.raises(RemoteRefused, match=f"404 {code}"):
            await store.read("volume.json", 10)
        with pytest.raises(RemoteRefused, match=f"404 {code}"):
            await store.delete("volume.json")


async def test_a_404_of_somebody_else_is_no_missing_blob(opening: Opener) -> None:
    with Server(lambda asked: Answered(404, b"<html>no such page</html>")) as server:
        store = await opening.az(server.origin)
        with pytest.raises(RemoteRefused, match="404"):
            await store.read("volume.json", 10)


async def test_refused_tokens_are_renewed_once(opening: Opener, google: GsModel, azure: AzModel) -> None:
    assert await (await opening.gs(google.origin, "stale", model_gs.TOKEN)).create("a", [b"x"])
    az = await opening.az(azure.endpoint, Token("stale"), Token(model_az.TOKEN))
    assert await az.create("a", [b"x"])
    with pytest.raises(RemoteRefused, match="401 AuthenticationRequired"):
        await (await opening.gs(google.origin, "stale", "staler", model_gs.TOKEN)).read("a", 10)


async def test_a_sas_token_serves_until_it_ends(opening: Opener, azure: AzModel) -> None:
    store = await opening.az(azure.endpoint, Sas.of_text("?" + azure.sas()))
    assert await store.create("epoch/1", [b"x"])
    assert [each.name for each in await store.names("epoch")] == ["epoch/1"]
    with pytest.raises(RemoteRefused, match="403 AuthenticationFailed"):
        await (await opening.az(azure.endpoint, Sas.of_text(azure.sas(seconds=-5)))).read("epoch/1", 10)


async def test_a_listing_of_azure_is_cut_by_us_and_dated_by_birth(opening: Opener, azure: AzModel) -> None:
    store = await opening.az(azure.endpoint)
    for number in range(ENTRIES):
        azure.shelf.put(f"volumes/one/data/{number:03}", b"x", only_new=True)
    azure.shelf.put("volumes/one/data0", b"x", only_new=True)
    found = await store.names("data", f"data/{ENTRIES - 2}")
    assert [each.name for each in found] == [f"data/{ENTRIES - 1}"]
    assert abs(found[0].created_unix_s - store.clock_unix_s) < 60, "not its last change"


def az_page(marker: str, name: str = "") -> bytes:
    blob = (
        f"<Blob><Name>{name}</Name><Properties><Content-Length>1</Content-Length>"
        "<Creation-Time>Thu, 26 Nov 2026 09:00:00 GMT</Creation-Time></Properties></Blob>"
    )
    return (
        f"<EnumerationResults><Blobs>{blob if name else ''}</Blobs><NextMarker>{marker}</NextMarker>"
        "</EnumerationResults>"
    ).encode()


def gs_page(token: str, key: str) -> bytes:
    return (
        "<ListBucketResult><IsTruncated>true</IsTruncated>"
        f"<NextContinuationToken>{token}</NextContinuationToken><Contents><Key>{key}</Key><Size>1</Size>"
        "<LastModified>2026-11-26T09:00:00Z</LastModified></Contents></ListBucketResult>"
    ).encode()


async def test_listings_that_never_end_do(opening: Opener) -> None:
    """Whatever the server: always the same page, empty ones for ever, the same names under new markers."""
    count = iter(range(10**6))
    name = "volumes/one/data/1"
    for of_az, page in (
        (True, lambda: az_page("same")),
        (True, lambda: az_page(f"m{next(count)}")),
        (True, lambda: az_page(f"m{next(count)}", name)),
        (False, lambda: gs_page("same", name)),
        (False, lambda: gs_page(f"t{next(count)}", name)),
    ):
        with Server(lambda asked, page=page: Answered(200, page())) as server:  # type: ignore[misc]
            store: Store = await (opening.az if of_az else opening.gs)(server.origin)
            with pytest.raises(RemoteMismatch, match="does not get on"):
                await store.names("data")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html></html>",
        b"<!DOCTYPE x [<!ENTITY a 'a'>]><EnumerationResults/>",
        az_page("", "x").replace(b">1<", b">much<"),
        az_page("", "x").replace(b"26 Nov", b"99 Nov"),
    ],
)
async def test_what_is_no_listing(opening: Opener, body: bytes) -> None:
    with Server(lambda asked: Answered(200, body)) as server:
        store = await opening.az(server.origin)
        with pytest.raises(RemoteMismatch, match="no listing"):
            await store.names("data")


async def test_what_is_secret_is_in_no_message_and_no_log(
    opening: Opener, google: GsModel, azure: AzModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong_key, token = "bm90IHRoZSBrZXk=", "a-token-that-is-secret"
    sas = azure.sas(key=wrong_key)
    signature = sas.partition("sig=")[2]
    stores: list[Store] = [
        await opening.gs(google.origin, token),
        await opening.gs("http://127.0.0.1:9", token),
    ]
    for credentials in (account_key(wrong_key), Sas.of_text(sas), Token(token)):
        stores += [await opening.az(at, credentials) for at in (azure.endpoint, "http://127.0.0.1:9")]
        seen = [repr(credentials), repr(Lease(credentials)), repr(FixedWallet(credentials))]
        assert not any(secret in "".join(seen) for secret in ("not the key", token, signature))
    said = []
    for store in stores:
        for call in (store.read("a", 10), store.create("a", [b"x"]), store.names("a")):
            with pytest.raises((RemoteRefused, RemoteUnavailable)) as failed:
                await call
            said.append(f"{failed.value} {failed.value.hint} {failed.value!r} {store!r} {vars(store)!r}")
    everything = "\n".join([*said, caplog.text])
    assert "403 AuthenticationFailed" in everything
    assert "no connection" in everything
    for secret in ("not the key", wrong_key, token, signature, "SharedKey "):
        assert secret not in everything


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("gs://", None),
        ("gs://bucket/x?y", None),
        ("s3://bucket/x", None),
        ("gs://bucket/x", "ftp://h"),
        ("gs://bucket/x", "http://h/path"),
        ("az://", None),
        ("az://account", None),
        ("az://account/", None),
        ("az://evil.example/container", None),
        ("az://account/Container", None),
        ("az://account/container/x?sig=s3cr3t", None),
        ("az://s3cr3t@account/container", None),
        ("az://account/container", "http://s3cr3t@h"),
        ("az://account/container", "http://h/account?sig=s3cr3t"),
    ],
)
async def test_addresses_that_are_none(url: str, endpoint: str | None) -> None:
    session = await new_session(remote_settings())

    def make() -> Store:
        if url.startswith("az"):
            return AzStore(url, AzSettings(endpoint), FixedWallet[AzCredentials](Token("t")), session)
        return GsStore(url, GsSettings(endpoint or "https://h"), FixedWallet(Token("t")), session)

    with pytest.raises(ConfigError) as refused:
        make()
    assert "s3cr3t" not in f"{refused.value} {refused.value.hint}"
    await session.close()
