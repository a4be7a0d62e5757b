"""The fetcher: order, limits, retries, and what a cancelled fetch leaves."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fetcher_rig import Asked, Plan, Rig, in_virtual_time, now_s, quick
from tierblk.config import RemoteSettings
from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import Fetcher, Identity, Progress
from tierblk.remote.retry import DELAY_MAX_S, backoff_s

CONTENT = bytes(range(256)) * 16
DEADLINE_S = 10.0


@given(
    st.integers(0, 1000),
    st.floats(0.001, 60, allow_nan=False),
    st.floats(0, 1, exclude_max=True, allow_nan=False),
)
def test_backoff_doubles_up_to_a_cap(attempt: int, first_s: float, chance: float) -> None:
    delay_s = backoff_s(attempt, first_s, chance)
    longest_s = min(first_s * 2.0 ** min(attempt, 64), max(DELAY_MAX_S, first_s))
    assert longest_s / 2 <= delay_s <= longest_s


@dataclass
class Call:
    """One read_into that waits for what the test makes of it."""

    offset_bytes: int
    buffer: memoryview
    progress: Progress
    end: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def bring(self, count: int) -> None:
        """The first count bytes arrive."""
        self.buffer[:count] = CONTENT[self.offset_bytes : self.offset_bytes + count]
        self.progress(count)

    def finish(self) -> None:
        self.bring(len(self.buffer))
        self.end.set_result(None)

    def fail(self, error: TierblkError) -> None:
        self.end.set_exception(error)


class Puppet:
    """A source whose reads end when and how the test says."""

    def __init__(self) -> None:
        self.calls = asyncio.Queue[Call]()
        self.open_calls = 0

    @property
    def identity(self) -> Identity:
        return Identity("puppet:", len(CONTENT), "size:0")

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        call = Call(offset_bytes, buffer, progress)
        self.calls.put_nowait(call)
        self.open_calls += 1
        try:
            await call.end
        finally:
            self.open_calls -= 1

    async def aclose(self) -> None:
        pass


@dataclass
class Stage:
    """A fetcher of a puppet, with a wait that only the test ends."""

    retries: int = 3
    max_requests: int = 32

    def __post_init__(self) -> None:
        self.source = Puppet()
        self.sleeps = asyncio.Queue[tuple[float, asyncio.Future[None]]]()
        settings = RemoteSettings.model_validate(
            {"retries": self.retries, "max_requests": self.max_requests, "retry_delay": "1s"}
        )
        self.fetcher = Fetcher(self.source, settings, rng=lambda: 0.5, sleep=self._sleep)

    async def _sleep(self, delay_s: float) -> None:
        awake = asyncio.get_running_loop().create_future()
        self.sleeps.put_nowait((delay_s, awake))
        await awake

    async def call(self) -> Call:
        async with asyncio.timeout(DEADLINE_S):
            return await self.source.calls.get()

    async def wake(self) -> float:
        """End the next wait; how long it was to be."""
        async with asyncio.timeout(DEADLINE_S):
            delay_s, awake = await self.sleeps.get()
        awake.set_result(None)
        return delay_s

    def fetch(self, offset_bytes: int, buffer: bytearray, progress: Progress) -> asyncio.Task[None]:
        return asyncio.create_task(self.fetcher.fetch(offset_bytes, memoryview(buffer), progress))


async def test_one_read() -> None:
    stage, buffer, seen = Stage(), bytearray(100), list[int]()
    task = stage.fetch(10, buffer, seen.append)
    call = await stage.call()
    call.bring(40)
    assert stage.fetcher.counters.in_flight == 1
    assert stage.fetcher.counters.fetched_bytes == 40
    call.finish()
    await task
    assert buffer == CONTENT[10:110]
    assert seen == [40, 100]
    counters = stage.fetcher.counters
    assert (counters.requests, counters.fetched_bytes, counters.retries) == (1, 100, 0)
    assert (counters.errors, counters.in_flight) == (0, 0)


async def test_retry_goes_on_behind_what_arrived() -> None:
    stage, buffer, seen = Stage(), bytearray(100), list[int]()
    task = stage.fetch(10, buffer, seen.append)
    for brought, delay_s in ((30, 0.75), (0, 1.125), (50, 1.125)):
        call = await stage.call()
        assert (call.offset_bytes, len(call.buffer)) == (10 + seen[-1] if seen else 10, 100 - sum(seen[-1:]))
        if brought:
            call.bring(brought)
        call.fail(RemoteUnavailable("busy"))
        assert await stage.wake() == delay_s
    (await stage.call()).finish()
    await task
    assert buffer == CONTENT[10:110]
    assert seen == [30, 80, 100]
    counters = stage.fetcher.counters
    assert (counters.requests, counters.retries, counters.errors) == (4, 3, 0)
    assert counters.fetched_bytes == 100


async def test_retries_are_bounded() -> None:
    stage = Stage(retries=1)
    task = stage.fetch(0, bytearray(100), lambda count: None)
    (await stage.call()).fail(RemoteUnavailable("first"))
    await stage.wake()
    (await stage.call()).fail(RemoteUnavailable("second"))
    with pytest.raises(RemoteUnavailable, match="second"):
        await task
    assert (stage.fetcher.counters.requests, stage.fetcher.counters.errors) == (2, 1)


async def test_refused_is_final() -> None:
    stage = Stage()
    task = stage.fetch(0, bytearray(100), lambda count: None)
    (await stage.call()).fail(RemoteRefused("gone"))
    with pytest.raises(RemoteRefused, match="gone"):
        await task
    assert (stage.fetcher.counters.requests, stage.fetcher.counters.errors) == (1, 1)


async def test_a_failure_behind_the_last_byte_is_none() -> None:
    stage, buffer = Stage(retries=0), bytearray(100)
    task = stage.fetch(0, buffer, lambda count: None)
    call = await stage.call()
    call.bring(100)
    call.fail(RemoteUnavailable("reset"))
    await task
    assert buffer == CONTENT[:100]
    assert stage.fetcher.counters.errors == 0


async def test_first_come_first_served() -> None:
    stage = Stage(max_requests=2)
    tasks = [stage.fetch(number, bytearray(1), lambda count: None) for number in range(6)]
    running = [await stage.call(), await stage.call()]
    order = []
    while running:
        assert stage.source.open_calls <= 2
        assert stage.fetcher.counters.in_flight <= 2
        call = running.pop(0)
        order.append(call.offset_bytes)
        call.finish()
        if len(order) + len(running) < len(tasks):
            running.append(await stage.call())
    await asyncio.gather(*tasks)
    assert order == list(range(6))


async def test_a_waiting_retry_leaves_its_place_to_others() -> None:
    stage = Stage(max_requests=1)
    first = stage.fetch(0, bytearray(1), lambda count: None)
    (await stage.call()).fail(RemoteUnavailable("busy"))
    second = stage.fetch(7, bytearray(1), lambda count: None)
    other = await stage.call()
    assert other.offset_bytes == 7
    other.finish()
    await second
    await stage.wake()
    (await stage.call()).finish()
    await first


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("where", ["in the queue", "in the read", "between two reads"])
async def test_cancel(where: str) -> None:
    stage, buffer = Stage(max_requests=1), bytearray(100)
    if where == "in the queue":
        blocker = stage.fetch(0, bytearray(1), lambda count: None)
        running = await stage.call()
        task = stage.fetch(0, buffer, lambda count: None)
        behind = stage.fetch(5, bytearray(1), lambda count: None)
        await asyncio.sleep(0)  # one turn: both take their places in the queue
        await _cancel(task)
        running.finish()
        (await stage.call()).finish()
        await asyncio.gather(blocker, behind)
    else:
        task = stage.fetch(0, buffer, lambda count: None)
        call = await stage.call()
        if where == "between two reads":
            call.fail(RemoteUnavailable("busy"))
            async with asyncio.timeout(DEADLINE_S):
                await stage.sleeps.get()
        await _cancel(task)
    assert buffer == bytes(100)
    assert stage.source.open_calls == 0
    assert stage.fetcher.counters.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    after = stage.fetch(0, buffer, lambda count: None)  # its place is free again
    (await stage.call()).finish()
    await after
    assert buffer == CONTENT[:100]


@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12),
    retries=st.integers(0, 6),
)
def test_whatever_fails_progress_only_grows(pieces: list[tuple[int, bool]], retries: int) -> None:
    async def scenario() -> None:
        stage, buffer, seen = Stage(retries=retries), bytearray(100), [0]

        def progress(count: int) -> None:
            assert count >= seen[-1]
            assert buffer[:count] == CONTENT[:count]
            seen.append(count)

        task = stage.fetch(0, buffer, progress)
        for failures, (brought, refused) in enumerate(pieces, 1):
            call = await stage.call()
            call.bring(min(brought, len(call.buffer)))
            call.fail(RemoteRefused("no") if refused else RemoteUnavailable("busy"))
            if refused or failures > retries or seen[-1] == 100:
                break
            await stage.wake()
        else:
            (await stage.call()).finish()
        try:
            await task
            assert buffer == CONTENT[:100]
        except RemoteRefused:
            assert stage.fetcher.counters.errors == 1
        except RemoteUnavailable:
            assert stage.fetcher.counters.retries == retries
        assert stage.fetcher.counters.fetched_bytes == seen[-1]
        assert stage.fetcher.counters.in_flight == 0

    asyncio.run(scenario())


def test_a_line_a_second_tells_of_other_tries(caplog: pytest.LogCaptureFixture) -> None:
    """A server that fails every other answer would fill the log, which is in memory."""
    caplog.set_level(logging.DEBUG, "tierblk.remote.fetcher")

    async def scenario() -> None:
        def every_other_one(asked: Asked) -> Plan:
            if len(rig.source.asked) % 2:
                return Plan([], RemoteUnavailable("it answered 503"))
            return quick(asked.length_bytes)

        rig = Rig(every_other_one, hedge_percent=0)
        begun_s = now_s()
        while now_s() - begun_s < 10:
            await rig.read()
        levels = [
            line.levelname for line in caplog.records if "it answered 503; trying again" in line.message
        ]
        assert len(levels) > 40
        assert 8 <= levels.count("INFO") <= 11
        assert set(levels) == {"INFO", "DEBUG"}

    in_virtual_time(scenario)
