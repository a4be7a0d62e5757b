"""Staging memory, lent in runs of neighbouring blocks so that one GET lands in one piece. Knows numbers, no
memory."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

PIECE_BLOCKS = 16
"""What is waited for takes a shorter run than it wants, if that is what there is and so much is free: 1 MiB
at least is asked for in one piece, and places that somebody holds for long, here and there, block nobody."""

_Waiter = tuple[int, asyncio.Future[tuple[int, int]], object]  # count, its run, owner


class StagingPool:
    """`blocks` places for one block each. First fit, else the longest run that there is; those who wait are
    served in order, but those that somebody waits for come before those that are fetched ahead.

    Readahead gets the run that it asks for or none, and may not take the last quarter: a reader that jumps
    does not wait for what nobody reads yet."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free: list[tuple[int, int]] = [(0, blocks)]  # (first, count), sorted, never adjacent
        self._free_blocks = blocks
        self._demand: deque[_Waiter] = deque()
        self._ahead: deque[_Waiter] = deque()

    @property
    def free_blocks(self) -> int:
        return self._free_blocks

    @property
    def ahead_blocks(self) -> int:
        """The most that one run of readahead can have."""
        return self.blocks - self.blocks // 4

    def try_take(self, count: int) -> tuple[int, int] | None:
        """A run (first place, length) of at most `count` for somebody who waits, if nobody else waits
        already."""
        if not 1 <= count <= self.blocks:
            raise ValueError(f"{count} blocks of staging memory out of {self.blocks}")
        return None if self._demand else self._cut_some(count)

    async def take(self, count: int, *, ahead: bool = False, owner: object = None) -> tuple[int, int]:
        """A run (first place, length); waits until there is one. For readahead of `count`, else of at most so
        many. 1 <= count <= blocks, or ahead_blocks. owner: what `hurry` calls it."""
        most = self.ahead_blocks if ahead else self.blocks
        if not 1 <= count <= most:
            raise ValueError(f"{count} blocks of staging memory out of {most}")
        future: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        waiting = self._ahead if ahead else self._demand
        entry = (count, future, owner)
        waiting.append(entry)
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(*future.result())  # it came while we were being cancelled
            else:
                for queue in (self._ahead, self._demand):
                    if entry in queue:  # a `give` since then may have struck it off
                        queue.remove(entry)
                self._serve()
            raise

    def hurry(self, owner: object) -> None:
        """Somebody waits now for what was to be fetched ahead: it goes to the end of what is waited for."""
        for entry in self._ahead:
            if entry[2] is owner:
                self._ahead.remove(entry)
                self._demand.append(entry)
                break
        self._serve()

    def give(self, first: int, count: int) -> None:
        """Give a run back: nothing may write to it any more (R5)."""
        self._free_blocks += count
        i = bisect_left(self._free, (first, 0))
        if i < len(self._free) and first + count == self._free[i][0]:
            count += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == first:
            i -= 1
            first, count = self._free[i][0], self._free[i][1] + count
            self._free.pop(i)
        self._free.insert(i, (first, count))
        self._serve()

    def _cut(self, count: int) -> tuple[int, int] | None:
        for i, (first, length) in enumerate(self._free):
            if length >= count:
                rest = [(first + count, length - count)] if length > count else []
                self._free[i : i + 1] = rest
                self._free_blocks -= count
                return first, count
        return None

    def _cut_some(self, count: int) -> tuple[int, int] | None:
        if self._free_blocks < min(count, PIECE_BLOCKS):
            return None
        return self._cut(min(count, max(length for _, length in self._free)))

    def _cut_ahead(self, count: int) -> tuple[int, int] | None:
        return self._cut(count) if self._free_blocks - count >= self.blocks // 4 else None

    def _serve(self) -> None:
        if self._serve_queue(self._demand, self._cut_some):
            self._serve_queue(self._ahead, self._cut_ahead)

    @staticmethod
    def _serve_queue(queue: deque[_Waiter], cut: Callable[[int], tuple[int, int] | None]) -> bool:
        """Whether nobody of the queue waits any more."""
        while queue:
            count, future, _ = queue[0]
            if not future.done():
                run = cut(count)
                if run is None:
                    return False
                future.set_result(run)
            queue.popleft()
        return True
