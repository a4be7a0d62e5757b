"""Devices read on behalf of clients of the control interface."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tierblk.errors import DeviceError
from tierblk.layer import Stack
from tierblk.stacks import Stacks


class Readings:
    """Those that run. All of it belongs to the event loop."""

    def __init__(self) -> None:
        self._running: defaultdict[str, set[asyncio.Task[Any]]] = defaultdict(set)

    async def read(
        self,
        name: str,
        only_one: asyncio.Lock,
        stack_of: Callable[[], Stack],
        stacks: Stacks,
        offset_bytes: int,
        length_bytes: int,
    ) -> bytes:
        """What the device shows there. only_one: held meanwhile, so that who detaches it waits. TierblkError.
        Cancelled, it ends."""
        reading = asyncio.current_task()
        assert reading is not None
        self._running[name].add(reading)
        try:
            async with only_one:
                stack = stack_of()
                if not 0 <= offset_bytes <= offset_bytes + length_bytes <= stack.size_bytes:
                    raise DeviceError(f"{name} has {stack.size_bytes} bytes, which do not hold these")
                return await stacks.content(stack, offset_bytes, length_bytes)
        finally:
            self._running[name].discard(reading)

    def end(self, name: str) -> None:
        """Of a device that is taken away: they end in an error."""
        for reading in self._running.get(name, ()):
            reading.cancel()
