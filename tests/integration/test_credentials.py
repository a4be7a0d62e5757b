"""The credential chain: each of its sources, or a small server of ours in its place; and renewal."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integration.seaweed import CREDENTIALS, SeaweedServer
from tests.integration.servers import remote_settings
from tierblk.errors import RemoteRefused, RemoteUnavailable
from tierblk.remote.client import new_session
from tierblk.remote.credentials import ChainWallet, from_chain
from tierblk.remote.s3 import S3Store
from tierblk.remote.sigv4 import Credentials
from tierblk.remote.wallet import Lease

HOUR_S = 3600.0
Answers = Callable[[str, str, dict[str, str]], tuple[int, str]]


@pytest.fixture
def no_chain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing of this machine's: the chain ends empty, without a look for instance metadata."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, file in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        monkeypatch.setenv(name, str(tmp_path / file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


@pytest.fixture
def answering() -> Iterator[Callable[[Answers], str]]:
    """Starts a server whose answers a function gives: (method, path, headers) -> (status, body)."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                status, body = answers(
                    self.command, self.path, {k.lower(): v for k, v in self.headers.items()}
                )
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = do_POST = _answer  # noqa: N815  # names of http.server

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def until(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def holds_an_hour(lease: Lease[Credentials]) -> bool:
    assert lease.until_unix_s is not None
    return abs(lease.until_unix_s - datetime.now(UTC).timestamp() - HOUR_S) < 60


def test_the_environment(no_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    assert from_chain(None) == Lease(Credentials("AK", "SK"))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    assert from_chain(None) == Lease(Credentials("AK", "SK", "T"))


def test_a_shared_profile(no_chain: Path) -> None:
    (no_chain / "credentials").write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = S\n"
        "[other]\naws_access_key_id = B\naws_secret_access_key = T\n"
    )
    assert from_chain(None) == Lease(Credentials("A", "S"))
    assert from_chain("other") == Lease(Credentials("B", "T"))
    with pytest.raises(RemoteRefused, match="missing"):
        from_chain("missing")


def test_a_process(no_chain: Path) -> None:
    program = no_chain / "program"
    said = {"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "S", "SessionToken": "T"}
    program.write_text(f"#!/bin/sh\necho '{json.dumps({**said, 'Expiration': until(HOUR_S)})}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (no_chain / "config").write_text(f"[default]\ncredential_process = {program}\n")
    lease = from_chain(None)
    assert lease.credentials == Credentials("A", "S", "T")
    assert holds_an_hour(lease)
    program.write_text("#!/bin/sh\necho 'the password is hunter2' >&2\nexit 1\n")
    with pytest.raises(RemoteUnavailable, match="CredentialRetrievalError, from custom-process") as failed:
        from_chain(None)
    assert "hunter2" not in str(failed.value)


def test_a_container(
    no_chain: Path, monkeypatch: pytest.MonkeyPatch, answering: Callable[[Answers], str]
) -> None:
    def answers(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path, headers.get("authorization")) != ("GET", "/creds", "Bearer x"):
            return 403, "{}"
        return 200, json.dumps(
            {"AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T", "Expiration": until(HOUR_S)}
        )

    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{answering(answers)}/creds")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "Bearer x")
    lease = from_chain(None)
    assert lease.credentials == Credentials("A", "S", "T")
    assert holds_an_hour(lease)


def test_instance_metadata_of_version_2(
    no_chain: Path, monkeypatch: pytest.MonkeyPatch, answering: Callable[[Answers], str]
) -> None:
    """A model server: it gives nothing without the token that a PUT brings, as IMDSv2 does."""
    role = "/latest/meta-data/iam/security-credentials/"
    asked: list[str] = []

    def answers(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        asked.append(f"{method} {path}")
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, "the-token"
        if headers.get("x-aws-ec2-metadata-token") != "the-token":
            return 401, ""
        if path == role:
            return 200, "the-role"
        said = {"Code": "Success", "AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T"}
        return 200, json.dumps({**said, "Expiration": until(HOUR_S), "LastUpdated": until(0)})

    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", answering(answers))
    lease = from_chain(None)
    assert lease.credentials == Credentials("A", "S", "T")
    assert holds_an_hour(lease)
    assert asked[0] == "PUT /latest/api/token"


def test_web_identity(
    no_chain: Path, monkeypatch: pytest.MonkeyPatch, answering: Callable[[Answers], str]
) -> None:
    """A model of the token service: what a pod of a cluster gets for its signed identity."""

    def answers(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        return 200, (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>A</AccessKeyId>"
            "<SecretAccessKey>S</SecretAccessKey><SessionToken>T</SessionToken>"
            f"<Expiration>{until(HOUR_S)}</Expiration></Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )

    (no_chain / "identity").write_text("a signed identity")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(no_chain / "identity"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/tierblk")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", answering(answers))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    lease = from_chain(None)
    assert lease.credentials == Credentials("A", "S", "T")
    assert holds_an_hour(lease)


def test_none_at_all(no_chain: Path) -> None:
    with pytest.raises(RemoteRefused, match="there are no credentials for S3"):
        from_chain(None)


class Mint:
    """Makes credentials that hold for life_s, by a clock that a test moves; or fails while it is told to."""

    def __init__(self, life_s: float) -> None:
        self.life_s = life_s
        self.now_unix_s = 1000.0
        self.made = 0
        self.fails = False

    def clock(self) -> float:
        return self.now_unix_s

    def fetch(self, profile: str | None) -> Lease[Credentials]:
        if self.fails:
            raise RemoteUnavailable("the mint is closed")
        self.made += 1
        return Lease(Credentials(f"key {self.made}", "s"), self.now_unix_s + self.life_s)

    def wallet(self) -> ChainWallet:
        return ChainWallet(fetch=self.fetch, clock=self.clock)


async def settled(wallet: ChainWallet) -> Credentials:
    """After a renewal that nobody waited for."""
    await wallet.current()
    if wallet._renewal is not None:
        await asyncio.wait([wallet._renewal])
    await asyncio.sleep(0)  # what the renewal's end calls
    return await wallet.current()


async def test_an_hour_of_credentials_that_live_a_minute_without_one_that_has_expired() -> None:
    mint = Mint(60)
    wallet = mint.wallet()
    given: dict[str, float] = {}
    for _ in range(3600):
        found = await settled(wallet)
        born_s = given.setdefault(found.access_key, mint.now_unix_s)
        assert mint.now_unix_s < born_s + 60, "expired ones were given away"
        mint.now_unix_s += 1
    assert 60 <= mint.made <= 100


async def test_one_renewal_serves_all_who_come_at_once() -> None:
    mint = Mint(1000)
    wallet = mint.wallet()
    found = await asyncio.gather(*(wallet.current() for _ in range(50)))
    assert {each.access_key for each in found} == {"key 1"}
    renewed = await asyncio.gather(*(wallet.renewed(found[0]) for _ in range(50)))
    assert {each and each.access_key for each in renewed} == {"key 2"}
    assert mint.made == 2


async def test_the_old_ones_serve_while_the_renewal_fails_and_no_longer() -> None:
    mint = Mint(100)
    wallet = mint.wallet()
    await wallet.current()
    mint.fails = True
    mint.now_unix_s += 90
    assert (await settled(wallet)).access_key == "key 1"
    mint.now_unix_s += 20
    with pytest.raises(RemoteUnavailable, match="the mint is closed"):
        await wallet.current()
    mint.fails = False
    assert (await wallet.current()).access_key == "key 2"


async def test_refused_ones_of_which_the_chain_has_no_others() -> None:
    wallet = ChainWallet(fetch=lambda profile: Lease(Credentials("k", "s")))
    found = await wallet.current()
    assert await wallet.renewed(found) is None


async def test_who_gives_up_waiting_does_not_end_the_renewal() -> None:
    mint, may_go = Mint(1000), threading.Event()

    def slow(profile: str | None) -> Lease[Credentials]:
        assert may_go.wait(10)
        return mint.fetch(profile)

    wallet = ChainWallet(fetch=slow, clock=mint.clock)
    waiting = [asyncio.create_task(wallet.current()) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    may_go.set()
    assert (await waiting[1]).access_key == "key 1"


async def test_a_real_server_gets_requests_with_what_a_process_renews(
    no_chain: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They hold for 2 s; the server takes them for good, so what is seen is that a client asks in time."""
    program, calls = no_chain / "program", no_chain / "calls"
    said = {
        "Version": 1,
        "AccessKeyId": CREDENTIALS.access_key,
        "SecretAccessKey": CREDENTIALS.secret_key,
        "Expiration": "END",
    }
    (no_chain / "said").write_text(json.dumps(said))
    program.write_text(
        f"#!/bin/sh\necho x >> {calls}\n"
        f"sed \"s/END/$(date -u -d '+2 seconds' +%Y-%m-%dT%H:%M:%SZ)/\" {no_chain}/said\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (no_chain / "config").write_text(f"[default]\ncredential_process = {program}\n")
    with SeaweedServer(tmp_path_factory.mktemp("seaweed")) as server:
        store = S3Store(
            server.url("renewed"), server.settings, ChainWallet(), await new_session(remote_settings())
        )
        count = 0
        async with asyncio.timeout(40):
            while not calls.exists() or len(calls.read_text().split()) < 4:
                assert await store.create(f"data/{count}", [b"x"])
                count += 1
        await store.aclose()
