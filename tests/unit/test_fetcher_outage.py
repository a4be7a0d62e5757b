"""A source that goes away and comes back: who asks, how often, what is said, and when reads go on."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.fetcher_rig import Asked, Plan, Rig, in_virtual_time, now_s, quick
from tierblk.errors import RemoteRefused, RemoteUnavailable
from tierblk.remote import Priority, Ticket


class Server:
    """A source that is there, or not: refusing at once ("refused") or swallowing what is sent ("silent")."""

    def __init__(self) -> None:
        self.state = "up"
        self.retry_after_s: float | None = None

    def __call__(self, asked: Asked) -> Plan:
        match self.state:
            case "refused":
                return Plan([], RemoteUnavailable("nobody is there", retry_after_s=self.retry_after_s))
            case "silent":
                return Plan([], "silence")
            case "gone":
                return Plan([], RemoteRefused("404"))
        return quick(asked.length_bytes)


@pytest.mark.parametrize("how", ["refused", "silent"])
@pytest.mark.parametrize("outage_s", [5.0, 47.3, 300.0])
@pytest.mark.parametrize("readers", [1, 50])
def test_reads_go_on_soon_after_the_return(how: str, outage_s: float, readers: int) -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, max_requests=8)
        await rig.warm(20)
        server.state = how
        tasks = [asyncio.create_task(rig.read(offset_bytes=n * 4096, keep_on=True)) for n in range(readers)]
        await asyncio.sleep(outage_s / 2)
        before = len(rig.source.asked)
        health = rig.fetcher.health()
        assert health["state"] == "degraded"
        assert health["since"] is not None
        assert health["waiting"] >= min(readers, 8)
        assert health["next_try_s"] is not None
        assert 0 <= health["next_try_s"] <= 1
        await asyncio.sleep(outage_s / 2)
        asked = len(rig.source.asked) - before
        # When all is silent, each place times out once in read_timeout as well.
        assert asked <= outage_s / 2 / 0.75 + 2 + (8 * (1 + outage_s / 60) if how == "silent" else 0)
        server.state = "up"
        back_s = now_s()
        await asyncio.gather(*tasks)
        assert now_s() - back_s < 2.0
        assert rig.fetcher.health()["state"] == "ok"
        rig.settled()

    in_virtual_time(scenario)


def test_trouble_is_told_when_the_retries_are_used_up_and_then_now_and_again() -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=3)
        server.state = "refused"
        task = asyncio.create_task(rig.read(keep_on=True))
        await asyncio.sleep(0.9)
        assert (len(rig.source.asked), rig.troubles) == (3, [])
        await asyncio.sleep(0.2)
        assert (len(rig.source.asked), len(rig.troubles)) == (4, 1)
        await asyncio.sleep(20)
        assert 10 <= len(rig.troubles) <= 21
        server.state = "up"
        await task
        rig.settled()

    in_virtual_time(scenario)


def test_who_is_not_to_wait_shares_the_next_probe() -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=3)
        server.state = "refused"
        with pytest.raises(RemoteUnavailable, match="nobody"):
            await rig.read()
        assert len(rig.source.asked) == 4
        begun_s = now_s()
        ends = await asyncio.gather(*(rig.read() for _ in range(20)), return_exceptions=True)
        assert all(isinstance(end, RemoteUnavailable) for end in ends)
        assert now_s() - begun_s <= 1.0
        assert len(rig.source.asked) == 5
        assert rig.fetcher.counters.errors == 21
        server.state = "up"
        assert await rig.read() <= 1.1
        rig.settled()

    in_virtual_time(scenario)


def test_the_first_to_ask_is_somebody_who_waits() -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=0)
        server.state = "refused"
        ahead = Ticket(Priority.READAHEAD)
        tasks = [asyncio.create_task(rig.read(offset_bytes=1, ticket=ahead, keep_on=True))]
        await asyncio.sleep(0.1)
        tasks.append(asyncio.create_task(rig.read(offset_bytes=2, keep_on=True)))
        await asyncio.sleep(10)
        assert {asked.offset_bytes for asked in rig.source.asked[1:]} == {2}
        server.state = "up"
        await asyncio.gather(*tasks)
        rig.settled()

    in_virtual_time(scenario)


def test_a_prober_that_is_cancelled_does_not_take_the_turn_with_it() -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=0)
        server.state = "refused"
        tasks = [asyncio.create_task(rig.read(offset_bytes=n, keep_on=True)) for n in range(30)]
        for task in tasks[:-1]:
            await asyncio.sleep(0.33)
            task.cancel()
        server.state = "up"
        assert await asyncio.wait_for(tasks[-1], 2) > 9
        await asyncio.gather(*tasks, return_exceptions=True)
        rig.settled()

    in_virtual_time(scenario)


def test_retry_after_is_honoured_up_to_a_cap() -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=1)
        server.state, server.retry_after_s = "refused", 7.0
        task = asyncio.create_task(rig.read(keep_on=True))
        await asyncio.sleep(30)
        gaps = [b.at_s - a.at_s for a, b in zip(rig.source.asked, rig.source.asked[1:], strict=False)]
        assert gaps
        assert min(gaps) >= 7
        server.retry_after_s = 1e9
        await asyncio.sleep(10)
        server.state = "up"
        await asyncio.wait_for(task, 61)
        rig.settled()

    in_virtual_time(scenario)


def test_a_refusal_is_a_sign_of_life() -> None:
    """Whoever waits is not kept by a source that answers, though not what was hoped for."""

    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=0)
        server.state = "refused"
        tasks = [asyncio.create_task(rig.read(keep_on=True)) for _ in range(5)]
        await asyncio.sleep(3)
        server.state = "gone"
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 2)
        assert all(isinstance(end, RemoteRefused) for end in ends)
        assert rig.fetcher.health()["state"] == "refused"
        rig.settled()

    in_virtual_time(scenario)


def test_a_middle_box_that_cuts_every_answer_is_slow_not_impossible() -> None:
    async def scenario() -> None:
        cut = RemoteUnavailable("cut")
        rig = Rig(lambda asked: Plan([(0.01, 8192)], cut if asked.length_bytes > 8192 else None), retries=1)
        await rig.read(256 * 1024)
        assert len(rig.source.asked) == 32
        assert rig.troubles == []
        rig.settled()

    in_virtual_time(scenario)


def test_one_byte_at_a_time_is_given_up() -> None:
    async def scenario() -> None:
        rig = Rig(lambda asked: Plan([(0.01, 1)], RemoteUnavailable("cut")), retries=3)
        with pytest.raises(RemoteUnavailable, match="cut"):
            await rig.read()
        assert len(rig.source.asked) == 4
        rig.settled()

    in_virtual_time(scenario)


def test_a_flapping_source_gets_its_retries_back() -> None:
    async def scenario() -> None:
        server = Server()
        rig = Rig(server, retries=3)
        for _ in range(20):
            server.state = "refused"
            task = asyncio.create_task(rig.read())
            await asyncio.sleep(0.5)
            server.state = "up"
            await task
        assert rig.troubles == []
        rig.settled()

    in_virtual_time(scenario)
