"""Every fault by itself, through the whole native path: right bytes or the documented error, and recovery."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path

import pytest

from tests.faults.readpath import extents
from tests.integration.faults_rig import (
    IMAGE,
    PASSING,
    REFUSED,
    REFUSED_TLS,
    ROUNDS,
    SCHEMES,
    certificates,
    tried,
)
from tierblk.core import BLOCK_BYTES

READS = 20 * ROUNDS
FEW = [(block * BLOCK_BYTES + 512, 3 * BLOCK_BYTES // 2) for block in range(0, 40, 8)]
SOMETIMES = 0.35

CASES = [(scheme, fault) for scheme in SCHEMES for fault in (*PASSING, *REFUSED)]
CASES += [("https", fault) for fault in REFUSED_TLS]
# Faults under which a read never gets on, as long as they last.
HOLDING = ("error", "busy=1:0.1", "reset-head", "stall-head", "drop", "mute")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    certificates(made)
    return made


@pytest.mark.parametrize(("scheme", "fault"), CASES)
async def test_now_and_then(scheme: str, fault: str, tmp_path: Path, home: Path) -> None:
    """A third of the answers, or connections, is bad. A refused one may be an error; nothing else may."""
    name, _, value = fault.partition("=")
    seed = zlib.crc32(fault.encode())
    async with tried(tmp_path, scheme, home) as t:
        t.server.set_faults(f"{name}={SOMETIMES}{value.removeprefix('1')}", seed=seed)
        errors = await t.path.check_all(extents(seed, READS, len(IMAGE)))
        if fault in PASSING:
            assert errors == [None] * READS, t.path.state()
        assert all(error is None or error.errno == 5 for error in errors)
        if name not in ("drop", "mute", "plain-http", "stranger"):  # connections that are kept get none
            assert t.server.ledger.faults[name] > 0
        await t.recovers(FEW)
        await t.ends_well()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fault", PASSING)
async def test_always_and_then_no_longer(scheme: str, fault: str, tmp_path: Path, home: Path) -> None:
    """Reads wait, or get on slowly; when the fault ends they end within 2 s, each with the right bytes."""
    async with tried(tmp_path, scheme, home) as t:
        if fault in ("drop", "mute"):  # faults of connections: those that there are shall not be used
            await t.server.gone()
            t.server.back()
        t.server.set_faults(fault, seed=3)
        reads = [asyncio.create_task(t.path.check(extent)) for extent in FEW]
        if fault in HOLDING:
            await t.path.until(lambda: t.path.fetcher.health()["state"] == "degraded")
            assert not any(read.done() for read in reads)
        else:
            await t.server.until(lambda: sum(t.server.ledger.faults.values()) > 2)
        async with asyncio.timeout(2.0):
            t.server.set_faults("")
            assert await asyncio.gather(*reads) == [None] * len(FEW)
        await t.path.settle()
        assert t.path.fetcher.health()["state"] == "ok"
        await t.ends_well()


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [(scheme, fault) for scheme in SCHEMES for fault in REFUSED] + [("https", f) for f in REFUSED_TLS],
)
async def test_refused_as_long_as_it_lasts(scheme: str, fault: str, tmp_path: Path, home: Path) -> None:
    """EIO at once and a reason that says what came; what was cached before is readable; then all is well."""
    async with tried(tmp_path, scheme, home) as t:
        before = [(41 * BLOCK_BYTES, BLOCK_BYTES)]
        assert await t.path.check_all(before) == [None]
        if fault in REFUSED_TLS:
            await t.server.gone()
            t.server.back()
        t.server.set_faults(fault, seed=3)
        async with asyncio.timeout(2.0):
            errors = await t.path.check_all(FEW)
        assert all(isinstance(error, OSError) and error.errno == 5 for error in errors)
        health = t.path.fetcher.health()
        assert health["state"] == "refused"
        assert {**REFUSED, **REFUSED_TLS}[fault] in str(health["reason"])
        assert await t.path.check_all(before) == [None]
        await t.recovers(FEW)
        assert t.path.fetcher.health()["state"] == "ok"
        await t.ends_well()


@pytest.mark.parametrize("fault", ["whole", "other-range", "wrong-length", "encoding", "no-etag"])
async def test_one_bad_answer_is_asked_for_again_elsewhere(fault: str, tmp_path: Path, home: Path) -> None:
    """DESIGN 9: bad bytes are retried once, on another connection, before anybody gets an error."""
    async with tried(tmp_path, "http", home) as t:
        t.server.force(fault)
        connections = t.server.connections
        assert await t.path.check_all([(0, BLOCK_BYTES)]) == [None]
        assert t.server.connections > connections
        await t.ends_well()
