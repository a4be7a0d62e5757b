"""Slow answers, silent ones, and the second read beside them; all in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fetcher_rig import CONTENT, Asked, Plan, Rig, in_virtual_time, now_s, quick
from tierblk.errors import RemoteMismatch, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import Priority, Ticket
from tierblk.remote.hedge import Budget

LENGTH = 65536
SILENCE = Plan(end="silence")


class Script:
    """Quick answers, but for those that are put here."""

    def __init__(self) -> None:
        self.odd = list[Plan]()

    def __call__(self, asked: Asked) -> Plan:
        return self.odd.pop(0) if self.odd else quick(asked.length_bytes)


def test_a_slow_answer_is_overtaken() -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script)
        await rig.warm()
        script.odd = [quick(LENGTH, 5.0)]
        assert await rig.read() < 0.05
        counters = rig.fetcher.counters
        assert (counters.hedges, counters.hedges_won, counters.retries) == (1, 1, 0)
        assert not rig.source.asked[-1].anew, "an idle connection is quicker than a new one"
        rig.settled()

    in_virtual_time(scenario)


def test_readahead_spends_no_hedge_until_somebody_waits_for_it() -> None:
    async def scenario() -> None:
        script, ticket = Script(), Ticket(Priority.READAHEAD)
        rig = Rig(script)
        await rig.warm()
        script.odd = [quick(LENGTH, 0.9)]
        assert await rig.read(ticket=ticket) == pytest.approx(0.9)
        assert rig.fetcher.counters.hedges == 0
        script.odd = [quick(LENGTH, 0.9)]
        task = asyncio.create_task(rig.read(ticket=ticket))
        await asyncio.sleep(0.1)
        ticket.priority = Priority.DEMAND
        assert await task < 0.5
        assert rig.fetcher.counters.hedges == 1
        rig.settled()

    in_virtual_time(scenario)


def test_a_slow_answer_that_comes_first_wins() -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script)
        await rig.warm()
        script.odd = [quick(LENGTH, 0.03), quick(LENGTH, 5.0)]
        assert await rig.read() == pytest.approx(0.03)
        counters = rig.fetcher.counters
        assert (counters.hedges, counters.hedges_won) == (1, 0)
        assert counters.fetched_bytes == 401 * LENGTH
        rig.settled()

    in_virtual_time(scenario)


def test_a_body_that_drips_is_no_stall_but_is_overtaken() -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script)
        await rig.warm()
        drip = Plan([(0.01, 1000 * n) for n in range(1, 66)])
        script.odd = [drip]
        assert await rig.read() < 0.1
        assert rig.source.asked[-1].offset_bytes > 0, "what the first one brought is not asked for again"
        script.odd = [drip]
        rig.fetcher._desk.budget = Budget(0)  # nothing may overtake it
        assert await rig.read() == pytest.approx(0.65, abs=0.02)
        rig.settled()

    in_virtual_time(scenario)


def test_the_budget_is_kept_however_slow_all_are() -> None:
    async def scenario() -> None:
        slow = False
        rig = Rig(lambda asked: quick(asked.length_bytes, 0.5 if slow else 0.01), hedge_percent=2)
        await rig.warm()
        slow = True
        for _ in range(100):
            await asyncio.gather(*(rig.read() for _ in range(8)))
        counters = rig.fetcher.counters
        assert counters.hedges <= 0.02 * (counters.requests - counters.hedges)
        rig.settled()

    in_virtual_time(scenario)


def test_no_hedges_without_a_budget_nor_before_what_is_usual_is_known() -> None:
    async def scenario() -> None:
        for percent, reads in ((0, 400), (10, 50)):
            script = Script()
            rig = Rig(script, hedge_percent=percent)
            await rig.warm(reads)
            script.odd = [quick(LENGTH, 0.9)]
            assert await rig.read() == pytest.approx(0.9)
            assert rig.fetcher.counters.hedges == 0

    in_virtual_time(scenario)


@pytest.mark.parametrize("brought", [0, 30_000])
def test_a_swallowed_request_is_asked_again_on_a_new_connection(brought: int) -> None:
    """Nobody else reads, so nothing tells that the source lives."""

    async def scenario() -> None:
        script = Script()
        rig = Rig(script, hedge_percent=0)
        script.odd = [Plan([(0.01, brought)] if brought else [], "silence")]
        assert await rig.read() < 1.2
        assert rig.source.asked[-1].anew
        assert rig.source.asked[-1].offset_bytes == brought
        assert rig.fetcher.counters.retries == 1
        rig.settled()

    in_virtual_time(scenario)


def test_a_second_read_brings_a_megabyte_and_a_new_one_the_rest() -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script)
        script.odd = [SILENCE]
        await rig.read(4 << 20)
        lengths = [asked.length_bytes >> 20 for asked in rig.source.asked]
        assert lengths == [4, 1, 3]
        rig.settled()

    in_virtual_time(scenario)


def test_a_slow_source_is_listened_to() -> None:
    """An answer that takes longer than any patience still comes: the first read goes on beside the probes."""

    async def scenario() -> None:
        rig = Rig(lambda asked: quick(asked.length_bytes, 20.0))
        assert await rig.read() == pytest.approx(20.0)
        assert len(rig.source.asked) <= 30, "about one more a second"
        assert rig.source.most_running <= 3
        rig.settled()

    in_virtual_time(scenario)


def test_a_connection_that_died_while_others_live_is_replaced() -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script, hedge_percent=0)
        script.odd = [SILENCE]
        lost = asyncio.create_task(rig.read())
        while not lost.done():
            await rig.read(offset_bytes=100_000)
        assert await lost < 1.1
        assert sum(asked.anew for asked in rig.source.asked) == 1
        rig.settled()

    in_virtual_time(scenario)


def test_an_answer_that_is_always_slow_is_not_replaced_for_ever() -> None:
    """Others are quick: each time it is replaced it gets twice the patience."""

    async def scenario() -> None:
        def answer(asked: Asked) -> Plan:
            return quick(asked.length_bytes, 6.0 if asked.offset_bytes == 0 else 0.01)

        rig = Rig(answer, hedge_percent=0)
        slow = asyncio.create_task(rig.read())
        while not slow.done():
            await rig.read(offset_bytes=100_000)
        assert await slow < 20.0
        rig.settled()

    in_virtual_time(scenario)


@pytest.mark.parametrize("at_s", [0.005, 0.025, 0.5, 1.005, 1.5, 2.5])
def test_cancelled_with_a_second_read_beside(at_s: float) -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script)
        await rig.warm()
        script.odd = [SILENCE] * 10
        task = asyncio.create_task(rig.read())
        await asyncio.sleep(at_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        rig.settled()
        script.odd.clear()
        await rig.read()

    in_virtual_time(scenario)


def test_an_answer_that_does_not_fit_is_asked_for_once_more_on_a_new_connection() -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script)
        script.odd = [Plan(end=RemoteMismatch("gzip"))]
        assert await rig.read() < 0.1
        assert [asked.anew for asked in rig.source.asked] == [False, True]
        script.odd = [Plan(end=RemoteMismatch("gzip"))] * 2
        with pytest.raises(RemoteRefused, match="gzip"):
            await rig.read()
        assert rig.fetcher.health()["state"] == "refused"
        await rig.read()
        assert rig.fetcher.health()["state"] == "ok"
        rig.settled()

    in_virtual_time(scenario)


STEP = st.tuples(st.sampled_from([0.0, 0.005, 0.03, 0.4, 1.3]), st.integers(1, 70_000))
END = st.sampled_from([None, "silence", "busy", "gzip"])


@settings(max_examples=80, deadline=None)
@given(
    plans=st.lists(st.tuples(st.lists(STEP, max_size=4), END), max_size=14),
    readers=st.integers(1, 4),
    cancel_s=st.sampled_from([None, 0.0, 0.031, 1.01, 1.7]),
    usual=st.booleans(),
)
def test_whatever_comes_bytes_are_right_and_nothing_is_left(
    plans: list[tuple[list[tuple[float, int]], str | None]],
    readers: int,
    cancel_s: float | None,
    usual: bool,
) -> None:
    async def scenario() -> None:
        script = Script()
        rig = Rig(script, max_requests=2, hedge_percent=10)
        if usual:
            await rig.warm(150)
        errors: dict[str, TierblkError | str] = {
            "busy": RemoteUnavailable("busy"),
            "gzip": RemoteMismatch("gzip"),
            "silence": "silence",
        }
        for steps, end in plans:
            counts = sorted(count for _, count in steps)
            done = bool(counts) and counts[-1] >= LENGTH and end is None
            timed = [(after_s, count) for (after_s, _), count in zip(steps, counts, strict=True)]
            script.odd.append(Plan(timed, None if done else errors.get(end or "silence")))
        tasks = [asyncio.create_task(rig.read(LENGTH, n * LENGTH, keep_on=True)) for n in range(readers)]
        if cancel_s is not None:
            await asyncio.sleep(cancel_s)
            tasks[0].cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end_of in ends:
            assert isinstance(end_of, float | RemoteMismatch | asyncio.CancelledError)
        rig.settled()
        script.odd.clear()
        await rig.read()
        assert now_s() < 2000

    assert len(CONTENT) > 5 * LENGTH
    in_virtual_time(scenario)
