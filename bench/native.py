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
from tierblk.daemon import settle_collector
from tierblk.errors import TierblkError
from tierblk.fill import Fills
from tierblk.layer import Base
from tierblk.remote import Fetcher, RawImage, open_source

CONFIG = """\
[device]
name = "bench"
[base]
url = "{url}"
[cache]
dir = "{cache_dir}"
size = "{cache_mib}MiB"
"""


@asynccontextmanager
async def tier(settings: config.Config, run_dir: Path) -> AsyncIterator[tuple[Engine, Layer, Fills]]:
    """Cache, fetcher and filler as the daemon puts them together, without eviction: the cache has room."""
    loop = asyncio.get_running_loop()
    engine_of = partial(Engine, staging_bytes=settings.remote.staging)
    cache = await asyncio.to_thread(Cache.open, settings.cache, run_dir, engine_of)
    source = await open_source(settings.base.url, settings.remote)
    identity = source.identity
    layer = await cache.base_layer(identity.url, identity.size_bytes, identity.validator)
    bases = {layer.layer_id: Base(layer, RawImage(source), Fetcher(source, settings.remote))}
    fills = Fills(cache.engine, bases, settings.remote.max_window // BLOCK_BYTES)

    def on_events() -> None:
        fills.take(cache.engine.poll())

    loop.add_reader(cache.engine.event_fd, on_events)
    settle_collector()
    try:
        yield cache.engine, layer, fills
        await fills.idle()
    finally:
        bases.clear()
        await fills.stop()
        fills.close()
        loop.remove_reader(cache.engine.event_fd)
        await source.aclose()
        await cache.close()


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
        self, image: str, cache_mib: int, pieces: Sequence[Piece], depth: int, before: Sequence[Piece] = ()
    ) -> tuple[Spent, int]:
        """Reads the pieces with a new cache, after those of `before`: what that took, and how many bytes the
        cache has more than before. Raises BenchError."""
        cache_dir, run_dir, file = self.disk / "cache", self.home / "run", self.home / "tierblk.toml"
        url = f"{self.url}/{image}"
        file.write_text(CONFIG.format(url=url, cache_dir=cache_dir, cache_mib=cache_mib))
        try:
            return asyncio.run(
                _read(
                    config.load(file),
                    run_dir,
                    [each for each in (before, pieces) if each],
                    depth,
                    self.library,
                )
            )
        except (TierblkError, OSError) as error:
            raise BenchError(f"a cold read through the in-process door: {error}") from None
        finally:
            shutil.rmtree(cache_dir, ignore_errors=True)
            shutil.rmtree(run_dir, ignore_errors=True)


async def _read(
    settings: config.Config, run_dir: Path, parts: Sequence[Sequence[Piece]], depth: int, library: Path
) -> tuple[Spent, int]:
    """Of the last part: seconds until its last byte was read, CPU-seconds until all was done with; and how
    many bytes it added to the cache."""
    async with tier(settings, run_dir) as (engine, layer, fills):
        with local_door(engine, layer, queue_depth=64) as door:
            for pieces in parts:
                readers = Readers(library, [pieces])
                await fills.idle()
                cached_before = layer.cached_pages()
                began_s, cpu_began_s = time.monotonic(), time.process_time()
                reading_s = await asyncio.to_thread(readers.run, door, depth)
                took_s = time.monotonic() - began_s
                await fills.idle()
                spent = Spent(took_s, time.process_time() - cpu_began_s - reading_s)
                readers.done()
            return spent, (layer.cached_pages() - cached_before) * PAGE_BYTES


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
        spent, _ = cold.read("windows.raw", size_mib * 5 // 4 + 64, forward(0, size_mib), depth)
        _keep_windows(cold, "native", depth, i, spent, curled)


def _unwritten(cold: Cold, i: int) -> None:
    """The same from the socket to the waiting request only: the first half of the image has filled the
    cache, nothing leaves it here, and so the second half is passed on and kept nowhere. The cache is large
    enough for windows of the usual size."""
    size_mib = cold.plan.miss_mib
    curled = curl(f"{cold.url}/windows.raw", Path("/dev/null"))
    for depth in cold.plan.miss_depths:
        cache_mib = size_mib * 5 // 8
        first, second = forward(0, size_mib), forward(size_mib, 2 * size_mib)
        spent, kept_bytes = cold.read("twice.raw", cache_mib, second, depth, first)
        if kept_bytes:
            raise BenchError(f"{kept_bytes} bytes that there was no room for were written to the cache")
        _keep_windows(cold, "native, unwritten", depth, i, spent, curled)


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
        spent, kept_bytes = cold.read("blocks.raw", cold.plan.blocks_mib * 5 // 4 + 64, pieces, depth)
        figures = {"curl": curled.cpu_s / len(places) * 1e6, "tierblk": spent.cpu_s / len(places) * 1e6}
        for name, used_us in figures.items():
            cold.keep("cpu-block", "native", name, BLOCK_BYTES, depth, i, used_us)
        cold.result.facts[f"single blocks native x{depth}"] = {"bytes kept to bytes read": kept_bytes / size}
        what = f"single blocks, native, x{depth}, round {i + 1}/{cold.plan.rounds}"
        cold.progress(f"{what}: " + ", ".join(f"{name} {used:.0f} CPU-us" for name, used in figures.items()))


def forward(first_mib: int, stop_mib: int) -> list[Piece]:
    """1 MiB after the other."""
    return [Piece(at * MIB, MIB) for at in range(first_mib, stop_mib)]
