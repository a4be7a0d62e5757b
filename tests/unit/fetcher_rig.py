"""A loop whose time jumps, and a source whose reads go as the test says: fetchers tried without waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tierblk.config import RemoteSettings
from tierblk.errors import TierblkError
from tierblk.remote import Fetcher, Identity, Progress, Ticket

CONTENT = bytes(range(251)) * 20_000  # 5 MB, no period that a block could have
END_S = 100_000.0  # whoever waits longer in a test waits for something that never comes


class _Jumping(selectors.DefaultSelector):
    """Waits for nothing: the time that the loop wants to wait has passed when it comes back."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("nothing will ever happen any more")
        if not events and timeout:
            self.loop.now_s += timeout
            if self.loop.now_s > END_S:
                raise RuntimeError("this takes for ever")
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in whose time sleeping costs nothing."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        selector = _Jumping()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


def in_virtual_time(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it to its end, and see that no task and no timer outlives it."""

    async def run() -> None:
        await scenario()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())


def now_s() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Plan:
    """How one read goes: (after so many seconds, so many bytes in all have come), ..., then its end: an
    error, silence ("silence"), or success when all bytes came."""

    steps: list[tuple[float, int]] = field(default_factory=list)
    end: TierblkError | str | None = None


def quick(length_bytes: int, after_s: float = 0.01) -> Plan:
    """All of it at once."""
    return Plan([(after_s, length_bytes)])


@dataclass
class Asked:
    """A read that was begun."""

    at_s: float
    offset_bytes: int
    length_bytes: int
    anew: bool


class PlannedSource:
    """A source over a network: each read goes as `answer` says. It fails the test when a buffer is written to
    by two reads that both run."""

    def __init__(self, answer: Callable[[Asked], Plan]) -> None:
        self.answer = answer
        self.asked = list[Asked]()
        self.running = 0
        self.most_running = 0
        self.writers: dict[int, int] = {}

    @property
    def identity(self) -> Identity:
        return Identity("planned:", len(CONTENT), "size:0")

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        await self._go(Asked(now_s(), offset_bytes, len(buffer), False), buffer, progress)

    async def read_anew(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        await self._go(Asked(now_s(), offset_bytes, len(buffer), True), buffer, progress)

    async def aclose(self) -> None:
        pass

    async def _go(self, asked: Asked, buffer: memoryview, progress: Progress) -> None:
        self.asked.append(asked)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        memory = id(buffer.obj)
        self.writers[memory] = self.writers.get(memory, 0) + 1
        assert self.writers[memory] == 1, "R5: two reads write to one buffer"
        came = 0
        try:
            plan = self.answer(asked)
            for after_s, count in plan.steps:
                await asyncio.sleep(after_s)
                count = came = min(count, len(buffer))
                buffer[:count] = CONTENT[asked.offset_bytes : asked.offset_bytes + count]
                progress(count)
            if isinstance(plan.end, TierblkError):
                raise plan.end
            if plan.end == "silence":
                await asyncio.sleep(END_S)
        except asyncio.CancelledError:
            buffer[came:] = bytes(len(buffer) - came)  # what it has not vouched for is its own to the end
            raise
        finally:
            try:
                await asyncio.sleep(0)  # a cancelled read may need a moment, in which it could still write
            finally:
                self.running -= 1
                del self.writers[memory]


class Rig:
    """A fetcher of a planned source, in virtual time."""

    def __init__(self, answer: Callable[[Asked], Plan], **settings: Any) -> None:
        self.source = PlannedSource(answer)
        self.settings = RemoteSettings.model_validate({"retry_delay": "200ms", **settings})
        loop = asyncio.get_running_loop()
        self.fetcher = Fetcher(self.source, self.settings, rng=lambda: 0.5, clock=loop.time)
        self.troubles = list[TierblkError]()

    async def read(
        self,
        length_bytes: int = 65536,
        offset_bytes: int = 0,
        *,
        ticket: Ticket | None = None,
        keep_on: bool = False,
    ) -> float:
        """One fetch, whose bytes and progress must be right; how long it took."""
        begun_s, buffer, seen = now_s(), bytearray(length_bytes), 0

        def progress(count: int) -> None:
            nonlocal seen
            assert seen < count <= length_bytes
            assert buffer[seen:count] == CONTENT[offset_bytes + seen : offset_bytes + count]
            seen = count

        await self.fetcher.fetch(
            offset_bytes,
            memoryview(buffer),
            progress,
            ticket=ticket,
            on_trouble=self.troubles.append,
            keep_on=lambda: keep_on,
        )
        assert seen == length_bytes
        assert buffer == CONTENT[offset_bytes : offset_bytes + length_bytes]
        return now_s() - begun_s

    async def warm(self, reads: int = 400) -> None:
        """Learn what is usual."""
        for _ in range(reads):
            await self.read()

    def settled(self) -> None:
        """Nothing is left of what ran."""
        counters = self.fetcher.counters
        assert (counters.in_flight, counters.waiting, self.source.running) == (0, 0, 0)
        assert self.fetcher.health()["waiting"] == 0
        assert self.fetcher._places._free == self.settings.max_requests
