"""A host, its daemon, and a model of both in memory: what is cached, what may fail, and what must hold."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.cache_rig import layer_rows, read_superblock
from tests.property.daemon import DOORS, STAGING_BLOCKS, Daemon, Place
from tests.property.host import Host
from tests.property.images import IMAGES, is_zero, page_of, pages_in, valid_pages
from tierblk.cache.invariants import (
    LayerRows,
    SlotCounts,
    check,
    check_committed,
    check_index,
    check_session,
)
from tierblk.cache.rows import Entry, entries_of
from tierblk.cache.start import StartMode
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, PAGE_BYTES, crc32c
from tierblk.errors import CacheError

Known = dict[Place, tuple[int, int]]  # block -> masks of its pages in a slot, and of its pages of zeros
_SUMS = 64  # bytes a slot


class World:
    """slots: of the cache, without the superblock's. Everything here ends with the invariants checked."""

    def __init__(self, slots: int, dio_align_bytes: int | None = None) -> None:
        self.slots = slots
        self._dio_align_bytes = dio_align_bytes
        self._path = Path(tempfile.mkdtemp(prefix="tierblk-test-"))
        memory = Path("/dev/shm")
        self._memory = Path(
            tempfile.mkdtemp(prefix="tierblk-test-", dir=memory if memory.is_dir() else self._path)
        )
        self.host = Host(self._path, self._memory)
        self.known: Known = {}
        self.refused = False  # a sync has failed: this session commits nothing any more (R7)
        self.read_errors_expected = False
        self.daemon = self._open()

    def _open(self) -> Daemon:
        return Daemon(self.host, self.slots + 1, self._dio_align_bytes)

    def close(self) -> None:
        """The end of a trace: everything under way comes to its end, and the session to a clean one."""
        try:
            self.reopen_doors()
            self.finish()
            self.check()
            self.daemon.stop(clean=not self.refused)
        except BaseException:
            with suppress(Exception):  # a trace that fails is run again, often: its files and threads go
                self.daemon.stop(clean=False)
            raise
        finally:
            shutil.rmtree(self._path)
            shutil.rmtree(self._memory, ignore_errors=True)

    # -- what is under way ---

    def settle(self) -> None:
        """Nothing happens by itself any more, and the model knows what has."""
        self.daemon.settle()
        self.learn()
        self.judge()

    def finish(self) -> None:
        self.daemon.finish()
        self.learn()
        self.judge()
        assert not self.daemon.readings

    def judge(self) -> None:
        """Reads that have ended brought the right bytes (I1), or an error that they may end in."""
        left = []
        for reading in self.daemon.readings:
            if not reading.future.done():
                left.append(reading)
            elif (error := reading.future.exception()) is None:
                image = IMAGES[reading.door[0]]
                assert reading.future.result() == image[reading.offset : reading.offset + reading.length], (
                    f"I1: wrong bytes for {reading}"
                )
            else:
                assert isinstance(error, OSError), repr(error)
                assert error.errno in reading.allowed, f"{error!r} for {reading}"
        self.daemon.readings = left

    def learn(self) -> None:
        """What ended fills must have brought into the cache: no page that was not handed over (I6), and each
        that was if there was a slot."""
        for ended in self.daemon.ended:
            ask, place = ended.ask, ended.ask.place
            cached, zero = self.known.get(place, (0, 0))
            new = ask.staged & ~(cached | zero)
            if ask.sent:
                assert (ended.result, ended.pages) == (-ask.sent, 0), f"I6: kept of a failed fill: {ended}"
                continue
            if (
                ended.result == 1
            ):  # passed through: no slot was free, or half of staging memory waited for the disk
                assert ended.pages == 0, ended
                assert (
                    self.daemon.engine.free_slots() == 0 or len(self.daemon.ended) >= STAGING_BLOCKS // 2
                ), ended
                continue
            assert ended.result == 0, f"an error that nobody made: {ended}"
            assert ended.pages == new, f"I6, I7: kept {ended.pages:#x} of {new:#x}: {ended}"
            if new == valid_pages(*place) and is_zero(*place):
                zero |= new
            else:
                cached |= new
            if cached | zero:
                self.known[place] = cached, zero
        self.daemon.ended.clear()

    def learn_rushed(self) -> None:
        """After steps that raced: what is cached is what the maps say, if all of it was brought."""
        brought = {place: cached | zero for place, (cached, zero) in self.known.items()}
        for ended in self.daemon.ended:
            if not ended.ask.sent and ended.result == 0:
                place = ended.ask.place
                brought[place] = brought.get(place, 0) | ended.pages
                assert not ended.pages & ~ended.ask.staged, f"I6: {ended}"
        self.daemon.ended.clear()
        self.known = known_of(entries(layer_rows(self.daemon.cache), self.daemon.names))
        for place, (cached, zero) in self.known.items():
            assert not (cached | zero) & ~brought.get(place, 0), (
                f"I6: nobody brought that: {place} {cached:#x}"
            )

    # -- the life of a session ---

    def reopen_doors(self) -> None:
        for door in DOORS:
            if door in self.daemon.drained:
                self.daemon.close_door(door)
                self.judge()
            if door not in self.daemon.doors:
                self.daemon.open_door(door)

    def evict(self, count: int) -> int:
        """With nothing under way but fills that wait for us, exactly what may go goes."""
        may_go = sum(
            1 for place, (cached, _) in self.known.items() if cached and place not in self.daemon.asked
        )
        gone = self.daemon.evict(count)
        assert gone == min(count, may_go), f"{gone} of {may_go} blocks went, {count} were asked for"
        self.forget(gone)
        return gone

    def forget(self, gone: int) -> None:
        """Drops from the model what an eviction has taken: whole blocks that no fill was under way for."""
        now = entries(layer_rows(self.daemon.cache), self.daemon.names)
        lost = [
            place
            for place, (cached, _) in self.known.items()
            if cached and not now.get(place, Entry()).cached
        ]
        assert len(lost) == gone, f"{gone} blocks were evicted, {lost} are gone"
        assert not set(lost) & self.daemon.asked.keys(), "R2: evicted while it was being filled"
        for place in lost:
            del self.known[place]

    def commit(self, *, hold: str | None = None, failing: str | None = None) -> None:
        """A cycle, to its end or to the point where it is held."""
        self._cycle(lambda: self.daemon.begin_commit(hold, failing), failing)

    def let_go(self, failing: str | None = None) -> None:
        self._cycle(lambda: self.daemon.end_commit(failing), failing)

    def _cycle(self, step: Callable[[], None], failing: str | None) -> None:
        before, refused = self.daemon.engine.quarantined_slots(), self.refused
        try:
            step()
        except CacheError:
            assert failing or self.refused
            self.refused |= failing in ("slots", "sums")
            assert self.daemon.engine.quarantined_slots() == before, "R7: a failed cycle frees nothing"
        else:
            assert not refused, "R7: a failed sync is the last one of its session"

    def stop(self) -> None:
        """A clean stop, and a start: nothing is lost, whatever waited for a fill ends."""
        self.daemon.settle()
        self.learn()
        clean = not self.refused
        self.daemon.stop(clean=clean)
        self.judge()
        self._begin(StartMode.CLEAN if clean else StartMode.WARM)

    def crash(self, *, kill: bool, seed: int = 0, backup: int | None = None) -> None:
        """Kill or power cut, now; then a new daemon. backup: what is put back before, an index or slots of an
        earlier session: the new daemon then trusts nothing (R8)."""
        dead = self.daemon
        dead.poll()
        self.learn()
        old_directory, old_run_dir = self.host.directory, self.host.run_dir
        rows = {layer_id: dict(kept) for layer_id, kept in self.host.rows.items()}
        self.host.crash(kill=kill, seed=seed)
        self._bury(dead, rows)
        for path in (old_directory, old_run_dir):
            shutil.rmtree(path)
        if not kill:
            named = {self._image_of(dead, layer_id): kept for layer_id, kept in rows.items()}
            self.known = known_of(
                {
                    (name, row * ENTRIES_PER_ROW + i): entry
                    for name, kept in named.items()
                    for row, packed in kept.items()
                    for i, entry in enumerate(entries_of(packed))
                }
            )
        mode = StartMode.WARM if kill else StartMode.UNCLEAN
        if backup is not None and self.host.backups:
            chosen = self.host.backups[backup % len(self.host.backups)]
            self.host.restore(chosen)
            if (
                chosen.what == "slots"
            ):  # its sessions are counted again: a second backup could pass for one of them
                self.host.backups = [kept for kept in self.host.backups if kept.session <= chosen.session]
            self.known, mode = {}, StartMode.DISCARDED
        self._begin(mode)

    def _bury(self, dead: Daemon, rows: dict[int, dict[int, bytes]]) -> None:
        """Ends the crashed daemon, where nobody looks any more."""
        boot, durable = self.host.boot, self.host.durable
        self.host.boot, self.host.durable = boot - 1, dict(durable)
        try:
            dead.stop(clean=False)
        finally:
            self.host.boot, self.host.durable, self.host.rows = boot, durable, rows

    def _image_of(self, daemon: Daemon, layer_id: int) -> str:
        return daemon.names[layer_id]

    def _begin(self, mode: StartMode) -> None:
        """The next session. It backs up what the last one left, for later."""
        if len(self.host.backups) < 6 and mode is not StartMode.DISCARDED:
            self.host.take_backup("index" if len(self.host.backups) % 2 == 0 else "slots")
        self.refused = False
        self.daemon = self._open()
        self.host.rows = {
            layer_id: dict(self.daemon.cache._index.rows(layer_id)) for layer_id in self.daemon.names
        }
        if self.known or mode in (StartMode.CLEAN, StartMode.DISCARDED):
            assert self.daemon.cache.start_mode is mode, (self.daemon.cache.start_mode, mode)

    # -- what must hold ---

    def check(self) -> None:
        """Every invariant that rows, slots, sums, counters and the model can show. After `settle`."""
        daemon = self.daemon
        live = layer_rows(daemon.cache)
        found = check(live, self.slots + 1) + check(self.index_rows(), self.slots + 1)
        counts = daemon.engine.stats()
        held = SlotCounts(*(counts[name] for name in SlotCounts._fields))
        found += check_index(self.index_rows(), live, held)  # I4 at any crash that may come now
        if not daemon.committing:
            found += daemon.cache.check()
            if not any(layer.changed() for layer in daemon.layers.values()):
                found += check_committed(self.index_rows(), live)  # R6
        found += check_session(
            read_superblock(self.host.directory),
            daemon.cache._index.meta().session,
            daemon.cache._index.meta().clean,
            running=True,
        )
        assert not found, "\n".join(map(str, found))
        now = entries(live, daemon.names)
        assert known_of(now) == self.known, "R1, I6: the maps are not what was brought and kept"
        self._check_bytes("live", now, self.host.content("slots"), self.host.content("sums"))
        indexed = entries(self.index_rows(), daemon.names)
        durable = self.host.durable
        self._check_bytes("index", indexed, self.host.content("slots"), self.host.content("sums"))
        self._check_bytes("durable index", indexed, durable["slots"], durable["sums"])  # I5
        self._check_counters()

    def index_rows(self) -> list[LayerRows]:
        """What the durable index says, as LMDB itself tells it."""
        rows = []
        for layer_id, name in self.daemon.names.items():
            stored = dict(self.daemon.cache._index.rows(layer_id))
            assert stored == self.host.rows.get(layer_id, {}), "R6: the index holds what no cycle has written"
            rows.append(LayerRows(layer_id, "base", len(IMAGES[name]), stored))
        return rows

    def _check_bytes(self, what: str, found: dict[Place, Entry], slots: bytes, sums: bytes) -> None:
        """I5: every page that is called cached is in its slot, with its sum."""
        for place, entry in found.items():
            assert not entry.zero or is_zero(*place), (what, place, entry)
            for page in pages_in(entry.cached):
                at, expected = entry.slot * BLOCK_BYTES + page * PAGE_BYTES, page_of(*place, page)
                assert slots[at : at + PAGE_BYTES] == expected, (
                    f"I5 {what}: page {page} of {place} in {entry}"
                )
                at = entry.slot * _SUMS + page * 4
                kept = int.from_bytes(sums[at : at + 4], "little")
                assert kept == crc32c(expected), f"I5 {what}: the sum of page {page} of {place} in {entry}"

    def _check_counters(self) -> None:
        """I11: every request that was made is under way or was completed, once, and one kind of each."""
        for name, door in self.daemon.doors.items():
            stats = door.stats()
            kinds = ("errors", "hit_requests", "zero_requests", "miss_requests")
            assert stats["requests"] == sum(stats[kind] for kind in kinds), (name, stats)
            left = sum(len(reading.blocks) for reading in self.daemon.readings if reading.door == name)
            assert stats["active"] == stats["waiting"] <= left, f"I11: {name} {stats}"
            assert stats["requests"] + left >= self.daemon.pieces[name], f"I11: {name} {stats}"
        assert self.daemon.engine.stats()["fills"] == len(self.daemon.asked)


def entries(layers: list[LayerRows], names: dict[int, str]) -> dict[Place, Entry]:
    """The entries that hold anything, by block."""

    def walk() -> Iterator[tuple[Place, Entry]]:
        for layer in layers:
            for row, packed in layer.rows.items():
                for i, entry in enumerate(entries_of(packed)):
                    if any(entry):
                        yield (names[layer.layer_id], row * ENTRIES_PER_ROW + i), entry

    return dict(walk())


def known_of(found: dict[Place, Entry]) -> Known:
    return {place: (entry.cached, entry.zero) for place, entry in found.items() if entry.cached or entry.zero}
