"""Which store an address opens, with which settings, and what that costs at start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.conftest import ROOT
from tierblk.config import RemoteSettings, StoreSettings
from tierblk.errors import ConfigError, RemoteRefused
from tierblk.remote import client
from tierblk.remote.az import AzStore
from tierblk.remote.bucket import BucketStore
from tierblk.remote.directory import DirectoryStore
from tierblk.remote.gs import GsStore
from tierblk.remote.s3 import S3Store
from tierblk.remote.stores import open_store

REMOTE = RemoteSettings()
PROGRAM = """
import asyncio, sys
from tierblk.config import RemoteSettings, StoreSettings
from tierblk.remote.stores import open_store
store = asyncio.run(open_store("file:///v", StoreSettings(), RemoteSettings()))
print(type(store).__name__, sorted({"aiohttp", "botocore", "google.auth"} & sys.modules.keys()))
"""


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "KEY", "SAS_TOKEN"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)


async def place(url: str, **settings: object) -> tuple[type, str]:
    """(what was opened, where it would ask for its keys)."""
    store = await open_store(url, StoreSettings.model_validate(settings), REMOTE)
    await store.aclose()
    assert isinstance(store, BucketStore)
    assert store.shown == url
    where = store._place
    return type(store), f"{where.origin}{where.path}"


@pytest.mark.parametrize(
    ("url", "settings", "kind", "where"),
    [
        ("s3://b/p", {}, S3Store, "https://b.s3.us-east-1.amazonaws.com"),
        ("s3://b/p", {"region": "eu"}, S3Store, "https://b.s3.eu.amazonaws.com"),
        ("s3://b/p", {"addressing": "path"}, S3Store, "https://s3.us-east-1.amazonaws.com/b"),
        ("s3://b/p", {"endpoint": "http://h:1"}, S3Store, "http://h:1/b"),
        ("s3://b/p", {"endpoint": "http://h:1", "addressing": "virtual"}, S3Store, "http://b.h:1"),
        ("gs://b/p", {}, GsStore, "https://storage.googleapis.com/b"),
        ("gs://b/p", {"endpoint": "http://h:1"}, GsStore, "http://h:1/b"),
        ("az://acc/con/p", {}, AzStore, "https://acc.blob.core.windows.net/con"),
        ("az://acc/con/p", {"endpoint": "http://h:1/acc"}, AzStore, "http://h:1/acc/con"),
    ],
)
async def test_where_a_store_is(url: str, settings: dict[str, object], kind: type, where: str) -> None:
    assert await place(url, **settings) == (kind, where)


async def test_an_endpoint_of_the_config_goes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "AccountName=acc;AccountKey=a2V5;BlobEndpoint=http://env:1/acc"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    assert (await place("az://acc/con/p"))[1] == "http://env:1/acc/con"
    assert (await place("az://acc/con/p", endpoint="http://h:1/acc"))[1] == "http://h:1/acc/con"


async def test_the_profile_is_asked_for_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = x\n"
        "[other]\naws_access_key_id = two\naws_secret_access_key = x\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for profile, key in ((None, "one"), ("other", "two")):
        settings = StoreSettings.model_validate({"profile": profile} if profile else {})
        store = await open_store("s3://b/p", settings, REMOTE)
        assert isinstance(store, S3Store)
        assert (await store._wallet.current()).access_key == key
        await store.aclose()


def test_a_folder_needs_no_http() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert run.stdout == f"{DirectoryStore.__name__} []\n"


async def test_what_cannot_be_opened_leaves_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[aiohttp.ClientSession] = []
    new_session = client.new_session

    async def noted(settings: RemoteSettings) -> aiohttp.ClientSession:
        opened.append(await new_session(settings))
        return opened[-1]

    monkeypatch.setattr(client, "new_session", noted)
    for url in ("s3://key@b/p", "gs://b/p?q", "az://acc"):
        with pytest.raises(ConfigError, match="no address of a store"):
            await open_store(url, StoreSettings(), REMOTE)
    assert opened
    assert all(session.closed for session in opened)
    with pytest.raises(RemoteRefused, match=r"'http://h/x\?…' is no address of a store"):
        await open_store("http://h/x?signature", StoreSettings(), REMOTE)
