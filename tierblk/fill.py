"""Misses in, bytes out: a batch of MISS becomes a few GETs, and what arrives goes to the engine page by page.

The engine sends one MISS per block until its FILLED (I7), so single flight needs nothing here. Neighbouring
misses become one window, fetched into one run of staging memory; each page is passed on (FILL) as soon as it
has come, so that a reader waits for its own pages and not for the window. A run is lent again only when its
fetch has ended and every block of it is FILLED: then neither the network nor the engine can touch it (R5).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from errno import EIO

from tierblk.core import BLOCK_BYTES, FAIL, FILL, PAGE_BYTES, PAGES_PER_BLOCK, Engine, Record
from tierblk.errors import TierblkError
from tierblk.layer import Base
from tierblk.remote import plan_windows
from tierblk.staging import StagingPool

log = logging.getLogger(__name__)


class _Window:
    """Blocks that one fetch brings. `open` are those whose FILLED has not come, `unfilled` those not yet
    complete."""

    def __init__(self, base: Base, blocks: range, tokens: Mapping[int, int]) -> None:
        self.base = base
        self.blocks = blocks
        self.tokens = {block: tokens[block] for block in blocks}
        self.open = len(blocks)
        self.unfilled = set(blocks)
        self.failed: set[int] = set()
        self.first_place: int | None = None
        self.passed_pages = 0
        self.fetching = True

    @property
    def start_bytes(self) -> int:
        return self.blocks.start * BLOCK_BYTES

    @property
    def length_bytes(self) -> int:
        return min(self.blocks.stop * BLOCK_BYTES, self.base.image.size_bytes) - self.start_bytes


class Fills:
    """Everything between MISS and FILLED. All of it runs on the event loop."""

    def __init__(self, engine: Engine, bases: Mapping[int, Base], max_window_blocks: int) -> None:
        """bases: by layer id, kept current by the owner."""
        self._engine = engine
        self._bases = bases
        self._pool = StagingPool(len(engine.staging) // BLOCK_BYTES)
        self._max_window_blocks = min(max_window_blocks, self._pool.blocks)
        self._windows: dict[int, _Window | None] = {}  # by token; None: refused at once
        self._tasks: dict[asyncio.Task[None], _Window] = {}
        self._idle = asyncio.Event()
        self.slot_write_failure: str | None = None

    def miss(self, events: Sequence[Record]) -> None:
        """A batch of MISS events."""
        by_layer: dict[int, dict[int, int]] = {}
        for event in events:
            by_layer.setdefault(event.layer, {})[event.block] = event.token
        for layer_id, tokens in by_layer.items():
            base = self._bases.get(layer_id)
            if base is None:  # its last device went while the miss was under way
                self._windows.update(dict.fromkeys(tokens.values()))
                self._engine.push(Record(FAIL, token=token, result=-EIO) for token in tokens.values())
                continue
            for blocks in plan_windows(list(tokens), self._max_window_blocks):
                self._start(_Window(base, blocks, tokens))

    def filled(self, event: Record) -> None:
        """A FILLED event: the engine is done with that block's staging memory."""
        if event.token not in self._windows:
            log.error("a fill ended that nobody asked for: %s", event)
            return
        window = self._windows.pop(event.token)
        if window is None:
            self._look_idle()
            return
        if event.result < 0 and event.block not in window.failed:
            self._slot_write_failed(-event.result)
        elif event.result == 0 and event.pages:
            self.slot_write_failure = None
        window.open -= 1
        self._release(window)
        self._look_idle()

    async def stop(self, layer_id: int | None = None) -> None:
        """End all fetches, or those of one layer; returns when none can write to staging memory any more.
        Their FILLED events are still to come."""
        tasks = [t for t, w in self._tasks.items() if layer_id in (None, w.base.layer.layer_id)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(self) -> None:
        """Until every MISS has its FILLED, which the engine sends for each, with or without bytes."""
        self._look_idle()
        await self._idle.wait()

    def _look_idle(self) -> None:
        if self._windows:
            self._idle.clear()
        else:
            self._idle.set()

    @property
    def busy(self) -> int:
        """Blocks between MISS and FILLED."""
        return len(self._windows)

    @property
    def free_staging_blocks(self) -> int:
        return self._pool.free_blocks

    def _start(self, window: _Window) -> None:
        for token in window.tokens.values():
            self._windows[token] = window
        task = asyncio.create_task(self._fetch(window), name=f"fetch {window.blocks}")
        self._tasks[task] = window  # asyncio itself holds tasks weakly
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        window = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fetch died of a bug: %r", error, exc_info=error)
        window.fetching = False
        self._fail_rest(window, EIO)  # a task that was cancelled before its first step has told nobody
        self._release(window)

    async def _fetch(self, window: _Window) -> None:
        window.first_place = await self._pool.take(len(window.blocks))
        at = window.first_place * BLOCK_BYTES
        buffer = self._engine.staging[at : at + window.length_bytes]
        try:
            await window.base.fetcher.fetch(
                window.start_bytes, buffer, lambda count: self._pass_on(window, count)
            )
        except TierblkError as error:
            window.base.failed(error)
            self._fail_rest(window, error.errno)
        else:
            window.base.worked()

    def _pass_on(self, window: _Window, arrived_bytes: int) -> None:
        """FILL for every block that has new whole pages among the first `arrived_bytes` of the window."""
        whole = arrived_bytes == window.length_bytes
        pages = -(-arrived_bytes // PAGE_BYTES) if whole else arrived_bytes // PAGE_BYTES
        total_pages = -(-window.length_bytes // PAGE_BYTES)
        if pages == window.passed_pages or window.first_place is None:
            return
        commands = []
        for i in range(window.passed_pages // PAGES_PER_BLOCK, (pages - 1) // PAGES_PER_BLOCK + 1):
            block = window.blocks[i]
            have = min(pages - i * PAGES_PER_BLOCK, PAGES_PER_BLOCK)
            complete = have == min(total_pages - i * PAGES_PER_BLOCK, PAGES_PER_BLOCK)
            if complete:
                window.unfilled.discard(block)
            commands.append(
                Record(
                    FILL,
                    layer=window.base.layer.layer_id,
                    token=window.tokens[block],
                    block=block,
                    value=(window.first_place + i) * BLOCK_BYTES,
                    result=int(complete),
                    pages=(1 << have) - 1,
                )
            )
        window.passed_pages = pages
        self._engine.push(commands)

    def _fail_rest(self, window: _Window, errno: int) -> None:
        rest, window.unfilled = window.unfilled, set()
        window.failed |= rest
        self._engine.push(Record(FAIL, token=window.tokens[block], result=-errno) for block in sorted(rest))

    def _release(self, window: _Window) -> None:
        if window.open == 0 and not window.fetching and window.first_place is not None:
            self._pool.give(window.first_place, len(window.blocks))
            window.first_place = None

    def _slot_write_failed(self, errno: int) -> None:
        reason = f"writing to the cache failed with errno {errno}: what is fetched is not kept"
        if self.slot_write_failure is None:
            log.error("%s", reason)
        self.slot_write_failure = reason
