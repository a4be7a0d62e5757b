"""Misses in, bytes out: a batch of MISS becomes a few GETs, and what arrives goes to the engine page by
page.

The engine sends one MISS per block until its FILLED (I7), so single flight needs nothing here.
Neighbouring misses become one window, fetched into one run of staging memory; each page is passed on
(FILL) as soon as it has come, so that a reader waits for its own pages and not for the window. A place is
lent again only when its block is FILLED and complete, or the fetch has ended: then neither the network nor
the engine can touch it (R5).

How much is fetched beyond what was asked is decided in readahead.py. What is fetched ahead comes back
from the engine as misses that nobody waits for; when somebody does (WAITED), the fetch is as urgent as
any. When the last one who waited has left (LEFT), it is fetched ahead again, or given up if the remote is in
trouble: what nobody waits for holds no place through an outage.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from errno import EIO

from tierblk.core import (
    BLOCK_BYTES,
    FAIL,
    FILL,
    FILL_PART,
    FILL_WHOLE,
    FILL_WHOLE_MORE,
    FILLED,
    GIVE_UP,
    LEFT,
    MISS,
    PAGE_BYTES,
    PAGES_PER_BLOCK,
    PREFETCH,
    READ_ON,
    WAITED,
    Engine,
    Record,
)
from tierblk.errors import RemoteUnavailable, TierblkError
from tierblk.layer import Filled
from tierblk.readahead import Ahead, Streams
from tierblk.remote import Priority
from tierblk.staging import StagingPool
from tierblk.window import Need, Window, plan

log = logging.getLogger(__name__)

_STREAMS_MAX_SHARE = 4
"""A window of readahead is at most this part of the staging memory, so that several readers have theirs."""

_CACHE_SHARE = 16
"""And at most this part of the cache: what is fetched ahead pushes other blocks out."""

_EDGES = 1 | 1 << (PAGES_PER_BLOCK - 1)
"""The first and the last page of a block."""

_LOOK_S = 1.0
"""How often the remote of what nobody waits for any more is looked at."""

_IDLE_S = 5.0
"""With nothing fetched for so long, staging memory is given back to the system."""


class Fills:
    """Everything between MISS and FILLED. All of it runs on the event loop."""

    def __init__(
        self, engine: Engine, bases: Mapping[int, Filled], max_window_blocks: int, *, readahead: bool = True
    ) -> None:
        """bases: by layer id, kept current by the owner."""
        self._engine = engine
        self._bases = bases
        self._pool = StagingPool(len(engine.staging) // BLOCK_BYTES)
        self._max_window_blocks = max(1, min(max_window_blocks, self._pool.ahead_blocks))
        share = min(self._pool.blocks // _STREAMS_MAX_SHARE, engine.slot_count // _CACHE_SHARE)
        self._ahead_blocks = min(self._max_window_blocks, share) if readahead else 0
        self._streams: dict[int, tuple[Filled, Streams]] = {}  # by layer id
        self._asked: list[Record] = []  # misses that are not planned yet
        self._windows: dict[int, Window | None] = {}  # by token; None: not planned, or refused
        self._tasks: dict[asyncio.Task[None], Window] = {}
        self._places: list[int] = []  # to be given back at the end of a batch, in as few runs as they make
        self._left: set[Window] = set()  # those that nobody waits for any more
        self._looker: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._trimmer: asyncio.TimerHandle | None = None
        self.slot_write_failure: str | None = None

    # -- events of the engine ---

    def take(self, events: Sequence[Record]) -> list[Record]:
        """What Engine.poll brought: does what is about fills, and returns the rest."""
        misses: list[Record] = []
        rest: list[Record] = []
        for event in events:
            if event.kind == MISS:
                misses.append(event)
            elif event.kind == FILLED:
                self.filled(event)
            elif event.kind == WAITED:
                # Its MISS was told before, and may be in this very batch.
                self.miss(misses)
                misses = []
                self.waited(event)
            elif event.kind == LEFT:
                self.miss(misses)
                misses = []
                self.left(event)
            elif event.kind == READ_ON:
                self.read_on(event)
            else:
                rest.append(event)
        self.miss(misses)
        self._give_places()
        if any(event.kind == FILLED for event in events):
            self._look_idle()
        return rest

    def miss(self, events: Sequence[Record]) -> None:
        """A batch of MISS events. Those that reach to the edge of their block are planned two turns of the
        loop later: a large request comes as one miss a block, and those that are still on their way belong to
        the same window."""
        if not events:
            return
        self._windows.update((event.token, None) for event in events)
        is_planned_soon = bool(self._asked)
        self._asked += events
        if is_planned_soon:
            return
        if any(event.pages & _EDGES for event in events):
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._plan)
        else:
            self._plan()

    def waited(self, event: Record) -> None:
        """A WAITED event: a fill that was begun for nobody has somebody who waits."""
        window = self._windows.get(event.token)
        if window is None:
            self._ask_again(event.token, ahead=False)
            return
        window.waited.add(event.block)
        self._left.discard(window)
        if window.is_ahead:
            window.ticket.priority = Priority.DEMAND
            if window.first_place is None:
                self._pool.hurry(window)

    def left(self, event: Record) -> None:
        """A LEFT event: nobody waits any more for a fill that somebody waited for."""
        window = self._windows.get(event.token)
        if window is None:
            self._ask_again(event.token, ahead=True)
            return
        window.waited.discard(event.block)
        if window.waited or not window.fetching:
            return
        window.ticket.priority = Priority.READAHEAD
        self._left.add(window)
        self._look_at_left()

    def _look_at_left(self) -> None:
        """Gives up what nobody waits for any more, if it has no place yet or its remote is in trouble; and
        looks again later, for trouble is noticed after a while."""
        if self._looker is not None:
            self._looker.cancel()
        for window in list(self._left):
            if window.first_place is None or window.base.health()["state"] != "ok":
                self._left.discard(window)
                window.given_up = True
                assert window.task is not None
                window.task.cancel()
        later = asyncio.get_running_loop().call_later
        self._looker = later(_LOOK_S, self._look_at_left) if self._left else None

    def _ask_again(self, token: int, *, ahead: bool) -> None:
        """A miss that is not planned yet is another now."""
        for i, asked in enumerate(self._asked):
            if asked.token == token:
                self._asked[i] = asked._replace(result=int(ahead))

    def read_on(self, event: Record) -> None:
        """A READ_ON event: a reader has come to what was fetched ahead of it."""
        if event.layer in self._streams:
            self._prefetch(event.layer, self._streams[event.layer][1].read_on(event.block))

    def filled(self, event: Record) -> None:
        """A FILLED event: the engine is done with that block's staging memory."""
        if event.token not in self._windows:
            log.error("a fill ended that nobody asked for: %s", event)
            return
        window = self._windows.pop(event.token)
        if window is not None:
            if event.result < 0 and event.block not in window.failed:
                self._slot_write_failed(-event.result)
            elif event.result == 0 and event.pages:
                self.slot_write_failure = None
            if window.first_place is not None:
                place = window.first_place + event.block - window.blocks.start
                places = self._places if window.may_lend_again(event.block) else window.kept_places
                places.append(place)

    def _give_places(self) -> None:
        """Places that are free again, neighbours together."""
        places, self._places = sorted(self._places), []
        begin = 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] != places[i - 1] + 1:
                self._pool.give(places[begin], i - begin)
                begin = i

    # -- stopping ---

    async def stop(self, layer_id: int | None = None) -> None:
        """End all fetches, or those of one layer; returns when none can write to staging memory any more.
        Their FILLED events are still to come. The layer's base is taken out of `bases` before, so that a
        miss that comes later is refused and begins nothing anew."""
        for layer in [layer_id] if layer_id is not None else list(self._streams):
            self._streams.pop(layer, None)
        unplanned = [event for event in self._asked if layer_id in (None, event.layer)]
        self._asked = [event for event in self._asked if event not in unplanned]
        self._refuse(unplanned)
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
            if self._trimmer is not None:
                self._trimmer.cancel()
                self._trimmer = None
        else:
            self._idle.set()
            if self._trimmer is None:
                self._trimmer = asyncio.get_running_loop().call_later(_IDLE_S, self._trim)

    def _trim(self) -> None:
        self._trimmer = None
        if not self._windows and self._pool.free_blocks == self._pool.blocks:
            self._engine.trim_staging()

    def close(self) -> None:
        """No timer is left behind; the engine may go."""
        if self._looker is not None:
            self._looker.cancel()
            self._looker = None
        if self._trimmer is not None:
            self._trimmer.cancel()
            self._trimmer = None

    @property
    def busy(self) -> int:
        """Blocks between MISS and FILLED."""
        return len(self._windows)

    @property
    def free_staging_blocks(self) -> int:
        return self._pool.free_blocks

    # -- planning ---

    def _plan(self) -> None:
        asked, self._asked = self._asked, []
        by_layer: dict[int, list[Record]] = {}
        for event in asked:
            by_layer.setdefault(event.layer, []).append(event)
        for layer_id, events in by_layer.items():
            base = self._bases.get(layer_id)
            if base is None:  # its last device went while the miss was under way
                self._refuse(events)
                continue
            streams = self._streams_of(base)
            needs = [Need(e.block, e.token, e.pages, e.value, ahead=e.result == 1) for e in events]
            windows, ahead = plan(needs, streams, self._max_window_blocks, base.size_bytes)
            for window_of in windows:
                self._start(Window(base, window_of))
            for next_window in ahead:
                self._prefetch(layer_id, next_window)

    def _refuse(self, events: Sequence[Record]) -> None:
        self._engine.push(Record(FAIL, token=event.token, result=-EIO) for event in events)

    def _streams_of(self, base: Filled) -> Streams:
        found = self._streams.get(base.layer.layer_id)
        if found is None or found[0] is not base:
            found = (base, Streams(base.layer.blocks, self._ahead_blocks))
            self._streams[base.layer.layer_id] = found
        return found[1]

    def _prefetch(self, layer_id: int, ahead: Ahead | None) -> None:
        if ahead is not None:
            self._engine.push(
                [Record(PREFETCH, layer=layer_id, block=ahead.first, value=ahead.count, pages=0)]
            )

    # -- fetching ---

    def _start(self, window: Window) -> None:
        for token in window.tokens:
            self._windows[token] = window
        task = asyncio.create_task(self._fetch(window), name=f"fetch {window.blocks}")
        window.task = task
        self._tasks[task] = window  # asyncio itself holds tasks weakly
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        window = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fetch died of a bug: %r", error, exc_info=error)
        window.fetching = False
        self._left.discard(window)
        self._fail_rest(window, EIO)  # a task that was cancelled before its first step has told nobody
        self._places += window.kept_places
        window.kept_places = []
        self._give_places()

    async def _take_place(self, window: Window) -> int:
        """The first place of its run; what has no room there becomes a window of its own."""
        run = None if window.is_ahead else self._pool.try_take(len(window.blocks))
        if run is None:
            run = await self._pool.take(len(window.blocks), ahead=window.is_ahead, owner=window)
        first, count = run
        if count < len(window.blocks):
            self._start(window.split(count))
        return first

    async def _fetch(self, window: Window) -> None:
        window.first_place = place = await self._take_place(window)
        at = place * BLOCK_BYTES + window.first_page % PAGES_PER_BLOCK * PAGE_BYTES
        buffer = self._engine.staging[at : at + window.length_bytes]
        base = window.base
        try:
            await base.fetcher.fetch(
                window.start_bytes,
                buffer,
                lambda count: self._pass_on(window, count),
                ticket=window.ticket,
                on_trouble=lambda error: self._trouble(window, error),
                keep_on=self._keep_on(window),
            )
        except TierblkError as error:
            base.failed(error)
            # Whoever came late has patience left: he asks anew. Those whose patience is over the engine ends.
            late = isinstance(error, RemoteUnavailable) and base.patience_s > 0
            self._fail_rest(window, error.errno, ask_anew=late)
        else:
            base.worked()

    def _keep_on(self, window: Window) -> Callable[[], bool]:
        """Whether to go on trying when the retries are used up: as long as the most patient device of the
        base is, and not for what nobody waits for."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        return lambda: not window.is_ahead and clock() - began_s < window.base.patience_s

    def _trouble(self, window: Window, error: TierblkError) -> None:
        """The retries are used up, and it goes on: whoever is not to wait so long is told."""
        window.base.failed(error)
        self._engine.push(
            Record(GIVE_UP, token=token, result=-error.errno)
            for token, block in zip(window.tokens, window.blocks, strict=True)
            if block in window.unfilled
        )

    def _pass_on(self, window: Window, arrived_bytes: int) -> None:
        """FILL for every block that has new whole pages among the first `arrived_bytes` of the window."""
        whole = arrived_bytes == window.length_bytes
        pages = -(-arrived_bytes // PAGE_BYTES) if whole else arrived_bytes // PAGE_BYTES
        if pages == window.passed_pages or window.first_place is None:
            return
        stop_page = window.first_page + pages
        first_block = (window.first_page + window.passed_pages) // PAGES_PER_BLOCK
        commands, filled = [], []
        for block in range(first_block, (stop_page - 1) // PAGES_PER_BLOCK + 1):
            i = block - window.blocks.start
            low = max(window.first_page - block * PAGES_PER_BLOCK, 0)
            high = min(stop_page - block * PAGES_PER_BLOCK, PAGES_PER_BLOCK)
            complete = stop_page >= min(window.stop_page, (block + 1) * PAGES_PER_BLOCK)
            more = complete and block + 1 < window.blocks.stop
            if complete:
                filled.append(block)
            commands.append(
                Record(
                    FILL,
                    layer=window.base.layer.layer_id,
                    token=window.tokens[i],
                    block=block,
                    value=(window.first_place + i) * BLOCK_BYTES,
                    result=FILL_WHOLE_MORE if more else FILL_WHOLE if complete else FILL_PART,
                    pages=(1 << high) - (1 << low),
                )
            )
        self._engine.push(commands)
        window.passed_pages = pages
        window.unfilled.difference_update(filled)

    def _fail_rest(self, window: Window, errno: int, *, ask_anew: bool = False) -> None:
        rest, window.unfilled = window.unfilled, set()
        window.failed |= rest
        self._engine.push(
            Record(
                FAIL,
                token=window.tokens[block - window.blocks.start],
                result=-errno,
                # Whoever came meanwhile looks again.
                pages=int(ask_anew or window.is_ahead or window.given_up),
            )
            for block in sorted(rest)
        )

    def _slot_write_failed(self, errno: int) -> None:
        reason = f"writing to the cache failed with errno {errno}: what is fetched is not kept"
        if self.slot_write_failure is None:
            log.error("%s", reason)
        self.slot_write_failure = reason
