"""A volume in object storage without one: the test answers its misses and says what the store has."""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.engine_rig import NO_TOKEN, TIMEOUT_S, unpack_row
from tierblk.core import (
    BLOCK_BYTES,
    ENTRIES_PER_ROW,
    EVICT,
    EVICTED,
    FAIL,
    FILL,
    FILLED,
    MAP_HEADER_BYTES,
    MISS,
    PAGE_BYTES,
    PAGES_PER_BLOCK,
    Engine,
    LocalDoor,
    Record,
    Sealed,
    map_bytes,
)

BASE, VOLUME = 1, 2
BLOCKS = 8
ALL = (1 << PAGES_PER_BLOCK) - 1
MAP_ENTRY = struct.Struct("<I6H16x")
"""slot, present, cached, zero, dirty, fresh, flags."""
PROBATION = 2
JUNK = b"j" * PAGE_BYTES


class FarRig:
    """store: page number of the volume -> its bytes there. asked: misses without an answer, by layer and
    block. told: other events. fifo: in the place of the slots; what is written to them comes out of it, what
    is read from them is put into it, and a full one lets no write land."""

    def __init__(
        self,
        folder: Path,
        *,
        blocks: int = BLOCKS,
        slots: int = 64,
        base: bytes = b"",
        fifo: bool = False,
        depth: int = 16,
    ) -> None:
        self.slots_path = folder / "slots"
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        if fifo:
            os.mkfifo(self.slots_path)
        else:
            self.slots_path.write_bytes(b"")
            os.truncate(self.slots_path, slots * BLOCK_BYTES)
            flags |= os.O_DIRECT
        self.slots_fd = os.open(self.slots_path, flags)
        self._files = [(folder / name).open("w+b") for name in ("sums", "map", "base-map")]
        size_bytes = blocks * BLOCK_BYTES
        for file, length in zip(
            self._files, (slots * 64, map_bytes(size_bytes), map_bytes(len(base) or 1)), strict=True
        ):
            file.truncate(length)
        self.engine = Engine(
            slots_fd=self.slots_fd,
            slot_count=slots,
            sums_fd=self._files[0].fileno(),
            staging_bytes=64 * BLOCK_BYTES,
        )
        self.image = base
        self.base = self.engine.open_layer(BASE, self._files[2].fileno(), len(base)) if base else None
        self.volume = self.engine.open_layer(VOLUME, self._files[1].fileno(), size_bytes, kind="write-back")
        self.engine.finish_load()
        self.door = LocalDoor(self.engine, self.base, volume=self.volume, queue_depth=depth)
        self.pool = ThreadPoolExecutor(32)
        self.store: dict[int, bytes] = {}
        self.asked: dict[tuple[int, int], Record] = {}
        self.misses = 0
        self.results: list[Record] = []
        self.told: list[Record] = []
        self._places: dict[int, int] = {}
        self._free = list(range(64))
        self._obeyed = False
        self._open = True
        self.calls: list[Future[None] | Future[bytes]] = []

    # -- requests ---

    def read(self, page: int, pages: int = 1) -> Future[bytes]:
        call = self.pool.submit(self.door.read, page * PAGE_BYTES, pages * PAGE_BYTES)
        self.calls.append(call)
        return call

    def write(self, page: int, data: bytes, skew: int = 0) -> Future[None]:
        call = self.pool.submit(self.door.write, page * PAGE_BYTES + skew, data)
        self.calls.append(call)
        return call

    def discard(self, page: int, pages: int = 1) -> Future[None]:
        call = self.pool.submit(self.door.discard, page * PAGE_BYTES, pages * PAGE_BYTES)
        self.calls.append(call)
        return call

    def looked_up(self) -> None:
        """Every call so far is done or waits: the door's thread has taken them in order."""
        wait_for(lambda: self.door.stats()["active"] == sum(not call.done() for call in self.calls))
        last = (self.volume.blocks - 1) * PAGES_PER_BLOCK
        assert self.door.read(last * PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES), (
            "the last block is nobody's"
        )

    def waits(self, count: int) -> None:
        """So many calls wait, for whatever it is, and no more."""
        self.looked_up()
        wait_for(lambda: self.door.stats()["waiting"] == count)

    # -- events ---

    def poll(self) -> None:
        for event in self.engine.poll():
            if event.kind == MISS:
                key = event.layer, event.block
                assert key not in self.asked, "I7: one fill per block"
                self.asked[key] = event
                self.misses += 1
            elif event.kind == FILLED and event.token == NO_TOKEN:
                self._obeyed = True
            elif event.kind == FILLED:
                self.results.append(event)
                self.asked.pop((event.layer, event.block), None)
                if event.token in self._places:
                    self._free.append(self._places.pop(event.token))
            else:
                self.told.append(event)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        self.poll()
        while not holds():
            assert time.monotonic() < deadline_s, f"{self.asked} {self.door.stats()} {self.engine.stats()}"
            select.select([self.engine.event_fd], [], [], 0.001)
            self.poll()

    def obeyed(self) -> None:
        """Until the filler has taken every command so far."""
        self._obeyed = False
        self.engine.push([Record(FAIL, token=NO_TOKEN)])
        self.until(lambda: self._obeyed)

    def miss(self, block: int, layer: int = VOLUME) -> Record:
        self.until(lambda: (layer, block) in self.asked)
        return self.asked[layer, block]

    def ended(self, block: int) -> Record:
        """The end of the fill that was answered last."""
        self.until(lambda: bool(self.results) and (VOLUME, block) not in self.asked)
        return self.results[-1]

    def bytes_of(self, block: int, layer: int = VOLUME) -> bytes:
        """What the store, or the base, has."""
        if layer == BASE:
            return self.image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        first = block * PAGES_PER_BLOCK
        return b"".join(self.store.get(first + n, bytes(PAGE_BYTES)) for n in range(PAGES_PER_BLOCK))

    def fill(
        self, block: int, pages: int = ALL, *, final: bool = True, layer: int = VOLUME, data: bytes = b""
    ) -> None:
        """Answers a miss with `data`, or with what the store or the base has now."""
        event = self.asked[layer, block]
        if event.token not in self._places:
            self._places[event.token] = self._free.pop()
        at = self._places[event.token] * BLOCK_BYTES
        data = data or self.bytes_of(block, layer)
        for page in range(PAGES_PER_BLOCK):
            if pages >> page & 1:
                here = page * PAGE_BYTES
                self.engine.staging[at + here : at + here + PAGE_BYTES] = data[here : here + PAGE_BYTES]
        self.engine.push(
            [Record(FILL, token=event.token, block=block, value=at, result=int(final), pages=pages)]
        )

    def finish(self, *calls: Future[None] | Future[bytes]) -> None:
        """Answers every miss until these are done and no fill runs."""
        answered: set[int] = set()

        def step() -> bool:
            for (layer, block), event in list(self.asked.items()):
                if event.token not in answered:
                    answered.add(event.token)
                    self.fill(block, layer=layer)
            return all(call.done() for call in calls) and not self.asked and not self.engine.stats()["fills"]

        self.until(step)
        for call in calls:
            call.result(TIMEOUT_S)

    def evict(self, slots: int) -> None:
        self.told = [event for event in self.told if event.kind != EVICTED]
        self.engine.push([Record(EVICT, value=slots)])
        self.until(lambda: any(event.kind == EVICTED for event in self.told))

    def commit(self) -> None:
        self.engine.commit_begin()
        while self.volume.take_changed(64):
            pass
        self.engine.commit_end(ok=True)

    # -- the store ---

    def stored(self, pages: dict[int, bytes]) -> None:
        """The store has these pages from now on; the volume learns of it. bytes(PAGE_BYTES): zeros."""
        self.store |= pages
        masks: dict[int, list[int]] = {}
        for page, data in pages.items():
            mask = masks.setdefault(page // PAGES_PER_BLOCK, [0, 0])
            mask[0] |= 1 << page % PAGES_PER_BLOCK
            mask[1] |= (not any(data)) << page % PAGES_PER_BLOCK
        self.volume.learn([Sealed(block, 0, *mask) for block, mask in masks.items()])

    def collect(self) -> list[Sealed]:
        wait_for(lambda: self.volume.collect(4) is True)
        found: list[Sealed] = []
        while blocks := self.volume.sealed(3):
            found += blocks
        return found

    def upload(self, blocks: Sequence[Sealed]) -> bytes:
        """Sealed pages to the store; their sums."""
        with mmap.mmap(-1, max(len(blocks), 1) * BLOCK_BYTES) as memory, memoryview(memory) as buffer:
            count, sums = self.volume.read_sealed(blocks, buffer)
            at = 0
            for block in blocks:
                for n in range(PAGES_PER_BLOCK):
                    if block.zero >> n & 1:
                        self.store[block.block * PAGES_PER_BLOCK + n] = bytes(PAGE_BYTES)
                    elif block.dirty >> n & 1:
                        data = bytes(buffer[at * PAGE_BYTES : (at + 1) * PAGE_BYTES])
                        self.store[block.block * PAGES_PER_BLOCK + n] = data
                        at += 1
            assert at == count
        return sums

    def epoch(self) -> list[Sealed]:
        """A whole one: all that is dirty is in the store."""
        self.volume.seal()
        blocks = self.collect()
        self.volume.clean(blocks, self.upload(blocks))
        self.volume.end_epoch()
        self.commit()
        return blocks

    # -- looking ---

    def masks(self, block: int) -> tuple[int, int, int, int]:
        """present, cached, zero, dirty."""
        return self.entry(block)[1:]

    def entry(self, block: int) -> tuple[int, int, int, int, int]:
        packed = self.volume.peek_row(block // ENTRIES_PER_ROW)
        return list(unpack_row(packed))[block % ENTRIES_PER_ROW] if packed else (0, 0, 0, 0, 0)

    def consistent(self) -> None:
        """I3, I4, and what the masks say of each other; the counts are theirs."""
        cached_pages = dirty_pages = 0
        slots: list[int] = []
        for block in range(self.volume.blocks):
            slot, present, cached, zero, dirty = entry = self.entry(block)
            assert not cached & zero, entry
            assert not (cached | zero) & ~present, entry
            assert not dirty & ~(cached | zero), entry
            assert bool(slot) == bool(cached), entry
            slots += [slot] if slot else []
            cached_pages += cached.bit_count()
            dirty_pages += dirty.bit_count()
        assert len(set(slots)) == len(slots)
        assert self.volume.dirty_pages() == dirty_pages
        assert self.volume.cached_pages() == cached_pages

    def counted(self) -> None:
        """The engine's counts are those of the maps, while nothing is under way: each slot is somebody's
        once, and what eviction goes by is true."""
        counts, used, on_probation = self.engine.stats(), {"volume": 0, "base": 0}, 0
        holding = 0
        for name, layer, file in (("volume", self.volume, 1), ("base", self.base, 2)):
            if layer is None:
                continue
            packed = os.pread(self._files[file].fileno(), layer.blocks * MAP_ENTRY.size, MAP_HEADER_BYTES)
            for slot, _, cached, _, dirty, _, flags in MAP_ENTRY.iter_unpack(packed):
                used[name] += slot != 0
                holding += slot != 0 and cached & dirty != 0
                on_probation += flags & PROBATION != 0
        counts["used"] = used["volume"] + used["base"]
        elsewhere = sum(counts[name] for name in ("free", "quarantined", "pinned", "bad"))
        assert used["volume"] + used["base"] + elsewhere == counts["slots"], counts
        assert counts["volume_slots"] == used["volume"], counts
        assert (counts["dirty_slots"], counts["far_slots"]) == (holding, holding), counts
        assert counts["probation"] == on_probation, counts

    # -- the FIFO ---

    def take(self) -> bytes:
        return os.read(self.slots_fd, PAGE_BYTES)

    def give(self, pages: int = 1) -> None:
        os.write(self.slots_fd, JUNK * pages)

    def stuff(self) -> None:
        """No write lands from now on."""
        with suppress(BlockingIOError):
            while True:
                self.give()

    def land(self, *calls: Future[None] | Future[bytes]) -> list[bytes]:
        """Lets writes land until these calls are done and no fill runs that was answered; what there was in
        the FIFO, JUNK aside. Misses must not be needed for it."""
        landed = []
        deadline_s = time.monotonic() + TIMEOUT_S
        while not all(call.done() for call in calls) or self._filling():
            assert time.monotonic() < deadline_s, f"{self.door.stats()} {self.engine.stats()}"
            with suppress(BlockingIOError):
                landed.append(self.take())
            select.select([], [], [], 0.001)
        with suppress(BlockingIOError):
            while True:
                landed.append(self.take())
        return [page for page in landed if page != JUNK]

    def _filling(self) -> bool:
        self.poll()
        return self.engine.stats()["fills"] > sum(m.token not in self._places for m in self.asked.values())

    # -- the end ---

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.volume.far_done(2**63)
        self.door.drain()
        self.engine.no_space(5)
        fifo = not self.slots_path.is_file()
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.door.stats()["active"] or self.engine.stats()["fills"]:
            assert time.monotonic() < deadline_s, f"{self.door.stats()} {self.engine.stats()}"
            self.poll()
            self.engine.push([Record(FAIL, token=event.token, result=-5) for event in self.asked.values()])
            if fifo:
                with suppress(BlockingIOError):
                    self.take()
                    self.take()
                    self.give()
                with suppress(BlockingIOError):
                    self.give()
            select.select([self.engine.event_fd], [], [], 0.001)
        self.pool.shutdown()
        self.volume.end_epoch()
        self.door.quit()
        self.door.close()
        self.engine.close()
        os.close(self.slots_fd)
        for file in self._files:
            file.close()


def wait_for(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.0005)


def page_of(letter: str) -> bytes:
    return letter.encode() * PAGE_BYTES
