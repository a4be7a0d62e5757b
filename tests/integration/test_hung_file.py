"""A network filesystem that hangs under a file:// image holds nobody who wants to go."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from pathlib import Path

import pytest

from tests.faults.readpath import open_path, settings
from tierblk.core import BLOCK_BYTES

IMAGE = random.Random(2).randbytes(8 * BLOCK_BYTES)
LIMIT_S = 20.0


@pytest.mark.parametrize("read_timeout", ["1h", "100ms"])
async def test_detach_force_and_stop_do_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_timeout: str
) -> None:
    """What they do is what closes this path: drain, end all fetches, close the source."""
    (tmp_path / "image").write_bytes(IMAGE)
    reading, may_end, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
    preadv = os.preadv

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        loop.call_soon_threadsafe(reading.set)
        may_end.wait(2 * LIMIT_S)
        return preadv(fd, buffers, offset)

    remote = settings(read_timeout=read_timeout)
    path = await open_path(tmp_path, IMAGE, (tmp_path / "image").as_uri(), remote=remote)
    monkeypatch.setattr("os.preadv", hang)
    try:
        async with asyncio.timeout(LIMIT_S):
            read = path.read(0, 4096)
            await reading.wait()
            await path.close()
            with pytest.raises(OSError, match="Input/output error"):
                await read
    finally:
        may_end.set()


async def test_on_outage_counts_and_reads_go_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(IMAGE)
    may_end, preadv = threading.Event(), os.preadv

    def hang(fd: int, buffers: list[memoryview], offset: int) -> int:
        may_end.wait(2 * LIMIT_S)
        return preadv(fd, buffers, offset)

    remote = settings(read_timeout="100ms", retries=1)
    path = await open_path(tmp_path, IMAGE, (tmp_path / "image").as_uri(), remote=remote)
    monkeypatch.setattr("os.preadv", hang)
    try:
        path.set_patience(0)
        assert isinstance(await path.check((0, 4096)), OSError)
        path.set_patience(float("inf"))
        waits = asyncio.create_task(path.check((0, 4096)))
        await path.until(lambda: path.fetcher.health()["waiting"] > 0)
        may_end.set()
        assert await waits is None
        assert await path.check((0, len(IMAGE))) is None
        await path.settle()
    finally:
        may_end.set()
        await path.close()
