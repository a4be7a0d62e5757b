"""A host, its daemon with one volume, and a model of both: for every sector, what a read may bring now, and
what a power cut may leave.

The model: `now` holds the values that a sector may have, one unless writes of it were under way together or
failed; a read says which, for good. `cut` holds those that a power cut may leave: what the sector had when
the last FLUSH was issued that completed, and all that was begun since (I2).
"""

from __future__ import annotations

import random
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import NamedTuple

from tests.cache_rig import layer_rows, read_superblock
from tests.property.daemon import begun
from tests.property.host import Host
from tests.property.volume_daemon import TIMEOUT_S, VolumeDaemon
from tests.property.written_sums import entries, that_do_not_fit
from tierblk.cache import journal
from tierblk.cache.directory import JOURNAL
from tierblk.cache.invariants import (
    LayerRows,
    SlotCounts,
    Violation,
    check,
    check_committed,
    check_index,
    check_session,
)
from tierblk.cache.rows import Entry, entries_of
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, EVICT, PAGE_BYTES, Record
from tierblk.errors import CacheError

SECTOR = 512
BASE_BYTES = 9 * BLOCK_BYTES + 3 * PAGE_BYTES + 5 * SECTOR
DEVICE_BYTES = 13 * BLOCK_BYTES + 2 * PAGE_BYTES + 3 * SECTOR
SECTORS = DEVICE_BYTES // SECTOR
ORIGIN, ZERO = 0, -1
LOOKS = 100
RING_BYTES = 256 << 10  # the least that there can be: it is gone round soon
_IMAGE = random.Random(11).randbytes(BASE_BYTES)


@dataclass(frozen=True)
class Op:
    """kind: write, discard, zeroes, flush or read; at, count: sectors; flag: FUA."""

    kind: str
    at: int = 0
    count: int = 0
    flag: bool = False

    @property
    def sectors(self) -> range:
        return range(self.at, min(self.at + self.count, SECTORS))


def sector_bytes(value: int, sector: int, image: bytes) -> bytes:
    if value > 0:
        return struct.pack("<QQ", value, sector) * (SECTOR // 16)
    if value == ORIGIN:
        return image[sector * SECTOR : (sector + 1) * SECTOR].ljust(SECTOR, b"\0")
    return bytes(SECTOR)


class Call(NamedTuple):
    """value: what it writes, 0 for what writes nothing."""

    op: Op
    value: int
    future: Future[object]


class VolumeWorld:
    """slots: of the cache, without the superblock's."""

    def __init__(self, slots: int, *, has_base: bool) -> None:
        self.slots = slots
        self.image = _IMAGE if has_base else b""
        self._path = Path(tempfile.mkdtemp(prefix="tierblk-test-"))
        memory = Path("/dev/shm")
        parent = memory if memory.is_dir() else self._path
        self._memory = Path(tempfile.mkdtemp(prefix="tierblk-test-", dir=parent))
        self.host = Host(self._path, self._memory)
        self.now = [frozenset({ORIGIN})] * SECTORS  # of each sector what a read may bring
        self.cut = list(self.now)  # and after a power cut
        self.values = 0
        self.held: Future[object] | None = None
        self.refused = False
        self.sealed: list[frozenset[int]] | None = None  # `now` as it was at the seal
        self.sealed_pages: set[int] = set()  # those that were dirty then
        self.daemon = VolumeDaemon(self.host, slots + 1, self.image, DEVICE_BYTES, ring_bytes=RING_BYTES)

    def close(self) -> None:
        try:
            self.let_go()
            self.end_epoch()
            self.daemon.hold(False)
            self.verify()
            self.check()
            self.daemon.stop(clean=not self.refused)
        except BaseException:
            with suppress(Exception):
                self.daemon.stop(clean=False)
            raise
        finally:
            shutil.rmtree(self._path)
            shutil.rmtree(self._memory, ignore_errors=True)

    # -- operations ---

    def together(self, ops: Sequence[Op], *, crash: bool = False) -> None:
        """All at once. crash: they are left under way."""
        floor = list(self.now) if any(op.kind == "flush" for op in ops) else None
        stats, records = self.daemon.door.stats(), self._records()
        released = self.daemon.engine.stats()["released"]
        snapshot = self.host.content("slots") if floor else b""
        calls: list[Call] = []
        for op in ops:
            value = 0
            if op.kind in ("write", "discard", "zeroes"):
                if op.kind == "write":
                    self.values += 1
                value = self.values if op.kind == "write" else ZERO
                for sector in self._changed(op):
                    self.now[sector] |= {value}
                    self.cut[sector] |= {value}
            calls.append(Call(op, value, begun(self._do, op, value)))
        if crash:
            return
        self._wait(call.future for call in calls)
        self._settle(calls, released)
        bare = self.daemon.door.stats()["flush_commits"] == stats["flush_commits"] and self.held is None
        if len(ops) == 1 and floor and calls[0].future.exception() is None:
            self._flushed(floor)
            if bare:
                self.host.durable["slots"] = snapshot  # C has synced it, where no gate sees it
        elif any(op.flag or op.kind == "flush" for op in ops) and (bare or self._records() > records):
            self.host.durable["slots"] = self.host.content("slots")  # as C has for FUA
        self.host.durable[JOURNAL] = self.host.content(JOURNAL)

    def _records(self) -> int:
        return self.daemon.door.stats()["flush_records"]

    def _changed(self, op: Op) -> range:
        """A DISCARD is of whole pages."""
        if op.kind != "discard":
            return op.sectors
        per_page = PAGE_BYTES // SECTOR
        stop = op.sectors.stop if op.sectors.stop == SECTORS else op.sectors.stop // per_page * per_page
        return range(-(-op.at // per_page) * per_page, stop)

    def _wait(self, calls: Iterable[Future[object]]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        left = set(calls)
        while left:
            _, left = wait(left, 0.05)
            if left and self.held is not None and self.daemon.engine.stats()["needy"]:
                self.let_go()  # a write waits for the slots that this commit will free
            if left and self.sealed is not None and self.daemon.engine.stats()["needy"]:
                self.end_epoch()  # or for those that this epoch has
            if left and time.monotonic() > deadline:
                raise AssertionError(f"a hang: {self.daemon.engine.stats()} {self.daemon.door.stats()}")

    def _settle(self, calls: list[Call], released: int) -> None:
        self._look_refused()
        written: dict[int, set[int]] = {}
        for op, value, future in calls:
            error = future.exception()
            if op.kind == "read":
                assert error is None, error
                self._judge(op, future.result(), narrow=False)
            elif error is not None:
                assert isinstance(error, OSError), repr(error)
                assert error.errno == ENOSPC or self.refused, f"{op}: {error!r}"
                if error.errno == ENOSPC:
                    self._is_full(released)
            elif op.kind != "flush":
                for sector in self._changed(op):
                    written.setdefault(sector, set()).add(value)
        failed = {
            sector
            for op, value, future in calls
            if value and future.exception() is not None
            for sector in self._changed(op)
        }
        for sector, fresh in written.items():
            if sector not in failed:
                self.now[sector] = frozenset(fresh)
        for op, _, future in calls:  # FUA: its own sectors are durable, or what others wrote over them
            if op.kind in ("write", "zeroes") and op.flag and future.exception() is None:
                for sector in self._changed(op):
                    self.cut[sector] = self.now[sector]

    def _do(self, op: Op, value: int) -> object:
        door, at, length = self.daemon.door, op.at * SECTOR, len(op.sectors) * SECTOR
        if op.kind == "read":
            return door.read(at, length)
        if op.kind == "write":
            data = b"".join(sector_bytes(value, sector, self.image) for sector in op.sectors)
            door.write(at, data, fua=op.flag)
        elif op.kind == "discard":
            door.discard(at, length)
        elif op.kind == "zeroes":
            door.write_zeroes(at, length, fua=op.flag)
        else:
            door.flush()
        return None

    def _judge(self, op: Op, found: object, *, narrow: bool) -> None:
        """I1. narrow: nothing else is under way, so what was read is what it is."""
        assert isinstance(found, bytes)
        for i, sector in enumerate(op.sectors):
            data = found[i * SECTOR : (i + 1) * SECTOR]
            fits = frozenset(
                value for value in self.now[sector] if sector_bytes(value, sector, self.image) == data
            )
            if not fits:
                raise AssertionError(
                    f"I1: sector {sector} (block {sector // 128}, page {sector % 128 // 8}) may have "
                    f"{sorted(self.now[sector])}, and has {data[:16].hex()}; {self._entry(sector // 128)}"
                )
            if narrow:
                self.now[sector] = fits

    def _entry(self, block: int) -> str:
        found = [rows for rows in layer_rows(self.daemon.cache) if rows.kind != "base"]
        return f"{found} {block}"[:300]

    def _flushed(self, floor: list[frozenset[int]]) -> None:
        """I2: of what was complete when it was issued, nothing older can come back."""
        self.cut = list(floor)

    def _is_full(self, released: int) -> None:
        """ENOSPC is right only when every slot held what nobody else has.

        released: as it was before; a slot that a discard beside it freed may be a fill's by now.
        """
        stats = self.daemon.engine.stats()
        dirty = sum(
            1
            for rows in layer_rows(self.daemon.cache)
            if rows.kind != "base"
            for entry in _entries(rows)
            if entry.cached & entry.dirty
        )
        freed = stats["free"] + stats["quarantined"] + stats["released"] - released
        kept = dirty + stats["pinned"]  # what only a sealed epoch has cannot go either
        assert kept + stats["bad"] + freed >= self.slots, (dirty, stats)

    def read_behind(self, read: Op, write: Op) -> None:
        """The read's fetches begin and wait; the write is through before they go on."""
        if self.held is not None:
            self.let_go()
        self.daemon.hold(True)
        before = list(self.now)
        reading = begun(self._do, read, 0)
        self.together([write])
        self.daemon.hold(False)
        self._wait([reading])
        after, self.now = self.now, [old | new for old, new in zip(before, self.now, strict=True)]
        self._judge(read, reading.result(), narrow=False)
        self.now = after

    def flush_if_it_does_not_wait(self) -> None:
        """While a commit is held a FLUSH waits for the next one; one that does not has made its promise."""
        floor, snapshot = list(self.now), self.host.content("slots")
        flush = begun(self._do, Op("flush"), 0)
        waits = self.daemon.door.stats()["flush_commits"]
        while not flush.done() and self.daemon.door.stats()["flush_commits"] == waits:
            if self.daemon.door.stats()["active"] and self.daemon.door.stats()["waiting"]:
                return
        if flush.done() and flush.exception() is None:
            self.host.durable["slots"] = snapshot
            self.host.durable[JOURNAL] = self.host.content(JOURNAL)
            self._flushed(floor)

    def verify(self) -> None:
        """Reads all of it."""
        per_call = 700
        for at in range(0, SECTORS, per_call):
            op = Op("read", at, min(per_call, SECTORS - at))
            call = begun(self._do, op, 0)
            self._wait([call])
            self._judge(op, call.result(), narrow=True)

    # -- commits ---

    def commit(self, *, hold: str | None = None, failing: str | None = None) -> None:
        if self.held is not None:
            self.let_go()
            return
        cycle = self.daemon.begin_commit(hold, failing)
        while hold and not cycle.done() and not self.daemon.gate.held.wait(0.001):
            pass
        if hold and not cycle.done():
            self.held = cycle
            return
        self._end(cycle, failing)
        self.daemon.gate.hold = self.daemon.gate.failing = None  # it had no rows to write: not the next one's

    def let_go(self, failing: str | None = None) -> None:
        if self.held is not None:
            cycle, self.held = self.held, None
            self.daemon.gate.let_go(failing)
            self._end(cycle, failing)

    def _end(self, cycle: Future[object], failing: str | None) -> None:
        self._wait([cycle])
        error = cycle.exception()
        if error is not None:
            assert isinstance(error, CacheError), repr(error)
            assert failing or self.refused, error
        else:
            assert not self.refused, "R7: a failed sync is the last one of its session"
        self._look_refused()

    def _look_refused(self) -> None:
        """A failure that was meant for one cycle may meet another that the daemon began by itself."""
        self.refused |= self.daemon.cache.committer.refusal is not None

    def evict(self) -> None:
        """Everything that may go. Counted as the upkeep's own, whose end is waited for."""

        def ask() -> None:
            self.daemon.upkeep._evicting_slots += self.slots
            self.daemon.engine.push([Record(EVICT, value=self.slots)])

        self.daemon._on_loop(ask)

    # -- epochs ---

    def settle(self, passes: int) -> None:
        """Checksums behind the writes: two passes make all."""
        for _ in range(passes):
            assert self.daemon.run(self.daemon.cache.settler.turn(10**6)).ended
        assert passes == 1 or self.sealed is not None or not self.daemon.volume.unsummed_blocks()

    def seal(self) -> None:
        if self.sealed is None:
            self.sealed_pages = self._dirty_pages()
            self.daemon._on_loop(self.daemon.volume.seal)
            self.sealed = list(self.now)

    def end_epoch(self) -> None:
        """R10, R11: until now every page that was dirty at the seal can be read as it was then, and no other
        is in the epoch."""
        if self.sealed is None:
            return
        was, self.sealed = self.sealed, None
        pages = self.daemon.sealed_pages()
        assert pages.keys() == self.sealed_pages, f"I9: {sorted(pages.keys() ^ self.sealed_pages)}"
        for page, data in pages.items():
            first = page * PAGE_BYTES // SECTOR
            for sector in range(first, min(first + PAGE_BYTES // SECTOR, SECTORS)):
                found = data[(sector - first) * SECTOR :][:SECTOR]
                fits = any(sector_bytes(value, sector, self.image) == found for value in was[sector])
                assert fits, f"I9: sector {sector} has {found[:16].hex()}, not {sorted(was[sector])}"
        self.daemon._on_loop(self.daemon.volume.end_epoch)

    def _dirty_pages(self) -> set[int]:
        rows = next(rows for rows in layer_rows(self.daemon.cache) if rows.kind == "local")
        return {
            block * 16 + page
            for block, entry in _numbered(rows)
            for page in range(16)
            if entry.dirty >> page & 1
        }

    # -- sessions ---

    def stop(self) -> None:
        self.let_go()
        self.end_epoch()
        self.daemon.quiet(cycle_held=False)
        unsummed = self.daemon.volume.unsummed_blocks()
        if clean := not self.refused:
            self.cut = list(self.now)
        self.daemon.stop(clean=clean)
        self._begin()
        assert not clean or self.daemon.volume.unsummed_blocks() == unsummed, "sums outlive an end in order"

    def crash(self, *, kill: bool, seed: int = 0, ops: Sequence[Op] = ()) -> None:
        """Kill or power cut, in the middle of the operations; then a new daemon, and all of it read."""
        dead = self.daemon
        if ops:
            if self.held is None:
                dead.gate.hold = "rows taken"  # what is copied is of one instant: no cycle ends meanwhile
            self.together(ops, crash=True)
        old_directory, old_run_dir = self.host.directory, self.host.run_dir
        rows = {layer_id: dict(kept) for layer_id, kept in self.host.rows.items()}
        self.host.crash(kill=kill, seed=seed)
        boot, durable = self.host.boot, self.host.durable
        self.host.boot, self.host.durable = boot - 1, dict(durable)
        try:
            with suppress(CacheError):
                dead.stop(clean=False)
        finally:
            self.host.boot, self.host.durable, self.host.rows = boot, durable, rows
        self.held = self.sealed = None
        for path in (old_directory, old_run_dir):
            shutil.rmtree(path)
        if not kill:
            self.now = list(self.cut)
        self._begin()
        if not kill:
            self.cut = list(self.now)
            summed = [
                block for block, entry in entries(self.daemon.engine, self.daemon.volume) if entry.summed
            ]
            assert not summed, "what a power cut left may be older or newer than its sums"

    def _begin(self) -> None:
        self.refused = False
        self.daemon = VolumeDaemon(self.host, self.slots + 1, self.image, DEVICE_BYTES, ring_bytes=RING_BYTES)
        self.host.rows = {
            record.layer_id: dict(self.daemon.cache._index.rows(record.layer_id))
            for record in self.daemon.cache._index.layers()
        }
        self.verify()

    # -- what must hold ---

    def check(self) -> None:
        """Every invariant that rows, slots and counters can show, while no call is under way.

        The daemon may begin a cycle by itself at any moment: what was seen beside one is seen again.
        """
        for _ in range(LOOKS):
            self.daemon.quiet(cycle_held=self.held is not None)
            before = self.daemon.cache.committer._running
            found = self._violations()
            ended = self.held is not None or before is None or before.done()
            if ended and self.daemon.cache.committer._running is before:
                break
        else:
            raise AssertionError("commits without end")
        assert not found, "\n".join(map(str, found))
        assert not (unfit := that_do_not_fit(self.daemon.engine, self.daemon.volume, self.host)), unfit
        door = self.daemon.door.stats()
        assert (door["active"], door["waiting"]) == (0, 0), f"I11: {door}"

    def _violations(self) -> list[Violation]:
        daemon = self.daemon
        live = layer_rows(daemon.cache)
        meta = daemon.cache._index.meta()
        kinds = {rows.layer_id: rows for rows in live}
        index = [
            LayerRows(layer_id, kinds[layer_id].kind, kinds[layer_id].size_bytes, rows)
            for layer_id, rows in self.host.rows.items()
            if layer_id in kinds
        ]
        found = check(live, self.slots + 1) + check(index, self.slots + 1)
        journaled = self._with_journal(index)
        found += check(journaled, self.slots + 1)
        stats = daemon.engine.stats()
        entries = [entry for rows in live for entry in _entries(rows)]
        assert stats["dirty_slots"] == sum(bool(entry.cached & entry.dirty) for entry in entries), stats
        held = SlotCounts(*(stats[name] for name in SlotCounts._fields))
        if self.held is None:
            found += check_index(index, live, held) + check_index(journaled, live, held)
            found += daemon.check()
            if not any(layer.changed() for layer in daemon.engine.layers.values()):
                found += check_committed(index, live)
        found += check_session(read_superblock(self.host.directory), meta.session, meta.clean, running=True)
        return found

    def _with_journal(self, index: list[LayerRows]) -> list[LayerRows]:
        """What the next opening would take for the index."""
        cache = self.daemon.cache
        path = self.host.directory / JOURNAL
        replay = journal.read(path, cache._index, read_superblock(self.host.directory))
        if replay is None:
            return index
        merged = []
        for layer in index:
            rows = {**layer.rows, **replay.rows.get(layer.layer_id, {})}
            kept = {row: packed for row, packed in rows.items() if packed}
            merged.append(LayerRows(layer.layer_id, layer.kind, layer.size_bytes, kept))
        return merged


def _numbered(rows: LayerRows) -> Iterator[tuple[int, Entry]]:
    for row, packed in rows.rows.items():
        yield from enumerate(entries_of(packed), row * ENTRIES_PER_ROW)


def _entries(rows: LayerRows) -> Iterator[Entry]:
    for packed in rows.rows.values():
        yield from entries_of(packed)
