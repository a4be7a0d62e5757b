"""A real cache over a real engine, with the test in the place of fills and daemon."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tierblk.cache import Cache
from tierblk.cache.index import Index, open_index
from tierblk.cache.invariants import (
    LayerRows,
    SlotCounts,
    Violation,
    check,
    check_bytes,
    check_committed,
    check_index,
    check_session,
)
from tierblk.cache.superblock import COPIES, COPY_BYTES, Superblock, choose
from tierblk.config import CacheSettings
from tierblk.core import (
    BLOCK_BYTES,
    EVICT,
    EVICTED,
    FILL,
    FILLED,
    MISS,
    PAGE_BYTES,
    Engine,
    Layer,
    LocalDoor,
    Record,
)
from tierblk.extent import block_extent
from tierblk.units import MIB

CACHE_BYTES = 16 * MIB
SLOTS = CACHE_BYTES // BLOCK_BYTES
TIMEOUT_S = 20.0
STAGING_BLOCKS = 32
make_engine = partial(Engine, staging_bytes=STAGING_BLOCKS * BLOCK_BYTES)


def image_bytes(seed: int, blocks: int) -> bytes:
    """An image of which no two pages are equal and none is zero."""
    return random.Random(seed).randbytes(blocks * BLOCK_BYTES)


def settings(directory: Path, size_bytes: int = CACHE_BYTES) -> CacheSettings:
    return CacheSettings.model_validate({"dir": str(directory), "size": size_bytes})


class CacheRig:
    """An open cache that fills its misses from images in memory."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.fetched: list[tuple[int, int]] = []  # (layer id, block) of every MISS, in order
        self.images: dict[int, bytes] = {}  # by layer id: where misses are filled from
        self._doors: dict[int, LocalDoor] = {}
        self._misses: deque[Record] = deque()
        self._places = list(range(STAGING_BLOCKS))
        self._filling: dict[int, int] = {}  # token -> place in staging memory
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._evicted: asyncio.Future[int] | None = None
        asyncio.get_running_loop().add_reader(cache.engine.event_fd, self._on_events)

    @classmethod
    async def open(cls, directory: Path, run_dir: Path, size_bytes: int = CACHE_BYTES) -> CacheRig:
        return cls(await asyncio.to_thread(Cache.open, settings(directory, size_bytes), run_dir, make_engine))

    async def base(self, image: bytes, name: str = "a") -> Layer:
        """The layer of an image; what it misses comes from there."""
        layer = await self.cache.base_layer(f"http://images.example/{name}.raw", len(image), f'etag:"{name}"')
        self.images[layer.layer_id] = image
        return layer

    def door(self, layer: Layer) -> LocalDoor:
        """The door to a layer, opened at first use."""
        if layer.layer_id not in self._doors:
            self._doors[layer.layer_id] = LocalDoor(self.cache.engine, layer)
        return self._doors[layer.layer_id]

    async def read(self, layer: Layer, block: int, count: int = 1) -> bytes:
        """Blocks, through the door."""
        at, length = block * BLOCK_BYTES, count * BLOCK_BYTES
        reading = asyncio.to_thread(self.door(layer).read, at, length)
        return await asyncio.wait_for(reading, TIMEOUT_S)

    async def fill(self, layer: Layer, *blocks: int) -> None:
        """Reads these blocks and checks what came; they are cached when it returns."""
        image = self.images[layer.layer_id]
        for block in blocks:
            assert await self.read(layer, block) == image[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        await self.settle()

    async def settle(self) -> None:
        """Until no fill runs: a reader has its bytes before the slot has."""
        await asyncio.wait_for(self._quiet.wait(), TIMEOUT_S)

    async def evict(self, count: int) -> int:
        """How many blocks went."""
        self._evicted = asyncio.get_running_loop().create_future()
        self.cache.engine.push([Record(EVICT, value=count)])
        return await asyncio.wait_for(self._evicted, TIMEOUT_S)

    def _on_events(self) -> None:
        for event in self.cache.engine.poll():
            if event.kind == MISS:
                self.fetched.append((event.layer, event.block))
                self._misses.append(event)
            elif event.kind == FILLED:
                self._places.append(self._filling.pop(event.token))
            elif event.kind == EVICTED and self._evicted is not None:
                self._evicted.set_result(event.value)
        fills = []
        while self._misses and self._places:
            fills.append(self._answer(self._misses.popleft(), self._places.pop()))
        self.cache.engine.push(fills)
        if self._filling:
            self._quiet.clear()
        else:
            self._quiet.set()

    def _answer(self, event: Record, place: int) -> Record:
        """FILL with the whole block. Its place in staging memory is used again after FILLED only (R5)."""
        self._filling[event.token] = place
        image = self.images[event.layer]
        extent = block_extent(event.block, len(image))
        at = place * BLOCK_BYTES
        self.cache.engine.staging[at : at + extent.length] = image[extent.offset : extent.end]
        pages = -(-extent.length // PAGE_BYTES)
        return Record(FILL, event.layer, event.token, event.block, at, 1, (1 << pages) - 1)

    async def end(self, clean: bool) -> None:
        """Closes doors and cache. Not clean: as a kill would leave it, maps and all."""
        asyncio.get_running_loop().remove_reader(self.cache.engine.event_fd)
        await self.end_doors()
        await self.cache.close(clean)

    async def end_doors(self) -> None:
        """Nobody reads any more."""
        for door in self._doors.values():
            door.drain()
            door.quit()
            await asyncio.to_thread(door.close)
        self._doors.clear()

    def violations(self) -> list[Violation]:
        """Every invariant that can be checked on what the engine and the files say now."""
        return self.cache.check() + check_files(self.cache.path, self.cache)


@asynccontextmanager
async def session(
    directory: Path, run_dir: Path, clean: bool = True, size_bytes: int = CACHE_BYTES
) -> AsyncIterator[CacheRig]:
    """One session; at the end the invariants hold."""
    rig = await CacheRig.open(directory, run_dir, size_bytes)
    try:
        yield rig
        assert rig.violations() == []
    finally:
        await rig.end(clean)


@contextmanager
def run_directory(tmp_path: Path) -> Iterator[Path]:
    """A run directory on tmpfs where the machine has one, as in production."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="tierblk-test-", dir=memory if memory.is_dir() else tmp_path))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def changed_index(directory: Path) -> Iterator[Index]:
    """The index of a closed cache, to look into or to put damage into."""
    superblock = read_superblock(directory)
    index = open_index(directory / "index", superblock.uuid, superblock.slot_count)
    try:
        yield index
    finally:
        index.close()


def layer_rows(cache: Cache) -> list[LayerRows]:
    """All rows of all block maps, from the engine."""
    return [
        LayerRows(
            layer_id,
            layer.kind,
            layer.size_bytes,
            {row: layer.peek_row(row) for row in range(layer.rows)},
        )
        for layer_id, layer in cache.engine.layers.items()
    ]


def read_superblock(directory: Path) -> Superblock:
    with (directory / "slots").open("rb") as slots:
        raw = slots.read(COPIES * COPY_BYTES)
    return choose([raw[at : at + COPY_BYTES] for at in range(0, len(raw), COPY_BYTES)], "slots")[0]


def index_rows(directory: Path) -> list[LayerRows]:
    """What the index of a closed, or copied, cache directory says."""
    with changed_index(directory) as index:
        return [
            LayerRows(record.layer_id, record.kind, record.size_bytes, dict(index.rows(record.layer_id)))
            for record in index.layers()
        ]


def check_files(directory: Path, cache: Cache | None = None) -> list[Violation]:
    """The invariants on a directory as a crash left it. cache: the one that serves it, to compare with."""
    copy = copy_cache(directory, Path(tempfile.mkdtemp(prefix="tierblk-test-")))
    try:
        rows, superblock = index_rows(copy), read_superblock(copy)
        with changed_index(copy) as index:
            meta = index.meta()
        found = check_session(superblock, meta.session, meta.clean, running=cache is not None)
        with (copy / "slots").open("rb") as slots:

            def read(offset_bytes: int, length_bytes: int) -> bytes:
                return os.pread(slots.fileno(), length_bytes, offset_bytes)

            found += check(rows, superblock.slot_count)
            # Another opening would drop clean pages of volumes, which may have been written in place since.
            believed = [layer for layer in rows if meta.clean or layer.kind == "base"]
            found += check_bytes(believed, read, (copy / "sums").read_bytes())
    finally:
        shutil.rmtree(copy)
    if cache is None:
        return found
    maps, stats = layer_rows(cache), cache.stats()
    found += check_index(rows, maps, SlotCounts(*(stats[name] for name in SlotCounts._fields)))
    return found if cache.changed() else found + check_committed(rows, maps)


def copy_cache(directory: Path, target: Path) -> Path:
    """The directory as a power cut at this instant would leave it, if the disk had lost nothing."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(directory, target))


@contextmanager
def mounted(kind: str, at: Path, options: str = "") -> Iterator[Path]:
    """A filesystem of its own in the new folder `at`; mounting needs root, as the demo and the VMs do.

    Unmounted lazily: an io_uring lets go of its files some time after its end.
    """
    at.mkdir()
    subprocess.run(["mount", "-t", kind, *(["-o", options] if options else []), kind, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


class Killed(BaseException):
    """Where a test ends the daemon."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, method: str, call: int, after: bool) -> None:
    """The daemon ends before or after the nth call of a method or function."""
    original: Callable[..., object] = getattr(owner, method)
    calls = 0

    def ending(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, method, ending)
