"""The real engine on real files, with the test in Python's place: it sees every event and decides every
command."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tierblk.core import (
    BLOCK_BYTES,
    ENTRIES_PER_ROW,
    EVICT,
    EVICTED,
    FAIL,
    FILL,
    FILLED,
    MISS,
    PAGE_BYTES,
    Engine,
    Layer,
    LocalDoor,
    Record,
    map_bytes,
)

TIMEOUT_S = 20.0
NO_TOKEN = 0xFFFFFFFF
_ENTRY = struct.Struct("<IHHHH")


class Rig:
    """One base layer over `image`, `slots` slots (slot 0 included), and a local door.

    asked: MISS events without an answer, by block. index: what a commit made durable, row -> packed.
    """

    def __init__(
        self,
        directory: Path,
        image: bytes,
        slots: int,
        *,
        dio_align_bytes: int = 512,
        map_directory: Path | None = None,
        hot_bytes: int = 0,
    ) -> None:
        self.image = image
        self.slots = slots
        self.dio_align_bytes = dio_align_bytes
        self.hot_bytes = hot_bytes
        self.slots_path, self.sums_path = directory / "slots", directory / "sums"
        # Where the machine has a tmpfs the map is there, as in production.
        if map_directory is None:
            map_directory = memory if (memory := Path("/dev/shm")).is_dir() else directory
        self.map_path = map_directory / f"rig-{os.getpid()}-{id(self):x}.map"
        self.index: dict[int, bytes] = {}
        self.pool = ThreadPoolExecutor(32, "rig-read")
        self._fds: list[int] = []
        for path, size in ((self.slots_path, slots * BLOCK_BYTES), (self.sums_path, slots * 64)):
            path.write_bytes(b"")
            os.truncate(path, size)
        self.start("new")

    def start(self, mode: str) -> None:
        """mode: "new" (nothing cached), "warm" (the map file as it is), "index" (the rows of the last
        commit)."""
        flags = os.O_RDWR | os.O_CLOEXEC
        slots_fd = os.open(self.slots_path, flags | os.O_DIRECT | os.O_NONBLOCK)
        sums_fd = os.open(self.sums_path, flags)
        map_fd = os.open(self.map_path, flags | os.O_CREAT | (0 if mode == "warm" else os.O_TRUNC), 0o600)
        os.ftruncate(map_fd, map_bytes(len(self.image)))
        self._fds = [slots_fd, sums_fd, map_fd]
        self.engine = Engine(
            slots_fd=slots_fd,
            slot_count=self.slots,
            sums_fd=sums_fd,
            staging_bytes=64 * BLOCK_BYTES,
            dio_align_bytes=self.dio_align_bytes,
        )
        self.layer: Layer = self.engine.open_layer(1, map_fd, len(self.image))
        if mode == "warm":
            self.layer.warm_start()
            kept = {entry[0] for entry in self.entries().values()}
            self.layer.put_back(self.index)  # R8: a row of which nothing is left is to be written too
            for packed in self.index.values():
                for slot, *_ in unpack_row(packed):
                    if slot and slot not in kept:
                        self.engine.quarantine(slot)
        elif mode == "index":
            for row, packed in self.index.items():
                self.layer.load_row(row, packed)
        self.engine.finish_load()
        self.door = LocalDoor(self.engine, self.layer, queue_depth=16, hot_bytes=self.hot_bytes)
        self.pieces = 0
        self.refused = False
        self.asked: dict[int, Record] = {}
        self.staged: dict[int, int] = {}
        self.places: dict[int, int] = {}
        self.free_places = list(range(64))
        self.finals: set[int] = set()
        self.results: list[Record] = []
        self.evictions: list[int] = []
        self.told: list[Record] = []

    def read(self, offset: int, length: int) -> Future[bytes]:
        """Begins a read; it may need fills."""
        self.pieces += (offset + length - 1) // BLOCK_BYTES - offset // BLOCK_BYTES + 1
        return self.pool.submit(self.door.read, offset, length)

    def expect(self, offset: int, length: int) -> bytes:
        return self.image[offset : offset + length]

    # -- events ---

    def poll(self) -> None:
        """Takes what events there are."""
        for event in self.engine.poll():
            if event.kind == MISS:
                assert event.block not in self.asked, "I7: one fill per block"
                self.asked[event.block] = event
                self.staged[event.block] = 0
            elif event.kind == FILLED:
                if event.token == NO_TOKEN:
                    self.refused = True
                    continue
                self.results.append(event)
                block = next((b for b, e in self.asked.items() if e.token == event.token), None)
                if block is not None:
                    del self.asked[block]
                    self.staged.pop(block)
                    self.finals.discard(block)
                    if (place := self.places.pop(block, None)) is not None:
                        self.free_places.append(place)
            elif event.kind == EVICTED:
                self.evictions.append(event.value)
            else:
                self.told.append(event)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for events until the condition holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            self.poll()
            if condition():
                return
            assert time.monotonic() < deadline, (
                f"{self.engine.stats()} {self.door.stats()} asked {self.asked}"
            )
            select.select([self.engine.event_fd], [], [], 0.001)

    def settle(self) -> None:
        """Until nothing happens by itself: every command is obeyed, and every request is done or waits for a
        fill that waits for us. What a trace meets next then does not depend on who was faster."""
        self.obeyed()

        def settled() -> bool:
            stats = self.door.stats()
            issued = stats["requests"] + stats["active"]
            return (
                not self.finals
                and stats["active"] == stats["waiting"]
                and (issued == self.pieces or stats["active"] == self.door.depth)
                and self.engine.stats()["fills"] == len(self.asked)
            )

        self.until(settled)

    def obeyed(self) -> None:
        """Until every command so far is obeyed: they are taken in order, and a token that no fill can have is
        answered at once."""
        self.refused = False
        self.engine.push([Record(FAIL, token=NO_TOKEN)])
        self.until(lambda: self.refused)

    # -- answers ---

    def fill(self, block: int, pages: int | None = None, *, final: bool = True) -> None:
        """Answers a MISS with the first `pages` pages of the block (all when None)."""
        event = self.asked[block]
        data = self.image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        total = -(-len(data) // PAGE_BYTES)
        pages = total if pages is None else min(pages, total)
        if block not in self.places:
            self.places[block] = self.free_places.pop()
        at = self.places[block] * BLOCK_BYTES
        count = min(pages * PAGE_BYTES, len(data))
        self.engine.staging[at : at + count] = data[:count]
        if pages == total or final:
            self.finals.add(block)
        self.staged[block] = pages
        mask = (1 << pages) - 1
        self.engine.push(
            [Record(FILL, layer=1, token=event.token, block=block, value=at, result=int(final), pages=mask)]
        )

    def fail(self, block: int, errno: int = 5) -> None:
        self.finals.add(block)
        self.engine.push([Record(FAIL, token=self.asked[block].token, result=-errno)])

    def finish(self, *reads: Future[bytes]) -> None:
        """Answers everything until these reads are done."""

        def step() -> bool:
            for block in list(self.asked):
                if block not in self.finals and (self.free_places or block in self.places):
                    self.fill(block)
            return all(read.done() for read in reads)

        self.until(step)
        self.settle_all()

    def settle_all(self) -> None:
        """Answers what is asked and waits until nothing is under way."""

        def step() -> bool:
            for block in list(self.asked):
                if block not in self.finals and (self.free_places or block in self.places):
                    self.fill(block)
            return not self.asked and not self.door.stats()["active"] and not self.engine.stats()["fills"]

        self.until(step)

    def evict(self, count: int) -> int:
        self.evictions.clear()
        self.engine.push([Record(EVICT, value=count)])
        self.until(lambda: bool(self.evictions))
        return sum(self.evictions)

    def commit(self, ok: bool = True) -> None:
        """R6 with a dictionary for LMDB: the rows taken, or nothing when the cycle fails (R7)."""
        self.engine.commit_begin()
        taken = []
        while batch := self.layer.take_changed(64):
            taken += batch
        if ok:
            os.fdatasync(self._fds[0])
            for row, packed in taken:
                if packed:
                    self.index[row] = packed
                else:
                    self.index.pop(row, None)
        else:
            self.layer.put_back(row for row, _ in taken)
        self.engine.commit_end(ok)

    # -- looking ---

    def entries(self) -> dict[int, tuple[int, int, int, int, int]]:
        """block -> (slot, present, cached, zero, dirty), of blocks that hold anything."""
        found = {}
        for row in range(self.layer.rows):
            for i, entry in enumerate(unpack_row(self.layer.peek_row(row))):
                if any(entry):
                    found[row * ENTRIES_PER_ROW + i] = entry
        return found

    def close_door(self) -> None:
        self.door.drain()
        self.door.quit()
        self.door.close()

    def stop(self) -> None:
        """Ends door and engine; files stay."""
        self.close_door()
        self.engine.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def close(self) -> None:
        if self._fds:
            self.stop()
        self.pool.shutdown()
        self.map_path.unlink(missing_ok=True)


def unpack_row(packed: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(slot, present, cached, zero, dirty) of each of the row's blocks."""
    return _ENTRY.iter_unpack(packed[: ENTRIES_PER_ROW * _ENTRY.size])
