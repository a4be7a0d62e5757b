"""Write-back with credentials that live for a minute, for an hour by a clock that the test moves: a guard
before the server knows which of them hold, and checks each signature."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import Host, config_of
from tests.integration.models import Asked
from tests.integration.relay import Relay
from tests.integration.seaweed import CREDENTIALS, SeaweedServer
from tierblk import claim
from tierblk.config import RemoteSettings
from tierblk.core import PAGE_BYTES
from tierblk.remote.client import new_session
from tierblk.remote.credentials import ChainWallet
from tierblk.remote.s3 import S3Settings, S3Store
from tierblk.remote.sigv4 import Credentials, encoded_query, signed_headers
from tierblk.remote.wallet import Lease
from tierblk.units import MIB

LIFE_S = 60.0
STEP_S = 6.0
HOUR_S = 3600.0
REGION = "us-east-1"


class Guard:
    """Gives out credentials that hold for LIFE_S by a clock of its own, and lets only those pass."""

    def __init__(self) -> None:
        self.now_unix_s = 1_800_000_000.0
        self.leases: dict[str, Lease[Credentials]] = {}
        self.refused: list[str] = []

    def clock(self) -> float:
        return self.now_unix_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.now_unix_s, UTC)

    def lend(self, profile: str | None) -> Lease[Credentials]:
        name = f"KEY{len(self.leases)}"
        credentials = Credentials(name, f"secret of {name}", f"token of {name}")
        self.leases[name] = Lease(credentials, self.now_unix_s + LIFE_S)
        return self.leases[name]

    def look(self, asked: Asked) -> Mapping[str, str] | int:
        """See Relay.look."""
        why = self._fault(asked)
        if why is not None:
            self.refused.append(f"{asked.method} {asked.path}: {why}")
            return 403
        return self._signed(asked, CREDENTIALS, datetime.now(UTC))

    def _fault(self, asked: Asked) -> str | None:
        name = asked.headers["authorization"].partition("Credential=")[2].partition("/")[0]
        lease = self.leases.get(name)
        if lease is None or lease.until_unix_s is None:
            return f"{name} was never lent"
        if self.now_unix_s >= lease.until_unix_s:
            return f"{name} has expired"
        said = datetime.strptime(asked.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(said - self.now()) > timedelta(minutes=15):
            return f"it is of {said}"
        right = self._signed(asked, lease.credentials, said)
        for header in ("authorization", "x-amz-security-token"):
            if asked.headers.get(header) != right[header]:
                return f"its {header} is wrong"
        return None

    def _signed(self, asked: Asked, credentials: Credentials, now: datetime) -> dict[str, str]:
        own = ("if-none-match", "range")
        kept = {str(name): asked.headers[name] for name in own if name in asked.headers}
        return signed_headers(
            asked.method,
            asked.headers["host"],
            asked.raw_path,
            encoded_query(asked.query),
            kept,
            asked.headers["x-amz-content-sha256"],
            credentials,
            REGION,
            now,
        )


@pytest.mark.timeout(240)
async def test_an_hour_of_epochs_with_credentials_of_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, chance, content = Guard(), random.Random(1), bytearray(8 * MIB)
    (tmp_path / "weed").mkdir()
    with SeaweedServer(tmp_path / "weed" / "home") as server, run_directory(tmp_path) as run:
        async with Relay(server.port) as relay:
            relay.look = guard.look

            async def open_store(url: str, _: object, remote: RemoteSettings) -> Any:
                wallet = ChainWallet(fetch=guard.lend, clock=guard.clock)
                settings = S3Settings(endpoint=relay.endpoint)
                return S3Store(url, settings, wallet, await new_session(remote), now=guard.now)

            monkeypatch.setattr(claim, "open_store", open_store)
            host = await Host.start(config_of(tmp_path, server.url("hour")), run)
            try:
                await host.attach()
                head = host.far.extents.head.epoch
                for _ in range(int(HOUR_S / STEP_S)):
                    guard.now_unix_s += STEP_S
                    at = chance.randrange(len(content) // PAGE_BYTES) * PAGE_BYTES
                    content[at : at + PAGE_BYTES] = chance.randbytes(PAGE_BYTES)
                    await host.write(at, bytes(content[at : at + PAGE_BYTES]))
                    await host.sync()
                    if not chance.randrange(20):  # what is read is paid for as well
                        await host.evict()
                        assert await host.read(at, PAGE_BYTES) == content[at : at + PAGE_BYTES]
                assert host.far.extents.head.epoch == head + int(HOUR_S / STEP_S)
                assert await host.content() == content
                assert await host.detach() is None
            finally:
                await host.kill()
            assert guard.refused == []
            assert HOUR_S / LIFE_S <= len(guard.leases) <= 2 * HOUR_S / LIFE_S
            assert {status for status in relay.answered if status >= 400} <= {404, 412}, relay.answered
            # The guard does refuse: what has expired, and what was changed on its way.
            guard.now_unix_s += 2 * LIFE_S
            old = guard.leases["KEY1"].credentials
            asked = Asked("GET", "/b/k", [], {"host": "h", "x-amz-content-sha256": "x"}, b"")
            headers = guard._signed(asked, old, guard.now()) | {"x-amz-content-sha256": "x"}
            assert guard.look(Asked("GET", "/b/k", [], headers, b"")) == 403
            fresh = guard.lend(None).credentials
            headers = guard._signed(asked, fresh, guard.now())
            assert guard.look(Asked("GET", "/b/k", [], headers, b"")) != 403
            assert guard.look(Asked("GET", "/b/other", [], headers, b"")) == 403
