"""Faults together, servers that go away and come back, images that change, and fetches that are ended."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.faults.readpath import extents
from tests.integration.faults_rig import IMAGE, RECOVERY_S, ROUNDS, SCHEMES, certificates, tried
from tierblk.core import BLOCK_BYTES

MIXED = (
    "truncate=0.05,whole=0.01,other-range=0.01,other-etag=0.01,no-etag=0.01,wrong-length=0.01,encoding=0.01,"
    "error=0.03,busy=0.01:0.05,reset-head=0.03,reset=0.05,stall-head=0.01,stall=0.02,drip=0.03:2000000,"
    "redirect=0.05,redirect-always=0.01,redirect-loop=0.01,no-http=0.01,hangup=0.05,drop=0.05,mute=0.02"
)
PASSING_ONLY = (
    "truncate=0.1,error=0.05,busy=0.02:0.05,reset-head=0.05,reset=0.1,stall-head=0.01,stall=0.03,"
    "drip=0.03:2000000,redirect=0.1,hangup=0.1,drop=0.1,mute=0.02"
)
SOME = [(block * BLOCK_BYTES, BLOCK_BYTES) for block in range(0, 40, 4)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    certificates(made)
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", [1, 2])
async def test_all_kinds_with_a_cache_too_small(scheme: str, seed: int, tmp_path: Path, home: Path) -> None:
    async with tried(tmp_path, scheme, home, slots=16) as t:
        t.server.set_faults(MIXED + (",plain-http=0.02,stranger=0.02" if scheme == "https" else ""), seed)
        errors = await t.path.check_all(extents(seed, 150 * ROUNDS, len(IMAGE)), at_once=8)
        assert all(error is None or error.errno == 5 for error in errors)
        assert sum(error is None for error in errors) > len(errors) * 0.7
        assert len(t.server.ledger.faults) > 8
        await t.recovers(SOME)
        await t.ends_well()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_what_passes_is_never_an_error(scheme: str, tmp_path: Path, home: Path) -> None:
    async with tried(tmp_path, scheme, home, slots=16) as t:
        t.server.set_faults(PASSING_ONLY, seed=5)
        errors = await t.path.check_all(extents(5, 120 * ROUNDS, len(IMAGE)), at_once=8)
        assert errors == [None] * len(errors), t.path.state()
        await t.recovers(SOME)
        await t.ends_well()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("how", ["gone", "blackhole"])
async def test_a_server_that_is_away_for_a_while(how: str, scheme: str, tmp_path: Path, home: Path) -> None:
    """With the policy `wait` misses wait and hits go on; all end within 2 s of the server's return."""
    async with tried(tmp_path, scheme, home) as t:
        t.server.shape(latency_s=0.005)
        assert await t.path.check_all(SOME[:4]) == [None] * 4
        reads = [asyncio.create_task(t.path.check(extent)) for extent in extents(9, 16, len(IMAGE))]
        if how == "gone":
            await t.server.gone()
        else:
            t.server.blackhole()
        late = asyncio.create_task(t.path.check((46 * BLOCK_BYTES, BLOCK_BYTES)))
        await t.path.until(lambda: t.path.fetcher.health()["state"] == "degraded")
        assert t.path.fetcher.health()["reason"]
        assert await t.path.check_all(SOME[:4]) == [None] * 4  # hits
        assert not late.done()
        t.server.back()
        async with asyncio.timeout(RECOVERY_S):
            assert await asyncio.gather(*reads, late) == [None] * 17
        await t.path.settle()
        assert t.path.fetcher.health()["state"] == "ok"
        await t.ends_well()


@pytest.mark.parametrize("patience_s", [0.0, 0.5])
@pytest.mark.parametrize(("how", "timeout"), [("gone", "100ms"), ("blackhole", "100ms"), ("blackhole", "2s")])
async def test_a_device_that_does_not_wait(
    how: str, timeout: str, patience_s: float, tmp_path: Path, home: Path
) -> None:
    """With the policy `fail`, and `wait` N seconds, a miss ends in EIO; afterwards all is as before. Also
    with a time-out that leaves room for probes of a server that is silent."""
    async with tried(tmp_path, "http", home, patience_s=patience_s, read_timeout=timeout) as t:
        assert await t.path.check_all(SOME[:2]) == [None] * 2
        if how == "gone":
            await t.server.gone()
        else:
            t.server.blackhole()
        begun_s = time.monotonic()
        errors = await t.path.check_all(SOME)
        taken_s = time.monotonic() - begun_s
        assert [error and error.errno for error in errors] == [None, None] + [5] * (len(SOME) - 2)
        assert patience_s - 0.05 < taken_s < patience_s + (4.0 if timeout == "100ms" else 16.0)
        t.server.back()
        begun_s = time.monotonic()
        while any(await t.path.check_all(SOME)):
            assert time.monotonic() - begun_s < RECOVERY_S, t.path.state()
        await t.ends_well()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_an_image_that_changes(scheme: str, tmp_path: Path, home: Path) -> None:
    """What is cached stays readable, misses are EIO, both versions are named; until the old one is back."""
    async with tried(tmp_path, scheme, home) as t:
        assert await t.path.check_all(SOME[:3]) == [None] * 3
        old = t.server.content
        t.server.replace(IMAGE[::-1])
        errors = await t.path.check_all(SOME)
        assert [error and error.errno for error in errors] == [None] * 3 + [5] * (len(SOME) - 3)
        reason = str(t.path.fetcher.health()["reason"])
        assert old.etag in reason
        assert t.server.content.etag in reason
        t.server.replace(old)
        await t.recovers(SOME)
        await t.ends_well()


async def test_expired_redirects_are_resolved_anew(tmp_path: Path, home: Path) -> None:
    async with tried(tmp_path, "http", home) as t:
        t.server.set_faults("redirect")
        for extent in SOME[:5]:
            assert await t.path.check(extent) is None
            t.server.expire()
        assert t.server.ledger.redirects >= 5
        await t.ends_well()


@pytest.mark.parametrize("faults", ["", "truncate=0.5"])
async def test_no_byte_comes_twice(faults: str, tmp_path: Path, home: Path) -> None:
    """Readers that meet share a fetch; a fetch that broke off goes on behind what it brought."""
    keys = {"hedge_percent": 0, "readahead": False}
    async with tried(tmp_path, "http", home, **keys) as t:
        t.server.shape(latency_s=0.002)
        t.server.ledger.forget()
        t.server.set_faults(faults, seed=2)
        drawn = extents(4, 120, len(IMAGE))
        assert await t.path.check_all(drawn, at_once=16) == [None] * len(drawn)
        await t.path.settle()
        served = t.server.ledger.served()
        assert served.repeated == ()
        await t.ends_well()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fault", ["", "stall", "stall-head", "drip", "mute", "error", "truncate"])
async def test_fetches_that_are_ended(fault: str, scheme: str, tmp_path: Path, home: Path) -> None:
    """A stop in the middle of anything: readers get an error or the right bytes, and nothing is left."""
    async with tried(tmp_path, scheme, home, read_timeout="30s", connect_timeout="30s") as t:
        t.server.shape(latency_s=0.001, bytes_per_s=20_000_000)
        if fault == "mute":
            await t.server.gone()
            t.server.back()
        t.server.set_faults(fault)
        asked = t.server.ledger.requests + t.server.connections
        reads = [asyncio.create_task(t.path.check(extent)) for extent in SOME]
        await t.server.until(lambda: t.server.ledger.requests + t.server.connections > asked)
        await t.path.until(lambda: t.path.fills.busy > 0)
        async with asyncio.timeout(2.0):
            await t.path.end_fetches()
            errors = await asyncio.gather(*reads)
        assert all(error is None or error.errno == 5 for error in errors)
        await t.ends_well()
