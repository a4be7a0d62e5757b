"""Readings of a device for clients, which end with it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tierblk.errors import DeviceError
from tierblk.layer import Stack
from tierblk.readings import Readings

LIMIT_S = 10.0


class Stuck:
    """In the place of Stacks: what is read never comes, and it takes a moment to let go."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = 0

    async def content(self, stack: Stack, offset_bytes: int, length_bytes: int) -> bytes:
        self.open += 1
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.open -= 1
        return b""


def reading(readings: Readings, stacks: Stuck, name: str, lock: asyncio.Lock) -> asyncio.Task[bytes]:
    stack = cast(Stack, SimpleNamespace(size_bytes=4096))
    return asyncio.create_task(readings.read(name, lock, lambda: stack, cast(Any, stacks), 0, 4096))


async def test_who_reads_a_device_that_is_taken_away_gets_an_error() -> None:
    readings, stacks, lock = Readings(), Stuck(), asyncio.Lock()
    async with asyncio.timeout(LIMIT_S):
        first, second = (reading(readings, stacks, "dev", lock) for _ in range(2))
        other = reading(readings, stacks, "other", asyncio.Lock())
        await stacks.begun.wait()
        readings.end("dev")
        for each in (first, second):
            with pytest.raises(DeviceError, match="taken away"):
                await each
        assert not other.done()
        await readings.end_all()
        assert stacks.open == 0
        with pytest.raises(DeviceError, match="taken away"):
            await other
        assert not readings._running


async def test_a_client_that_hangs_up_ends_its_reading() -> None:
    readings, stacks = Readings(), Stuck()
    async with asyncio.timeout(LIMIT_S):
        task = reading(readings, stacks, "dev", asyncio.Lock())
        await stacks.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stacks.open == 0
