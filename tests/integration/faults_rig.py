"""What the tests of the read path under faults share: the server's kinds, leaks, and the documented ends."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults import FaultServer
from tests.faults.readpath import ReadPath, open_path, settings
from tests.integration.servers import make_certificates, server_context
from tierblk.core import BLOCK_BYTES

ROUNDS = int(os.environ.get("TIERBLK_FAULT_ROUNDS", "1"))
"""How many times longer than usual: TIERBLK_FAULT_ROUNDS=50 for a long run."""

IMAGE = random.Random(11).randbytes(48 * BLOCK_BYTES + 7 * 512)
RECOVERY_S = 2.0
LEAK_S = 5.0

# Faults that pass: the read goes on behind what came, and waits as long as the device's policy says.
PASSING = (
    *("truncate", "error", "busy=1:0.1", "reset-head", "reset", "stall-head", "stall", "drip=1:4000000"),
    *("redirect", "hangup", "drop", "mute"),
)
# Answers that no working server gives: one more try on another connection, then EIO, at once. What it says.
REFUSED = {
    "whole": "ignored the range",
    "other-range": "Content-Range",
    "other-etag": "has changed",
    "no-etag": "has changed",
    "wrong-length": "Content-Length",
    "encoding": "Content-Encoding",
    "redirect-always": "more than 5 times",
    "redirect-loop": "more than 5 times",
    "no-http": "not HTTP",
}
REFUSED_TLS = {"plain-http": "TLS failed", "stranger": "not trusted"}
SCHEMES = ("http", "https")


@dataclass
class Tried:
    """A server and the path that reads from it."""

    server: FaultServer
    path: ReadPath

    async def recovers(self, extents: list[tuple[int, int]]) -> None:
        """Without faults all of them can be read within 2 s."""
        self.server.set_faults("")
        begun_s = time.monotonic()
        errors = await self.path.check_all(extents, at_once=16)
        assert errors == [None] * len(extents), self.path.state()
        assert time.monotonic() - begun_s < RECOVERY_S

    async def ends_well(self) -> None:
        """Nothing is under way, and what is cached is right with nobody to ask."""
        await self.path.settle()
        await self.server.gone()
        await self.path.check_cached()
        await self.path.settle()


def certificates(home: Path) -> None:
    """What `tried` needs for https."""
    make_certificates(home)


@asynccontextmanager
async def tried(
    directory: Path,
    scheme: str,
    home: Path,
    *,
    slots: int = 0,
    patience_s: float = float("inf"),
    **keys: object,
) -> AsyncIterator[Tried]:
    """A healthy server and an open path, and at the end no task and no descriptor more than before.

    home: where `certificates` were made. keys: of the table [remote]."""
    tasks, descriptors = asyncio.all_tasks(), open_descriptors()
    tls = stranger = None
    if scheme == "https":
        tls = server_context(home)
        stranger = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        stranger.load_cert_chain(home / "stranger.pem", home / "stranger.key")
        keys["ca_file"] = str(home / "ca.pem")
    async with FaultServer(IMAGE, tls=tls, stranger=stranger) as server:
        path = await open_path(
            directory, IMAGE, server.url(), slots=slots, patience_s=patience_s, remote=settings(**keys)
        )
        try:
            yield Tried(server, path)
        finally:
            await path.close()
    del path
    deadline = time.monotonic() + LEAK_S
    while asyncio.all_tasks() != tasks or open_descriptors() != descriptors:  # TLS takes a turn to close
        assert time.monotonic() < deadline, (asyncio.all_tasks() - tasks, open_descriptors() - descriptors)
        await asyncio.sleep(0)


def open_descriptors() -> set[tuple[str, str]]:
    """(number, what it is) of each descriptor of this process, but for the one that looks."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            pass
    return found
