"""The commit cycle: the only writer of rows (DESIGN 6, R6, R7).

    1. the batch of freed slots is closed; changed rows are taken, each cleared before it is copied; no record
       of the journal is begun meanwhile, so that those before it say nothing that the copies do not; behind
       the last of them what volumes in object storage have to say is taken, at one instant (R13)
    2. slots and sums are synced                data before the index that names it (I5)
    3. one LMDB transaction, synced             exactly the copies of step 1, and what volumes said
    4. the closed batch of slots is free        I4: the rows that named them are gone for good

One cycle at a time. Who asks while one runs shares the next, never the running one: its copies may be older
than what he wants to be kept. A cycle that fails puts its rows back and frees nothing; after a failed sync no
cycle is tried again, since the kernel reports a lost write once and would then call the next sync a success.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from tierblk.cache.index import Index
from tierblk.cache.layers import VolumeChange
from tierblk.core import Engine, Layer
from tierblk.errors import CacheError

# Rows taken at a time, so that the event loop is not held for long: about a millisecond. Few at first, for a
# FLUSH seldom finds many, and room for many costs more than they do.
FIRST_ROWS, BATCH_ROWS = 16, 1024

_UNSYNCED = (
    "the cache's slots could not be synced ({}); nothing more is recorded until the daemon is restarted"
)


class VolumeSource(Protocol):
    """What a volume in object storage wants to be durable beside its rows: its state and its extents. All of
    it is asked on the event loop."""

    def is_changed(self) -> bool:
        """Whether `take` would give something."""
        ...

    def take(self) -> VolumeChange | None:
        """What has changed since the last time; None: nothing. It is asked once a cycle, behind the rows, so
        that extents are never older than the rows that name their pages as clean (R13)."""
        ...

    def put_back(self, change: VolumeChange) -> None:
        """The cycle failed: what it took, the last thing that was taken, has changed again."""
        ...


@dataclass(slots=True)
class _Taken:
    """What step 1 took: copies of rows, and of volumes by layer id who gave what."""

    rows: dict[Layer, dict[int, bytes]] = field(default_factory=dict)
    volumes: dict[int, tuple[VolumeSource, VolumeChange]] = field(default_factory=dict)

    def put_back(self) -> None:
        for layer, rows in self.rows.items():
            layer.put_back(rows)
        for source, change in self.volumes.values():
            source.put_back(change)


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What one cycle made durable."""

    rows_written: int
    rows_deleted: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class CommitFailure:
    """Why nothing is recorded at present: since when (Unix time), and whether only a restart helps (R7)."""

    reason: str
    since: float
    final: bool


class Committer:
    """Runs commit cycles for one cache. Engine calls are made on the event loop, what blocks in a thread of
    its own.

    layers: all layers of the engine, asked for at every cycle; so are volumes, by layer id those that have
    more to say than their rows. sync_slots and sync_sums get the descriptor and raise OSError when bytes may
    be lost; tests put a failing disk there.
    """

    def __init__(
        self,
        engine: Engine,
        layers: Callable[[], Iterable[Layer]],
        volumes: Callable[[], Mapping[int, VolumeSource]],
        index: Index,
        slots_fd: int,
        sums_fd: int,
    ) -> None:
        self._engine = engine
        self._layers = layers
        self._volumes = volumes
        self._index = index
        self._slots_fd = slots_fd
        self._sums_fd = sums_fd
        self.sync_slots: Callable[[int], None] = os.fdatasync
        self.sync_sums: Callable[[int], None] = os.fsync
        self._executor = ThreadPoolExecutor(1, "tierblk-commit")
        self._running: asyncio.Task[CommitReport] | None = None
        self._next: asyncio.Task[CommitReport] | None = None
        self._journaled = 0  # as the index says
        self._refusal: str | None = None
        self._failure: CommitFailure | None = None
        self._stopped = False

    @property
    def refusal(self) -> str | None:
        """Why no commit is tried any more; None while they are. A sync that failed in C counts (R7): the
        kernel said so there, and would not say it again here."""
        if self._refusal is None and not self._stopped and self._engine.flushes_failed():
            self._refusal = _UNSYNCED.format("a FLUSH could not be made durable")
        return self._refusal or self._index.broken

    @property
    def failure(self) -> CommitFailure | None:
        """How the last cycle failed and the first of those that failed with it; None when it did not."""
        if (
            reason := self.refusal
        ) is not None:  # the index may have been broken by another change than a commit
            since = self._failure.since if self._failure else time.time()
            self._failure = CommitFailure(reason, since, final=True)
        return self._failure

    async def commit(self) -> CommitReport:
        """A whole cycle that begins after this call. CacheError when it failed or none is tried any more
        (R7).

        A caller that is cancelled does not stop the cycle, which others may share.
        """
        self._refuse()
        if self._stopped:
            raise CacheError("the cache is closed")
        if self._next is None:
            self._next = asyncio.create_task(self._cycle_after(self._running), name="commit")
            self._next.add_done_callback(_retrieve)
        return await asyncio.shield(self._next)

    async def stop(self) -> None:
        """Waits for cycles that were asked for; later ones are refused."""
        self._stopped = True
        pending = [task for task in (self._running, self._next) if task is not None]
        if pending:
            await asyncio.wait(pending)
        self._executor.shutdown()

    def _refuse(self) -> None:
        if (reason := self.refusal) is not None:
            raise CacheError(reason)

    async def _cycle_after(self, previous: asyncio.Task[CommitReport] | None) -> CommitReport:
        if previous is not None:
            await asyncio.wait([previous])
        self._running, self._next = (
            self._next,
            None,
        )  # from here on, whoever asks gets the cycle after this one
        self._refuse()
        return await self._cycle()

    async def _cycle(self) -> CommitReport:
        started_s = time.monotonic()
        taken = _Taken()
        self._engine.commit_begin()
        try:
            for layer in list(self._layers()):
                await self._take(layer, taken.rows.setdefault(layer, {}))
            # Behind the last row: a page that one of them calls clean is in these extents.
            for layer_id, source in self._volumes().items():
                if (change := source.take()) is not None:
                    taken.volumes[layer_id] = source, change
            journaled = self._engine.commit_taken()
            loop = asyncio.get_running_loop()
            written, deleted = await loop.run_in_executor(self._executor, self._persist, taken, journaled)
        except BaseException as error:
            taken.put_back()
            self._engine.commit_end(False)
            if self.refusal is not None:
                self._engine.fail_flushes()
            if isinstance(error, Exception):
                since = self._failure.since if self._failure else time.time()
                self._failure = CommitFailure(str(error), since, final=self.refusal is not None)
            raise
        self._engine.commit_end(True)
        self._failure = None
        return CommitReport(written, deleted, time.monotonic() - started_s)

    async def _take(self, layer: Layer, rows: dict[int, bytes]) -> None:
        """All rows that were changed before step 1, and maybe later ones; of a row taken twice the later
        copy.
        """
        most = FIRST_ROWS
        while layer.changed():
            batch = layer.take_changed(most)
            rows.update(batch)
            if len(batch) < most:
                return
            most = BATCH_ROWS
            await asyncio.sleep(0)  # misses are served between batches

    def _persist(self, taken: _Taken, journaled: int) -> tuple[int, int]:
        """Steps 2 and 3, in the executor."""
        self._refuse()
        try:
            self.sync_slots(self._slots_fd)
            self.sync_sums(self._sums_fd)
        except OSError as error:
            self._engine.fail_flushes()  # at once: C would take the next sync's success for this one's
            self._refusal = _UNSYNCED.format(error.strerror)
            raise CacheError(self._refusal) from None
        copies = {layer.layer_id: list(rows.items()) for layer, rows in taken.rows.items() if rows}
        volumes = {layer_id: change for layer_id, (_, change) in taken.volumes.items()}
        if not copies and not volumes and journaled == self._journaled:
            return 0, 0
        counts = self._index.write_rows(copies, journaled, volumes)
        self._journaled = journaled
        return counts


def _retrieve(task: asyncio.Task[CommitReport]) -> None:
    """A failure that no caller waits for any more has been told to those who did."""
    if not task.cancelled():
        task.exception()
