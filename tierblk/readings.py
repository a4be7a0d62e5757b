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
        """What the device shows there. only_one: held meanwhile, so that who detaches it waits. TierblkError,
        also when it is taken away meanwhile. Cancelled, it ends."""

        async def read() -> bytes:
            async with only_one:
                stack = stack_of()
                if not 0 <= offset_bytes <= offset_bytes + length_bytes <= stack.size_bytes:
                    raise DeviceError(f"{name} has {stack.size_bytes} bytes, which do not hold these")
                return await stacks.content(stack, offset_bytes, length_bytes)

        reading, caller = asyncio.create_task(read()), asyncio.current_task()
        assert caller is not None
        self._running[name].add(reading)
        try:
            return await reading
        except asyncio.CancelledError:
            if caller.cancelling():
                raise
            raise DeviceError(f"{name} was taken away while it was read") from None
        finally:
            self._running[name].discard(reading)
            if not self._running[name]:
                del self._running[name]

    def end(self, name: str) -> None:
        """Of a device that is taken away: they end in an error."""
        for reading in self._running.get(name, ()):
            reading.cancel()

    async def end_all(self) -> None:
        """Likewise, of all devices; no door of theirs is open when it returns."""
        readings = [reading for each in self._running.values() for reading in each]
        for reading in readings:
            reading.cancel()
        await asyncio.gather(*readings, return_exceptions=True)
