"""Staging memory: runs are lent once, waiters served in order, and a waiter that gives up loses nothing."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.staging import StagingPool


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_runs_are_neighbouring_and_lent_once() -> None:
    pool = StagingPool(8)
    assert [await pool.take(3), await pool.take(2), await pool.take(3)] == [(0, 3), (3, 2), (5, 3)]
    assert pool.free_blocks == 0
    pool.give(3, 2)
    pool.give(0, 3)
    assert await pool.take(5) == (0, 5)
    pool.give(0, 5)
    pool.give(5, 3)
    assert await pool.take(8) == (0, 8)


@pytest.mark.parametrize("count", [0, 9])
async def test_a_run_that_can_never_be_had_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="out of 8"):
        await StagingPool(8).take(count)


async def test_waiters_are_served_in_order_so_a_large_run_is_not_starved() -> None:
    pool = StagingPool(8)
    held = [await pool.take(4), await pool.take(4)]
    large, small = asyncio.create_task(pool.take(8)), asyncio.create_task(pool.take(1))
    await turns()
    pool.give(*held[0])
    await turns()
    assert not large.done()
    assert not small.done()
    pool.give(*held[1])
    await turns()
    assert large.result() == (0, 8)
    assert not small.done()
    pool.give(0, 8)
    assert await small == (0, 1)


async def test_places_that_are_held_here_and_there_do_not_block_a_large_run() -> None:
    """What is waited for takes the longest run that there is; readahead waits for all of its own."""
    pool = StagingPool(128)
    whole = await pool.take(128)
    for first in range(0, 128, 16):
        pool.give(first + 1, 15)  # 8 places stay with whoever waits for a remote that is away
    assert whole == (0, 128)
    assert await pool.take(64) == (1, 15)
    ahead, next_one = asyncio.create_task(pool.take(20, ahead=True)), asyncio.create_task(pool.take(1))
    assert await next_one == (17, 1)
    await turns()
    assert not ahead.done()
    ahead.cancel()


async def test_no_small_piece_is_taken_while_little_is_free() -> None:
    pool = StagingPool(64)
    held = await pool.take(64)
    waiter = asyncio.create_task(pool.take(32))
    for first in range(0, 30, 2):
        pool.give(first, 1)
    await turns()
    assert not waiter.done()
    pool.give(40, 1)
    assert await waiter == (0, 1)  # as much as it takes to be worth a request is free, in pieces
    assert held == (0, 64)


async def test_a_cancelled_waiter_lets_the_next_one_pass() -> None:
    pool = StagingPool(4)
    held = await pool.take(3)
    large, small = asyncio.create_task(pool.take(4)), asyncio.create_task(pool.take(1))
    await turns()
    large.cancel()
    assert await small == (3, 1)
    assert large.cancelled()
    pool.give(*held)
    pool.give(3, 1)
    assert pool.free_blocks == 4


async def test_a_run_that_comes_at_the_moment_of_the_cancel_is_given_back() -> None:
    pool = StagingPool(4)
    held = await pool.take(4)
    waiter = asyncio.create_task(pool.take(2))
    await turns()
    pool.give(*held)
    waiter.cancel()
    await turns()
    assert waiter.cancelled()
    assert pool.free_blocks == 4


async def test_memory_that_comes_just_after_the_cancel_is_no_error() -> None:
    pool = StagingPool(4)
    held = await pool.take(4)
    waiter = asyncio.create_task(pool.take(2))
    await turns()
    waiter.cancel()
    pool.give(*held)
    await asyncio.wait([waiter])
    assert waiter.cancelled()  # and not dead of a bug, which is what a daemon's log would say
    assert pool.free_blocks == 4


@given(st.data())
async def test_whatever_the_order_nothing_is_lent_twice_or_lost(data: st.DataObject) -> None:
    pool = StagingPool(8)
    tasks: list[asyncio.Task[tuple[int, int]]] = []
    held: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["take", "give", "cancel", "turn"]))
        if step == "take":
            count = data.draw(st.integers(1, 8))
            ahead = count <= pool.ahead_blocks and data.draw(st.booleans())
            tasks.append(asyncio.create_task(pool.take(count, ahead=ahead)))
        elif step == "give" and held:
            pool.give(*held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif step == "cancel" and tasks:
            tasks[data.draw(st.integers(0, len(tasks) - 1))].cancel()
        elif step == "turn":
            await turns(data.draw(st.integers(1, 3)))
        for task in [task for task in tasks if task.done()]:
            tasks.remove(task)
            if not task.cancelled():
                held.append(task.result())
        places = [place for first, count in held for place in range(first, first + count)]
        assert len(places) == len(set(places))
        assert all(0 <= place < 8 for place in places)
    for task in tasks:
        task.cancel()
    await turns()
    for run in held:
        pool.give(*run)
    for task in tasks:
        if not task.cancelled():
            pool.give(*task.result())
    assert pool.free_blocks == 8
