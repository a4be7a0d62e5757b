"""Staging memory, lent in runs of neighbouring blocks so that one GET lands in one piece. Knows numbers, no
memory."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque


class StagingPool:
    """`blocks` places for one block each. First fit; those who wait are served in order, so a large run is
    not starved by small ones."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free: list[tuple[int, int]] = [(0, blocks)]  # (first, count), sorted, never adjacent
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()

    @property
    def free_blocks(self) -> int:
        return sum(count for _, count in self._free)

    async def take(self, count: int) -> int:
        """The first place of a run of `count`; waits until there is one. 1 <= count <= blocks."""
        if not 1 <= count <= self.blocks:
            raise ValueError(f"{count} blocks of staging memory out of {self.blocks}")
        if not self._waiting and (first := self._cut(count)) is not None:
            return first
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result(), count)  # it came while we were being cancelled
            elif (count, future) in self._waiting:  # a `give` since then may have struck it off
                self._waiting.remove((count, future))
                self._serve()
            raise

    def give(self, first: int, count: int) -> None:
        """Give a run back: nothing may write to it any more (R5)."""
        i = bisect_left(self._free, (first, 0))
        if i < len(self._free) and first + count == self._free[i][0]:
            count += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == first:
            i -= 1
            first, count = self._free[i][0], self._free[i][1] + count
            self._free.pop(i)
        self._free.insert(i, (first, count))
        self._serve()

    def _cut(self, count: int) -> int | None:
        for i, (first, length) in enumerate(self._free):
            if length >= count:
                rest = [(first + count, length - count)] if length > count else []
                self._free[i : i + 1] = rest
                return first
        return None

    def _serve(self) -> None:
        while self._waiting:
            count, future = self._waiting[0]
            if not future.done():
                first = self._cut(count)
                if first is None:
                    return
                future.set_result(first)
            self._waiting.popleft()
