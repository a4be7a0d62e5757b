"""What every store promises (remote/store.py), asked of each: a folder, an S3 server, and models of Google's
and Azure's."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.integration import model_az, model_gs
from tests.integration.model_az import AzModel
from tests.integration.model_gs import GsModel
from tests.integration.models import Answered, Server
from tests.integration.seaweed import CREDENTIALS, SeaweedServer
from tests.integration.servers import remote_settings
from tierblk.config import StoreSettings
from tierblk.errors import ConfigError, RemoteRefused, RemoteUnavailable
from tierblk.remote import s3
from tierblk.remote.az import AzSettings, AzStore
from tierblk.remote.client import new_session
from tierblk.remote.directory import DirectoryStore
from tierblk.remote.gs import GsSettings, GsStore
from tierblk.remote.s3 import S3Settings, S3Store
from tierblk.remote.sharedkey import SharedKey
from tierblk.remote.sigv4 import Credentials
from tierblk.remote.store import Bytes, Found, Store, prove
from tierblk.remote.stores import open_store as open_any
from tierblk.remote.wallet import FixedWallet, Token

MIB = 1 << 20
OpenStore = Callable[[str], Awaitable[Store]]


class Purse:
    """Credentials as given, one after the other."""

    def __init__(self, *credentials: Credentials) -> None:
        self._left = list(credentials)
        self.renewals = 0

    async def current(self) -> Credentials:
        return self._left[0]

    async def renewed(self, refused: Credentials) -> Credentials | None:
        self.renewals += 1
        if len(self._left) > 1 and self._left[0] == refused:
            self._left.pop(0)
        return self._left[0]


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


async def s3_store(server: SeaweedServer, prefix: str, *credentials: Credentials) -> S3Store:
    session = await new_session(remote_settings())
    return S3Store(server.url(prefix), server.settings, Purse(*(credentials or [CREDENTIALS])), session)


@pytest.fixture(scope="module")
def google() -> Iterator[GsModel]:
    with GsModel() as server:
        yield server


@pytest.fixture(scope="module")
def azure() -> Iterator[AzModel]:
    with AzModel() as server:
        yield server


@pytest.fixture(params=["folder", "s3", "gs", "az"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenStore]:
    opened: list[Store] = []
    unique = os.urandom(8).hex()

    async def of_folder(prefix: str) -> Store:
        return DirectoryStore(f"file://{tmp_path}/{prefix}")

    async def of_s3(prefix: str) -> Store:
        return await s3_store(request.getfixturevalue("seaweed"), f"{unique}/{prefix}")

    async def of_gs(prefix: str) -> Store:
        server: GsModel = request.getfixturevalue("google")
        return GsStore(
            f"gs://{model_gs.BUCKET}/{unique}/{prefix}",
            GsSettings(server.origin),
            FixedWallet(Token(model_gs.TOKEN)),
            await new_session(remote_settings()),
        )

    async def of_az(prefix: str) -> Store:
        server: AzModel = request.getfixturevalue("azure")
        return AzStore(
            f"az://{model_az.ACCOUNT}/{model_az.CONTAINER}/{unique}/{prefix}",
            AzSettings(server.endpoint),
            FixedWallet(SharedKey.of_text(model_az.ACCOUNT, model_az.KEY)),
            await new_session(remote_settings()),
        )

    async def open_one(prefix: str) -> Store:
        opened.append(
            await {"folder": of_folder, "s3": of_s3, "gs": of_gs, "az": of_az}[request.param](prefix)
        )
        return opened[-1]

    yield open_one
    for store in opened:
        await store.aclose()


async def test_what_was_created_is_there_and_is_never_replaced(open_store: OpenStore) -> None:
    store = await open_store("volumes/one")
    assert await store.read("volume.json", 100) is None
    assert await store.create("volume.json", [b"first"])
    assert not await store.create("volume.json", [b"second"])
    assert await store.read("volume.json", 100) == b"first"
    assert await store.create("data/0.a.0", [b"", b"some", memoryview(b" more"), bytearray(b" and more")])
    assert await store.read("data/0.a.0", 100) == b"some more and more"
    assert await store.create("empty", [])
    assert await store.read("empty", 100) == b""


async def test_one_of_many_that_create_at_once_is_told_that_it_did(open_store: OpenStore) -> None:
    stores = [await open_store("shared"), await open_store("shared")]
    for round_ in range(3):
        bodies = [os.urandom(100) for _ in range(8)]
        name = f"epoch/{round_:016x}"
        made = await asyncio.gather(
            *(stores[number % 2].create(name, [body]) for number, body in enumerate(bodies))
        )
        assert made.count(True) == 1
        assert await stores[0].read(name, 1000) == bodies[made.index(True)]
    await prove(stores[0])
    assert await stores[0].names("proof") == []


async def test_large_objects_and_their_ranges(open_store: OpenStore) -> None:
    store = await open_store("large")
    pieces = [os.urandom(MIB + 1) for _ in range(5)]
    whole = b"".join(pieces)
    assert await store.create("data/1", pieces)
    assert await store.read("data/1", 8 * MIB) == whole
    for offset, length in ((0, 1), (12345, 4096), (len(whole) - 7, 7), (1, len(whole) - 1)):
        target = bytearray(length)
        await store.read_into("data/1", offset, memoryview(target))
        assert target == whole[offset : offset + length]


async def test_what_is_not_there_or_too_short_or_too_large_is_an_error(open_store: OpenStore) -> None:
    store = await open_store("short")
    await store.create("data/1", [b"0123456789"])
    for name, offset in (("data/1", 5), ("data/1", 50), ("data/2", 0)):
        with pytest.raises(RemoteRefused, match=name):
            await store.read_into(name, offset, memoryview(bytearray(8)))
    with pytest.raises(RemoteRefused, match="more than 9 bytes"):
        await store.read("data/1", 9)


async def test_listings_are_in_order_and_of_that_folder_only(open_store: OpenStore) -> None:
    before = await open_store("list")
    for name in ("epoch/2", "epoch/10", "epoch/1", "epochs/7", "checkpoint/1"):
        await before.create(name, [name.encode()])
    found = await before.names("epoch")
    assert [each.name for each in found] == ["epoch/1", "epoch/10", "epoch/2"]
    assert [each.size_bytes for each in found] == [7, 8, 7]
    assert all(abs(each.created_unix_s - before.clock_unix_s) < 60 for each in found)
    assert [each.name for each in await before.names("epoch", "epoch/1")] == ["epoch/10", "epoch/2"]
    assert await before.names("snapshot") == []


async def test_a_listing_of_more_than_a_page(open_store: OpenStore) -> None:
    store = await open_store("pages")
    names = [f"data/{number:04x}" for number in range(1100)]

    async def make(some: list[str]) -> None:
        for name in some:
            await store.create(name, [b"x"])

    await asyncio.gather(*(make(names[start::8]) for start in range(8)))
    assert [each.name for each in await store.names("data")] == names


async def test_what_was_deleted_is_gone_and_may_be_deleted_again(open_store: OpenStore) -> None:
    store = await open_store("deleted")
    await store.create("data/1", [b"x"])
    await store.delete("data/1")
    await store.delete("data/1")
    assert await store.read("data/1", 10) is None
    assert await store.names("data") == []


async def test_names_that_lead_elsewhere_are_refused(open_store: OpenStore) -> None:
    store = await open_store("inside")
    for name in (
        "",
        "../x",
        "a/../b",
        "/etc/passwd",
        "a//b",
        ".hidden",
        "a/.b",
        "A",
        "a b",
        "a/b/c/d/e",
        "ü",
    ):
        with pytest.raises(ValueError, match="no name"):
            await store.create(name, [b"x"])
        with pytest.raises(ValueError, match="no name"):
            await store.read(name, 10)
    with pytest.raises(ValueError, match="no name"):
        await store.names("..")


async def test_a_closed_store_refuses(open_store: OpenStore) -> None:
    store = await open_store("closed")
    await store.aclose()
    with pytest.raises(RemoteRefused):
        await store.read("volume.json", 10)


class Overwriter:
    """A store that answers success to everyone, as several servers do."""

    shown = "s3://a/liar"
    clock_unix_s = 0.0

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    async def create(self, name: str, pieces: list[bytes]) -> bool:
        await asyncio.sleep(0)
        self.kept[name] = b"".join(pieces)
        return True

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        return self.kept.get(name)

    async def delete(self, name: str) -> None:
        del self.kept[name]

    async def names(self, folder: str, after: str = "") -> list[Found]:
        return []

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        raise AssertionError

    async def aclose(self) -> None:
        pass


async def test_a_store_that_lets_all_of_them_win_is_refused_with_the_reason() -> None:
    store = Overwriter()
    with pytest.raises(RemoteRefused, match="of 8 that created one object at once it told 8"):
        await prove(store)  # type: ignore[arg-type]  # pieces: a list is enough for it
    assert store.kept == {}, "the proof leaves nothing behind"


async def test_wrong_credentials_are_renewed_once_and_then_refused(seaweed: SeaweedServer) -> None:
    wrong = Credentials(CREDENTIALS.access_key, "not the secret")
    store = await s3_store(seaweed, "renewed", wrong, CREDENTIALS)
    assert await store.create("volume.json", [b"x"])
    await store.aclose()
    store = await s3_store(seaweed, "renewed", wrong)
    with pytest.raises(RemoteRefused, match=r"403 SignatureDoesNotMatch") as refused:
        await store.read("volume.json", 10)
    assert wrong.secret_key not in f"{refused.value} {refused.value.hint} {wrong!r}"
    await store.aclose()


async def test_opened_by_its_address_with_credentials_of_the_environment(
    seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CREDENTIALS.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS.secret_key)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    settings = StoreSettings.model_validate({"endpoint": seaweed.settings.endpoint})
    store = await open_any(seaweed.url("opened"), settings, remote_settings())
    assert await store.create("volume.json", [b"x"])
    assert await store.read("volume.json", 10) == b"x"
    await store.aclose()


async def test_a_bucket_that_is_not_there_is_no_missing_object(seaweed: SeaweedServer) -> None:
    session = await new_session(remote_settings())
    store = S3Store("s3://no-such-bucket/x", seaweed.settings, Purse(CREDENTIALS), session)
    with pytest.raises(RemoteRefused, match="404 NoSuchBucket"):
        await store.read("volume.json", 10)
    await store.aclose()


async def test_a_large_body_is_hashed_off_the_loop(
    seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 MiB take 10 ms and more, in which no hit would be served."""
    hashed: list[tuple[int, bool]] = []
    sha256 = s3._sha256

    def watched(pieces: Sequence[Bytes]) -> str:
        hashed.append((sum(map(len, pieces)), threading.current_thread() is threading.main_thread()))
        return sha256(pieces)

    monkeypatch.setattr(s3, "_sha256", watched)
    store = await s3_store(seaweed, "hashed")
    assert await store.create("data/1", [bytes(100)])
    assert await store.create("data/2", [bytes(8 * MIB), bytes(8 * MIB)])
    assert hashed == [(100, True), (16 * MIB, False)]
    await store.aclose()


async def test_how_long_a_server_asks_to_be_left_alone() -> None:
    with Server(lambda asked: Answered(503, headers={"Retry-After": "7"})) as server:
        session = await new_session(remote_settings())
        store = S3Store("s3://bucket/x", S3Settings(endpoint=server.origin), Purse(CREDENTIALS), session)
        with pytest.raises(RemoteUnavailable) as busy:
            await store.create("data/1", [b"x"])
        assert busy.value.retry_after_s == 7
        await store.aclose()


async def test_a_server_that_is_away_is_unavailable(seaweed: SeaweedServer) -> None:
    session = await new_session(remote_settings())
    settings = type(seaweed.settings)(endpoint="http://127.0.0.1:9")
    store = S3Store("s3://bucket/x", settings, Purse(CREDENTIALS), session)
    with pytest.raises(RemoteUnavailable, match="no connection"):
        await store.create("volume.json", [b"x"])
    await store.aclose()


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://key@bucket/x", "s3://bucket/x?y", "gs://bucket/x"])
async def test_addresses_that_are_none(url: str, seaweed: SeaweedServer) -> None:
    session = await new_session(remote_settings())
    with pytest.raises(ConfigError):
        S3Store(url, seaweed.settings, Purse(CREDENTIALS), session)
    await session.close()
