"""Places in flight, caps, and demand before readahead; in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.fetcher_rig import in_virtual_time, now_s
from tierblk.remote.pace import Places, Priority, Ticket


def places(count: int, **caps: float) -> Places:
    return Places(count, asyncio.get_running_loop().time, **caps)


def ahead() -> Ticket:
    return Ticket(Priority.READAHEAD)


class Crowd:
    """Requests that write down when they got their place, and give it back when told."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.order = list[str]()
        self.at_s = list[float]()
        self.gates = dict[str, asyncio.Event]()
        self.tasks = dict[str, asyncio.Task[None]]()

    async def come(self, name: str, ticket: Ticket | None = None, length_bytes: int = 1) -> None:
        self.gates[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, ticket, length_bytes))
        await asyncio.sleep(0)

    async def _run(self, name: str, ticket: Ticket | None, length_bytes: int) -> None:
        await self.places.take(length_bytes, ticket)
        self.order.append(name)
        self.at_s.append(now_s())
        await self.gates[name].wait()
        self.places.give(ticket)

    async def let_go(self, name: str) -> None:
        self.gates[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def end(self) -> None:
        for gate in self.gates.values():
            gate.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def test_demand_passes_readahead_that_waits() -> None:
    async def scenario() -> None:
        crowd = Crowd(places(1))
        await crowd.come("first")
        await crowd.come("ahead", ahead())
        await crowd.come("demand")
        await crowd.let_go("first")
        assert crowd.order == ["first", "demand"]
        await crowd.let_go("demand")
        assert crowd.order[2:] == ["ahead"]
        await crowd.end()

    in_virtual_time(scenario)


def test_a_ticket_raised_while_it_waits_goes_with_the_demand() -> None:
    async def scenario() -> None:
        crowd, ticket = Crowd(places(1)), ahead()
        await crowd.come("first")
        await crowd.come("other", ahead())
        await crowd.come("raised", ticket)
        ticket.priority = Priority.DEMAND
        await crowd.let_go("first")
        assert crowd.order == ["first", "raised"]
        await crowd.end()
        assert crowd.order == ["first", "raised", "other"]

    in_virtual_time(scenario)


def test_readahead_leaves_places_for_demand() -> None:
    async def scenario() -> None:
        crowd, tickets = Crowd(places(8)), [ahead() for _ in range(10)]
        for n, ticket in enumerate(tickets):
            await crowd.come(f"ahead {n}", ticket)
        assert len(crowd.order) == 6
        await crowd.come("demand")
        assert crowd.order[-1] == "demand"
        tickets[0].priority = Priority.DEMAND  # it is in flight, and readahead no more
        await asyncio.sleep(0)
        assert crowd.order[-1] == "ahead 6"
        await crowd.end()
        assert crowd.places._free == 8
        assert not crowd.places._ahead

    in_virtual_time(scenario)


def test_a_cancelled_waiter_is_passed_over() -> None:
    async def scenario() -> None:
        crowd = Crowd(places(1))
        for name in ("first", "gone", "last"):
            await crowd.come(name)
        crowd.tasks["gone"].cancel()
        await crowd.let_go("first")
        assert crowd.order == ["first", "last"]
        await crowd.end()
        assert crowd.places._free == 1

    in_virtual_time(scenario)


def test_a_place_that_came_with_the_cancellation_goes_to_the_next() -> None:
    async def scenario() -> None:
        crowd = Crowd(places(1))
        for name in ("first", "gone", "last"):
            await crowd.come(name)
        crowd.places.give()  # in the name of the first
        crowd.tasks["gone"].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert crowd.order == ["first", "last"]
        crowd.tasks["first"].cancel()
        await crowd.end()

    in_virtual_time(scenario)


@pytest.mark.parametrize(
    ("caps", "length_bytes"), [({"request_rate": 50}, 1), ({"bandwidth": 500_000}, 10_000)]
)
@pytest.mark.parametrize("priority", Priority)
def test_a_cap_is_kept(caps: dict[str, float], length_bytes: int, priority: Priority) -> None:
    """50 requests a second, either way."""

    async def scenario() -> None:
        limited = places(32, **caps)
        begun_s = now_s()

        async def one() -> None:
            ticket = Ticket(priority)
            await limited.take(length_bytes, ticket)
            limited.give(ticket)

        await asyncio.gather(*(one() for _ in range(1000)))
        assert 19.5 <= now_s() - begun_s <= 20.1

    in_virtual_time(scenario)


def test_what_never_came_is_not_counted() -> None:
    async def scenario() -> None:
        limited, begun_s = places(32, bandwidth=1000), now_s()
        for _ in range(100):
            await limited.take(5000)
            limited.give(None, 5000)
        assert now_s() == begun_s

    in_virtual_time(scenario)


def test_demand_does_not_wait_for_what_readahead_took() -> None:
    async def scenario() -> None:
        limited, ticket = places(32, bandwidth=1_000_000), ahead()
        await limited.take(8 << 20, ticket)
        limited.give(ticket)
        begun_s = now_s()
        await limited.take(65536)
        limited.give()
        assert now_s() == begun_s
        await limited.take(1, ticket)  # while readahead pays it back
        limited.give(ticket)
        assert now_s() - begun_s > 8

    in_virtual_time(scenario)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(Priority), st.integers(1, 50_000), st.sampled_from(["", "raise", "cancel"])
        ),
        max_size=40,
    ),
    st.integers(1, 9),
    st.booleans(),
)
@example([(Priority.DEMAND, length, "cancel") for length in (1601, 50_000, 50_000, 1)], 1, True)
def test_everybody_gets_a_place_and_gives_it_back(
    requests: list[tuple[Priority, int, str]], count: int, capped: bool
) -> None:
    async def scenario() -> None:
        caps = {"bandwidth": 400_000.0, "request_rate": 30.0} if capped else {}
        limited, in_flight = places(count, **caps), 0

        async def one(ticket: Ticket, length_bytes: int) -> None:
            nonlocal in_flight
            await limited.take(length_bytes, ticket)
            in_flight += 1
            assert in_flight <= count
            try:
                await asyncio.sleep(0.01)
            finally:
                in_flight -= 1
                limited.give(ticket)

        tasks = list[asyncio.Task[None]]()
        for priority, length_bytes, fate in requests:
            ticket = Ticket(priority)
            tasks.append(asyncio.create_task(one(ticket, length_bytes)))
            await asyncio.sleep(0.001)
            if fate == "cancel":
                tasks[-1].cancel()
            elif fate == "raise":
                ticket.priority = Priority.DEMAND
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        assert (limited._free, limited.waiting, limited._ahead) == (count, 0, set())
        assert limited._timer is None

    in_virtual_time(scenario)
