"""The miss path without a driver: cold reads through the in-process door, on this machine, beside curl.

Socket to waiting reader and to the disk, at this machine's full speed: no emulation, no block layer. The CPU
counted is the daemon's part: everything this process used but for the reading threads themselves."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.asked import PAGE_BYTES
from bench.curl import Spent, curl, curl_ranges
from bench.fio import BenchError
from bench.plan import Plan
from bench.process import Progress
from bench.readers import Piece, Readers, compiled
from bench.results import Result, Sample
from bench.targets import MIB, make_image, nginx
from tierblk import config
from tierblk.cache import Cache
from tierblk.core import BLOCK_BYTES, Engine, Layer, local_door
from tierblk.errors import TierblkError
from tierblk.fill import Fills
from tierblk.layer import Base
from tierblk.remote import Fetcher, RawImage, open_source
from tierblk.service import settle_collector

CONFIG = """\
[device]
name = "bench"
[base]
url = "{url}"
[cache]
dir = "{cache_dir}"
size = "{cache_mib}MiB"
"""


@dataclass(frozen=True)
class Tier:
    """The parts of a daemon that a miss goes through."""

    engine: Engine
    layer: Layer
    fills: Fills
    fetcher: Fetcher
    bases: dict[int, Base]

    async def refuse(self) -> None:
        """Ends every fetch, and begins none from now on: reads of what is not cached fail."""
        self.bases.clear()
        await self.fills.stop()


@asynccontextmanager
async def tier(settings: config.Config, run_dir: Path) -> AsyncIterator[Tier]:
    """Cache, fetcher and filler as the daemon puts them together, without eviction: the cache has room."""
    loop = asyncio.get_running_loop()
    engine_of = partial(Engine, staging_bytes=settings.remote.staging)
    cache = await asyncio.to_thread(Cache.open, settings.cache, run_dir, engine_of)
    source = await open_source(settings.url, settings.remote)
    identity = source.identity
    layer = await cache.base_layer(identity.url, identity.size_bytes, identity.validator)
    fetcher = Fetcher(source, settings.remote)
    bases = {layer.layer_id: Base(layer, RawImage(source), fetcher)}
    window_blocks, readahead = settings.remote.max_window // BLOCK_BYTES, settings.remote.readahead
    fills = Fills(cache.engine, bases, window_blocks, readahead=readahead)

    daemon = Tier(cache.engine, layer, fills, fetcher, bases)

    def on_events() -> None:
        fills.take(cache.engine.poll())

    loop.add_reader(cache.engine.event_fd, on_events)
    settle_collector()
    try:
        yield daemon
        await fills.idle()
    finally:
        await daemon.refuse()
        fills.close()
        loop.remove_reader(cache.engine.event_fd)
        await source.aclose()
        await cache.close()


@dataclass(frozen=True)
class ReadCold:
    """One run. `spent`: seconds until the last byte was read, CPU-seconds of the daemon until all was done
    with; what was added to the cache, and what was fetched."""

    spent: Spent
    kept_bytes: int
    fetched_bytes: int


@dataclass(frozen=True)
class Cold:
    """What cold reads through the in-process door need. `home` is on a tmpfs, `disk` where caches and curl's
    file lie, `library` the compiled reading threads, `url` the folder of the images."""

    plan: Plan
    result: Result
    home: Path
    disk: Path
    library: Path
    url: str
    progress: Progress

    def keep(
        self, section: str, medium: str, target: str, size: int, depth: int, i: int, value: float
    ) -> None:
        """Keeps one figure of round `i`; size in bytes."""
        self.result.samples.append(Sample(section, medium, target, size, depth, i, value))

    def read(
        self,
        image: str,
        cache_mib: int,
        pieces: Sequence[Piece],
        depth: int,
        *,
        before: Sequence[Piece] = (),
        readahead: bool = True,
    ) -> ReadCold:
        """Reads the pieces with a new cache, after those of `before`. Raises BenchError."""
        cache_dir, run_dir, file = self.disk / "cache", self.home / "run", self.home / "tierblk.toml"
        text = CONFIG.format(url=f"{self.url}/{image}", cache_dir=cache_dir, cache_mib=cache_mib)
        file.write_text(text if readahead else f"{text}[remote]\nreadahead = false\n")
        parts = [each for each in (before, pieces) if each]
        try:
            return asyncio.run(_read(config.load(file), run_dir, parts, depth, self.library))
        except (TierblkError, OSError) as error:
            raise BenchError(f"a cold read through the in-process door: {error}") from None
        finally:
            shutil.rmtree(cache_dir, ignore_errors=True)
            shutil.rmtree(run_dir, ignore_errors=True)


async def _read(
    settings: config.Config, run_dir: Path, parts: Sequence[Sequence[Piece]], depth: int, library: Path
) -> ReadCold:
    """All parts, one after the other; what the last one showed."""
    async with tier(settings, run_dir) as daemon:
        with local_door(daemon.engine, daemon.layer, queue_depth=64) as door:
            for pieces in parts:
                readers = Readers(library, [pieces])
                cached, fetched = daemon.layer.cached_pages(), daemon.fetcher.counters.fetched_bytes
                began_s, cpu_began_s = time.monotonic(), time.process_time()
                reading_s = await readers.read(door, depth, refuse=daemon.refuse)
                took_s = time.monotonic() - began_s
                await daemon.fills.idle()
                spent = Spent(took_s, time.process_time() - cpu_began_s - reading_s)
                readers.done()
            return ReadCold(
                spent,
                (daemon.layer.cached_pages() - cached) * PAGE_BYTES,
                daemon.fetcher.counters.fetched_bytes - fetched,
            )


def measure(plan: Plan, result: Result, disk: Path, progress: Progress) -> None:
    """Adds the samples of medium `native`; `disk`, a folder, is where the cache and curl's file lie.
    Raises BenchError."""
    with (
        tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="native-", dir=disk) as folder,
    ):
        home = Path(memory)
        served = home / "served"
        served.mkdir()
        make_image(served / "windows.raw", plan.miss_mib * MIB)
        make_image(served / "twice.raw", 2 * plan.miss_mib * MIB)
        make_image(served / "blocks.raw", plan.blocks_mib * MIB)
        with nginx(home / "nginx", served) as address:
            cold = Cold(plan, result, home, Path(folder), compiled(disk), address, progress)
            for i in range(plan.rounds):
                _windows(cold, i)
                _unwritten(cold, i)
                _blocks(cold, i)


def _windows(cold: Cold, i: int) -> None:
    """From end to end in 1 MiB pieces, until it is on the disk as well."""
    size_mib = cold.plan.miss_mib
    file = cold.disk / "curl.out"
    curled = curl(f"{cold.url}/windows.raw", file)
    file.unlink()
    for depth in cold.plan.miss_depths:
        run = cold.read("windows.raw", size_mib * 5 // 4 + 64, forward(0, size_mib), depth)
        _keep_windows(cold, "native", depth, i, run.spent, curled)


def _unwritten(cold: Cold, i: int) -> None:
    """The same from the socket to the waiting request only: the first half of the image has filled the
    cache, nothing leaves it here, and so the second half is passed on and kept nowhere. Without readahead,
    for what is fetched before anybody waits would be dropped and fetched again."""
    size_mib, medium = cold.plan.miss_mib, "native, unwritten"
    first, second = forward(0, size_mib), forward(size_mib, 2 * size_mib)
    curled = curl(f"{cold.url}/windows.raw", Path("/dev/null"))
    for depth in cold.plan.miss_depths:
        run = cold.read("twice.raw", size_mib // 2, second, depth, before=first, readahead=False)
        if run.kept_bytes or run.fetched_bytes != size_mib * MIB:
            kept, fetched = run.kept_bytes // MIB, run.fetched_bytes // MIB
            why = f"of {size_mib} MiB {fetched} were fetched and {kept} kept, wanted was all and nothing"
            cold.result.skipped[f"misses, {medium}, x{depth}"] = why
            continue
        _keep_windows(cold, medium, depth, i, run.spent, curled)


def _keep_windows(cold: Cold, medium: str, depth: int, i: int, ours: Spent, curls: Spent) -> None:
    size = cold.plan.miss_mib * MIB
    said = []
    for name, spent in (("curl", curls), ("tierblk", ours)):
        mb_per_s, s_per_gb = size / spent.took_s / 1e6, spent.cpu_s / (size / 1e9)
        cold.keep("miss", medium, name, MIB, depth, i, mb_per_s)
        cold.keep("cpu", medium, name, MIB, depth, i, s_per_gb)
        said.append(f"{name} {mb_per_s:.0f} MB/s, {s_per_gb:.2f} CPU-s/GB")
    what = f"misses, {medium}, x{depth}, round {i + 1}/{cold.plan.rounds}"
    cold.progress(f"{what}: {'; '.join(said)}")


def _blocks(cold: Cold, i: int) -> None:
    """Single blocks in random order, a request each."""
    size = cold.plan.blocks_mib * MIB
    places = list(range(0, size, BLOCK_BYTES))
    random.Random(i).shuffle(places)
    curled = curl_ranges(f"{cold.url}/blocks.raw", [(place, BLOCK_BYTES) for place in places])
    for depth in cold.plan.miss_depths:
        pieces = [Piece(place, BLOCK_BYTES) for place in places]
        run = cold.read("blocks.raw", cold.plan.blocks_mib * 5 // 4 + 64, pieces, depth)
        used_us = run.spent.cpu_s / len(places) * 1e6
        figures = {"curl": curled.cpu_s / len(places) * 1e6, "tierblk": used_us}
        fetched = run.fetched_bytes / size
        cold.result.facts[f"single blocks native x{depth}"] = {"bytes fetched to bytes read": fetched}
        for name, value in figures.items():
            cold.keep("cpu-block", "native", name, BLOCK_BYTES, depth, i, value)
        what = f"single blocks, native, x{depth}, round {i + 1}/{cold.plan.rounds}"
        cold.progress(f"{what}: " + ", ".join(f"{name} {used:.0f} CPU-us" for name, used in figures.items()))


def forward(first_mib: int, stop_mib: int) -> list[Piece]:
    """1 MiB after the other."""
    return [Piece(at * MIB, MIB) for at in range(first_mib, stop_mib)]
