"""A daemon without its network: the real cache and engine and doors, and the test in Python's place, which
sees every MISS and answers it when and as it likes."""

from __future__ import annotations

import asyncio
import math
import os
import select
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EIO, ESTALE
from typing import Any, TypeVar

from tests.property.gate import Gate
from tests.property.host import Host
from tests.property.images import IMAGES, block_size, page_of, pages_in, valid_pages
from tierblk.cache import Cache
from tierblk.cache.commit import CommitReport
from tierblk.config import CacheSettings
from tierblk.core import (
    BLOCK_BYTES,
    EVICT,
    EVICTED,
    FAIL,
    FILL,
    FILL_WHOLE,
    FILL_WHOLE_MORE,
    FILLED,
    GIVE_UP,
    LEFT,
    MISS,
    NEED_SPACE,
    PAGE_BYTES,
    PREFETCH,
    READ_ON,
    WAITED,
    Engine,
    Layer,
    LocalDoor,
    Record,
)

TIMEOUT_S = float(os.environ.get("TIERBLK_PROPERTY_TIMEOUT_S", "20"))
STAGING_BLOCKS = 32
NO_TOKEN = 0xFFFFFFFF
GARBAGE = b"\xa5" * BLOCK_BYTES
# Two doors to one layer, and depths at which calls wait for a tag.
DOORS = {"a": 3, "a'": 16, "b": 6}
HOT_BYTES = {"a'": 8 * BLOCK_BYTES}
"""Of the doors that have a memory tier."""
T = TypeVar("T")
Place = tuple[str, int]  # image, block


@dataclass
class Ask:
    """A MISS without its FILLED. staged: pages that were handed over; sent: how it was ended, if it was;
    ahead: nobody waits for it yet; given_up: what fail-fast doors get."""

    record: Record
    place: Place
    staging: int | None = None  # in blocks
    staged: int = 0
    sent: int | None = None  # 0: a last FILL; else the errno of a FAIL
    ahead: bool = False
    given_up: int | None = None


@dataclass
class Reading:
    """A read under way. allowed: errors that it may end in, because of what was done since it began."""

    door: str
    offset: int
    length: int
    future: Future[bytes]
    allowed: set[int] = field(default_factory=set)

    @property
    def blocks(self) -> range:
        return range(self.offset // BLOCK_BYTES, (self.offset + self.length - 1) // BLOCK_BYTES + 1)


@dataclass(frozen=True, slots=True)
class Ended:
    """A FILLED: how the engine said that this fill ended."""

    ask: Ask
    result: int
    pages: int


def begun(function: Callable[..., T], *args: Any) -> Future[T]:
    """A call in a thread of its own, which nobody has to wait for: in an engine that forgot a request (I11)
    it never ends, and the trace is to be shown nevertheless."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="read", daemon=True).start()
    return future


class Daemon:
    """One session on a host. Not thread-safe: the test's thread is the event loop's."""

    def __init__(self, host: Host, slots: int, dio_align_bytes: int | None) -> None:
        self.host = host
        self.runner = asyncio.Runner()
        self._dio_align_bytes = dio_align_bytes
        settings = CacheSettings.model_construct(dir=host.directory, size=slots * BLOCK_BYTES)
        try:
            self.cache = Cache.open(settings, host.run_dir, self._make_engine)
        except BaseException:
            self.runner.close()
            raise
        host.durable["slots"] = host.content("slots")  # the superblock's sync covers the whole file
        self.engine = self.cache.engine
        self._events = select.poll()  # a shrinking failure leaves more descriptors behind than select knows
        self._events.register(self.engine.event_fd, select.POLLIN)
        self.gate = Gate(host, self.cache)
        self._committing: asyncio.Task[CommitReport] | None = None
        self.doors: dict[str, LocalDoor] = {}
        self.pieces: dict[str, int] = {}
        self.drained: set[str] = set()
        self.hasty: set[str] = set()  # fail-fast doors
        self.marks: set[Place] = set()  # whose first reader is to be told of
        self.readings: list[Reading] = []
        self.asked: dict[Place, Ask] = {}
        self.ended: list[Ended] = []
        self.old_tokens: list[int] = []
        self.refused: list[Record] = []  # FILLED events of commands that were none of a running fill
        self.evictions: list[int] = []
        self.free_places = list(range(STAGING_BLOCKS))
        self._scribble(range(STAGING_BLOCKS))
        self.layers: dict[str, Layer] = {}
        for name, image in IMAGES.items():
            url = f"http://images.example/{name}.raw"
            self.layers[name] = self.run(self.cache.base_layer(url, len(image), f'etag:"{name}"'))
        self.names = {layer.layer_id: name for name, layer in self.layers.items()}
        for door in DOORS:
            self.open_door(door)

    def _make_engine(self, *, slots_fd: int, slot_count: int, sums_fd: int, dio_align_bytes: int) -> Engine:
        return Engine(
            slots_fd=slots_fd,
            slot_count=slot_count,
            sums_fd=sums_fd,
            staging_bytes=STAGING_BLOCKS * BLOCK_BYTES,
            dio_align_bytes=self._dio_align_bytes or dio_align_bytes,
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    # -- doors and reads ---

    def open_door(self, door: str) -> None:
        self.doors[door] = LocalDoor(
            self.engine, self.layers[door[0]], queue_depth=DOORS[door], hot_bytes=HOT_BYTES.get(door, 0)
        )
        self.pieces[door] = 0
        self.drained.discard(door)
        self.hasty.discard(door)

    def be_hasty(self, door: str, hasty: bool) -> None:
        """From here on its requests end when a fill is given up, or wait for ever again."""
        self.doors[door].set_patience(0 if hasty else math.inf)
        (self.hasty.add if hasty else self.hasty.discard)(door)

    def drain(self, door: str) -> None:
        self.doors[door].drain()
        self.drained.add(door)
        for reading in self.readings:
            if reading.door == door:
                reading.allowed.add(EIO)

    def close_door(self, door: str) -> None:
        """Drained, so that it closes whatever is not answered; its reads have ended."""
        self.drain(door)
        self.until(lambda: all(r.future.done() for r in self.readings if r.door == door))
        stats = self.doors[door].stats()
        assert (stats["requests"], stats["active"], stats["waiting"]) == (self.pieces[door], 0, 0), (
            stats
        )  # I11
        self.doors[door].quit()
        self.doors.pop(door).close()

    def read(self, door: str, offset: int, length: int) -> Reading:
        """Begins a read of an open door."""
        reading = Reading(door, offset, length, begun(self.doors[door].read, offset, length))
        if door in self.drained:
            reading.allowed.add(EIO)
        if door in self.hasty:
            asks = (self.asked.get((door[0], block)) for block in reading.blocks)
            reading.allowed |= {ask.given_up for ask in asks if ask and ask.given_up}
        self.pieces[door] += len(reading.blocks)
        self.readings.append(reading)
        return reading

    # -- events ---

    def poll(self) -> None:
        """Takes what events there are."""
        for event in self.engine.poll():
            if event.kind == MISS:
                place = (self.names[event.layer], event.block)
                assert place not in self.asked, f"I7: a second fill of {place}"
                self.asked[place] = Ask(event, place, ahead=event.result == 1)
            elif event.kind == FILLED:
                self._filled(event)
            elif event.kind == EVICTED:
                self.evictions.append(event.value)
            elif event.kind == WAITED:
                ask = self.asked[self.names[event.layer], event.block]
                assert ask.ahead, f"said twice, or of no readahead: {event}"
                assert ask.record.token == event.token, event
                ask.ahead = False
            elif event.kind == LEFT:
                ask = self.asked[self.names[event.layer], event.block]
                assert not ask.ahead, f"said twice, or of readahead that nobody came to: {event}"
                assert ask.record.token == event.token, event
                ask.ahead = True
            elif event.kind == READ_ON:
                self.marks.remove((self.names[event.layer], event.block))  # told of once
            else:
                assert event.kind == NEED_SPACE

    def _filled(self, event: Record) -> None:
        ask = next((ask for ask in self.asked.values() if ask.record.token == event.token), None)
        if (
            event.result == -ESTALE
        ):  # the answer to a command that is none for a running fill; no test fails with it
            self.refused.append(event)
            return
        assert ask is not None, f"a fill ended twice, or that nobody asked for: {event}"
        assert ask.sent is not None, f"a fill ended by itself: {event}"
        del self.asked[ask.place]
        self.old_tokens.append(event.token)
        if ask.staging is not None:
            self._scribble([ask.staging])  # R5: from here on the memory is somebody else's
            self.free_places.append(ask.staging)
        self.ended.append(Ended(ask, event.result, event.pages))

    def _scribble(self, places: Iterable[int]) -> None:
        for place in places:
            self.engine.staging[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES] = GARBAGE

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for events until the condition holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            self.poll()
            if condition():
                return
            if time.monotonic() > deadline:
                doors = {name: door.stats() for name, door in self.doors.items()}
                raise AssertionError(f"a hang: {self.engine.stats()} {doors} {self.asked} {self.readings}")
            self._events.poll(0.5)

    def settle(self) -> None:
        """Until nothing happens by itself: every command is obeyed, and every request is done or waits for a
        fill that waits for us. What a trace meets next then does not depend on who was faster."""
        self.refused_by_now(NO_TOKEN)

        def is_quiet(name: str) -> bool:
            stats, depth = self.doors[name].stats(), self.doors[name].depth
            issued, active = stats["requests"] + stats["active"], stats["active"]
            if active != stats["waiting"] or (issued != self.pieces[name] and active != depth):
                return False
            # Every read waits for a block that is asked for, or for a tag, or its thread has its bytes.
            return all(
                reading.future.done() or (active and (active == depth or self._is_asked(reading)))
                for reading in self.readings
                if reading.door == name
            )

        self.until(
            lambda: (
                all(map(is_quiet, self.doors))
                and not any(ask.sent is not None for ask in self.asked.values())
                and self.engine.stats()["fills"] == len(self.asked)
            )
        )

    def _is_asked(self, reading: Reading) -> bool:
        return any((reading.door[0], block) in self.asked for block in reading.blocks)

    def refused_by_now(self, token: int) -> list[Record]:
        """Every command so far is obeyed: they are taken in order, and one with a token that no fill can have
        is answered at once. Returns what was refused but that."""
        self.engine.push([Record(FAIL, token=token)])
        self.until(lambda: any(event.token == token for event in self.refused))
        refused = [event for event in self.refused if event.token != token]
        self.refused.clear()
        return refused

    # -- answers ---

    def fill(self, place: Place, pages: int, *, final: bool) -> None:
        """FILL with these pages: their bytes are in staging memory, everywhere else in it is rubbish."""
        self.engine.push([self.fill_record(place, pages, final=final)])

    def fill_record(self, place: Place, pages: int, *, final: bool) -> Record:
        ask, valid = self.asked[place], valid_pages(*place)
        if ask.staging is None:
            ask.staging = self.free_places.pop()
        at = ask.staging * BLOCK_BYTES
        for page in pages_in(pages & valid & ~ask.staged):
            # The last page of a ragged image comes as short as it is: what follows it is rubbish too.
            length = min(PAGE_BYTES, block_size(*place) - page * PAGE_BYTES)
            start = at + page * PAGE_BYTES
            self.engine.staging[start : start + length] = page_of(*place, page)[:length]
        ask.staged |= pages & valid
        if final or ask.staged == valid:
            ask.sent = 0
        return Record(
            FILL, ask.record.layer, ask.record.token, place[1], at, FILL_WHOLE if final else 0, pages
        )

    def fill_window(self, name: str) -> None:
        """Whole blocks, from neighbouring places in staging memory, to be written together."""
        places = [
            place for place, ask in sorted(self.asked.items()) if place[0] == name and ask.staging is None
        ]
        self.free_places.sort()
        free = self.free_places[:1]
        while free and free[-1] + 1 in self.free_places and len(free) < len(places):
            free.append(free[-1] + 1)
        records = []
        for staging, place in zip(free, places, strict=False):
            self.free_places.remove(staging)
            self.asked[place].staging = staging
            records.append(self.fill_record(place, 0xFFFF, final=True)._replace(result=FILL_WHOLE_MORE))
        if records:
            self.engine.push([*records[:-1], records[-1]._replace(result=FILL_WHOLE)])

    def prefetch(self, name: str, block: int, count: int, mark: int | None) -> None:
        """Fills for nobody. mark: the block, counted from the first, whose first reader is told of."""
        if mark is not None and mark < count and block + mark < self.layers[name].blocks:
            self.marks.add((name, block + mark))
        pages = 0xFFFF if mark is None else mark
        layer_id = self.layers[name].layer_id
        self.engine.push([Record(PREFETCH, layer=layer_id, block=block, value=count, pages=pages)])

    def give_up(self, place: Place, errno: int) -> None:
        """Who waits for it at a fail-fast door ends in this error; the fill goes on for the others."""
        ask = self.asked[place]
        ask.given_up = errno
        self.engine.push([Record(GIVE_UP, token=ask.record.token, result=-errno)])
        for reading in self.readings:
            if reading.door in self.hasty and reading.door[0] == place[0] and place[1] in reading.blocks:
                reading.allowed.add(errno)

    def fail(self, place: Place, errno: int) -> None:
        self.asked[place].sent = errno
        self.engine.push([Record(FAIL, token=self.asked[place].record.token, result=-errno)])
        self.allow(place, errno)

    def allow(self, place: Place, errno: int) -> None:
        for reading in self.readings:
            if reading.door[0] == place[0] and place[1] in reading.blocks:
                reading.allowed.add(errno)

    def fill_all(self) -> None:
        """Answers all that is asked, wholly, at once."""
        answered = [place for place, ask in sorted(self.asked.items()) if ask.sent is None]
        for place in answered:
            if self.free_places or self.asked[place].staging is not None:
                self.fill(place, 0xFFFF, final=True)

    def finish(self) -> None:
        """Answers everything until no read is under way, and no fill."""

        def step() -> bool:
            self.fill_all()
            return not self.asked and all(reading.future.done() for reading in self.readings)

        self.until(step)
        self.settle()

    # -- eviction and commits ---

    def evict(self, count: int) -> int:
        """How many blocks went."""
        self.evictions.clear()
        self.engine.push([Record(EVICT, value=count)])
        self.until(lambda: bool(self.evictions))
        (gone,) = self.evictions
        return gone

    @property
    def committing(self) -> bool:
        return self._committing is not None

    def begin_commit(self, hold: str | None = None, failing: str | None = None) -> None:
        """Runs a cycle to the point where it is to be held, or to its end."""
        assert self._committing is None
        self.gate.hold, self.gate.failing = hold, failing

        async def begin() -> None:
            self._committing = asyncio.create_task(self.cache.commit())
            await self._until_held()

        self.run(begin())
        self._look_committed()

    def end_commit(self, failing: str | None = None) -> None:
        """Lets the held cycle go on, to its end."""
        self.gate.let_go(failing)
        self.run(self._until_held())
        self._look_committed()

    async def _until_held(self) -> None:
        assert self._committing is not None
        async with asyncio.timeout(TIMEOUT_S):
            while not self._committing.done() and not self.gate.held.is_set():
                await asyncio.wait([self._committing], timeout=0.0005)

    def _look_committed(self) -> None:
        if self._committing is not None and self._committing.done():
            task, self._committing = self._committing, None
            self.gate.hold = self.gate.failing = None
            task.result()

    # -- the end ---

    def stop(self, *, clean: bool) -> None:
        """Closes doors and cache. Not clean: what a crash left was copied before, this is the rest."""
        if self.committing:
            with suppress(Exception):
                self.end_commit()
        for door in list(self.doors):
            self.close_door(door)
        try:
            self.run(self.cache.close(clean))
        finally:
            self.runner.close()
