"""A host of test_writeback.py: its cache directory and memory through kills and power cuts, its daemon, and
what it lets be seen of an epoch on its way: the seal, the commit cycle, what was read from the slots."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests import far_rig
from tests.cache_rig import layer_rows, make_engine
from tests.property.far_front import Front
from tests.property.far_model import Cut, Line
from tests.property.gate import Gate
from tests.property.host import Host
from tests.property.written_sums import that_do_not_fit
from tierblk import standing as standings
from tierblk.cache import Cache
from tierblk.cache.directory import JOURNAL
from tierblk.cache.rows import entries_of
from tierblk.claim import Wishes
from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, PAGE_BYTES, PAGES_PER_BLOCK, Layer, Sealed
from tierblk.far import FarVolume
from tierblk.remote import hash_of
from tierblk.standing import Standing
from tierblk.upkeep import watermarks

TIMEOUT_S = 20.0


class FarHost:
    """line: what its users see, None for a cache that has nothing. writer: who it is in records. is_exact: it
    was detached in order."""

    def __init__(self, name: str, folder: Path, memory: Path, config: Callable[[Path], Config]) -> None:
        self.name = name
        for path in (folder / name, memory / name):
            path.mkdir()
        self.disk = Host(folder / name, memory / name)
        self._config = config
        self.rig: far_rig.Host | None = None
        self.front: Front
        self.line: Line | None = None
        self.writer: bytes | None = None
        self.is_exact = False
        self.syncing: asyncio.Task[None] | None = None
        self.inflight: dict[int, bytes] = {}
        self.sealed: Cut | None = None
        self.durable: Cut | None = None  # the seal behind which a whole commit cycle has been
        self.uploaded: list[tuple[int, bytes]] = []  # (page of the slots file, bytes)
        self.sent = ("", b"")  # the record of what was sealed last

    @property
    def is_attached(self) -> bool:
        return self.rig is not None and self.rig.stack is not None

    @property
    def far(self) -> FarVolume:
        assert self.rig is not None
        (far,) = self.rig.volumes.by_layer.values()  # also while it is released
        return far

    @property
    def writing(self) -> Any:
        assert self.rig is not None
        return next(iter(self.rig.volumes._writers.values()), None)

    def look(self) -> None:
        """What was found wrong while its write-back ran, which has ended with it."""
        task = self.writing._task if self.rig and self.writing else None
        if task and task.done() and not task.cancelled() and (error := task.exception()):
            raise error

    async def start(self, front: Front) -> far_rig.Host:
        """Its daemon runs, over that way to the store."""
        if self.rig is None:
            config = self._config(self.disk.directory)
            cache = await asyncio.to_thread(Cache.open, config.cache, self.disk.run_dir, make_engine)
            for name in ("slots", JOURNAL):  # the superblock's sync covers the whole file
                self.disk.durable[name] = self.disk.content(name)
            self.gate = Gate(self.disk, cache)
            self._watch(cache)
            reserve_slots = watermarks(cache.engine, config.cache).low_slots // 2  # as the daemon does
            self.rig = far_rig.Host(config, cache, reserve_slots)
            self.front = front
        return self.rig

    def _watch(self, cache: Cache) -> None:
        cycle = cache.committer._cycle

        async def watched() -> Any:
            sealed = self.sealed
            report = await cycle()
            self.durable = sealed
            return report

        cache.committer._cycle = watched  # type: ignore[method-assign]

    async def attach(self, wishes: Wishes, *, goes_on: bool = False) -> None:
        assert self.rig is not None
        await self.rig.attach(wishes, goes_on=goes_on)

    def standing(self) -> Standing:
        """As the index has it, durably."""
        assert self.rig is not None
        cache = self.rig.cache
        record = cache.volume(far_rig.NAME)
        assert record is not None
        state = cache._index.volume_state(record.layer_id)
        assert state is not None
        return standings.decode(state)

    async def end(self, *, kill: bool, seed: int = 0) -> None:
        """A kill or a power cut at this instant; nothing that the dying daemon does comes after it."""
        self.disk.crash(kill=kill, seed=seed)
        if self.line is not None and not kill:
            self.line.power_cut()
        await self.bury()

    async def bury(self) -> None:
        """The daemon is gone; what it left was copied before."""
        rig, self.rig = self.rig, None
        syncing, self.syncing = self.syncing, None
        durable = dict(self.disk.durable)
        if rig is not None:
            self.front.dead = True
            self.gate.open = True
            self.front.let_go()
            self.gate.let_go()
            with suppress(Exception):
                await rig.kill()
        if syncing is not None:
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)
        self.disk.durable = durable
        self.sealed = self.durable = None
        self.inflight.clear()
        self.is_exact = False

    async def lose(self) -> None:
        """The cache is gone, and with it what only it had."""
        await self.bury()
        self.disk.boot += 1
        shutil.rmtree(self.disk.disk)
        shutil.rmtree(self.disk.memory)
        self.disk.disk.mkdir()
        self.disk.memory.mkdir()
        self.line = self.writer = None

    async def quiet(self) -> None:
        """Until the daemon does nothing by itself any more."""
        rig = self.rig
        if rig is None:
            return
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                self.look()
                rig.upkeep._on_events()
                writing, committer = self.writing, rig.cache.committer
                idle = (
                    rig.cache.engine.stats()["fills"] == 0
                    and not rig.upkeep._evicting_slots
                    and committer._next is None
                    and (committer._running is None or committer._running.done())
                    and len(rig.upkeep._tasks) == 2  # the timer's, the sums'
                    and (self.syncing is not None or writing is None or writing._flying is None)
                    and not (writing and writing._side)
                )
                if idle:
                    return
                await asyncio.sleep(0.0005)

    async def settle(self, passes: int) -> None:
        """Who makes checksums behind the writes passes so often."""
        assert self.rig is not None
        for _ in range(passes):
            assert (await self.rig.cache.settler.turn(10**6)).ended

    def sums_that_do_not_fit(self) -> list[str]:
        """R9."""
        assert self.rig is not None
        return that_do_not_fit(self.rig.cache.engine, self.far.layer, self.disk)

    def pages(self) -> tuple[set[int], dict[int, bytes]]:
        """Pages that are present in the volume, and the bytes of those that are here and clean."""
        assert self.rig is not None
        layer_id = self.far.layer.layer_id
        rows = next(rows for rows in layer_rows(self.rig.cache) if rows.layer_id == layer_id)
        slots, present, clean = memoryview(self.disk.content("slots")), set[int](), dict[int, bytes]()
        for row, packed in rows.rows.items():
            for block, entry in enumerate(entries_of(packed), row * ENTRIES_PER_ROW):
                for page in range(PAGES_PER_BLOCK if entry.present else 0):
                    bit, number = 1 << page, block * PAGES_PER_BLOCK + page
                    if entry.present & bit:
                        present.add(number)
                    if entry.zero & bit & ~entry.dirty:
                        clean[number] = bytes(PAGE_BYTES)
                    elif entry.cached & bit & ~entry.dirty:
                        at = entry.slot * BLOCK_BYTES + page * PAGE_BYTES
                        clean[number] = bytes(slots[at : at + PAGE_BYTES])
        return present, clean

    # -- an epoch on its way ---

    def on_seal(self) -> None:
        if self.line is not None:
            self.sealed = self.line.cut(self.inflight)
            self.durable, self.uploaded = None, []

    def on_read(self, blocks: Sequence[Sealed], buffer: memoryview) -> None:
        at = 0
        for block in blocks:
            for page in range(PAGES_PER_BLOCK):
                if (block.dirty & ~block.zero) >> page & 1:
                    self.uploaded.append(
                        (block.slot * PAGES_PER_BLOCK + page, bytes(buffer[at : at + PAGE_BYTES]))
                    )
                    at += PAGE_BYTES

    def check_durable(self) -> None:
        """I13, R12, of what was uploaded: the slots hold it, in a commit cycle that began behind the seal."""
        assert self.durable is self.sealed, "R12: no commit cycle has begun and ended behind the seal"
        slots = self.disk.durable["slots"]
        for page, data in self.uploaded:
            assert slots[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == data, "I13: not synced"


def watch_layers(find: Callable[[Layer], FarHost | None]) -> list[Any]:
    """Patches through which hosts see what becomes of their epochs."""
    seal, read_sealed, clean, end_epoch = Layer.seal, Layer.read_sealed, Layer.clean, Layer.end_epoch

    def on_seal(layer: Layer) -> None:
        seal(layer)
        if host := find(layer):
            host.on_seal()

    def on_read(layer: Layer, blocks: Sequence[Sealed], buffer: memoryview) -> tuple[int, bytes]:
        result = read_sealed(layer, blocks, buffer)
        if host := find(layer):
            host.on_read(blocks, buffer)
        return result

    def on_clean(layer: Layer, blocks: Sequence[Sealed], sums: bytes | None = None) -> None:
        if (host := find(layer)) and not host.front.dead:
            name, record = host.sent
            assert host.far.extents.head.hash == hash_of(record), "R13: clean before the extents are there"
            assert host.front.stored(name) == record, "R13: clean before the record is there"
        clean(layer, blocks, sums)

    def on_end(layer: Layer) -> None:
        if host := find(layer):
            host.sealed = None
        end_epoch(layer)

    return [
        patch.object(Layer, "seal", on_seal),
        patch.object(Layer, "read_sealed", on_read),
        patch.object(Layer, "clean", on_clean),
        patch.object(Layer, "end_epoch", on_end),
    ]
