"""The miss path without a driver: cold reads through the in-process door, on this machine, beside curl.

Socket to waiting reader and to the disk, at this machine's full speed: no emulation, no block layer. The CPU
counted is the daemon's part: everything this process used but for the reading threads themselves."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from bench.curl import Spent, curl
from bench.fio import BenchError
from bench.plan import Plan
from bench.process import Progress
from bench.results import Result, Sample
from bench.targets import MIB, make_image, nginx
from tierblk import config
from tierblk.cache import Cache
from tierblk.core import BLOCK_BYTES, Engine, Layer, LocalDoor, local_door
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


def _read(door: LocalDoor, offset_bytes: int) -> float:
    """Reads 1 MiB; the CPU-seconds that it took in this thread."""
    began_s = time.thread_time()
    door.read(offset_bytes, MIB)
    return time.thread_time() - began_s


async def _cold_read(settings: config.Config, run_dir: Path, size: int, depth: int) -> Spent:
    """Seconds until the last byte was read, CPU-seconds until all of it was on the disk as well."""
    async with tier(settings, run_dir) as (engine, layer, fills):
        loop = asyncio.get_running_loop()
        with local_door(engine, layer, queue_depth=64) as door, ThreadPoolExecutor(depth) as readers:
            began_s, cpu_began_s = time.monotonic(), time.process_time()
            offsets = range(0, size, MIB)
            reads = [loop.run_in_executor(readers, _read, door, offset) for offset in offsets]
            reading_s = sum(await asyncio.gather(*reads))
            took_s = time.monotonic() - began_s
            await fills.idle()
            return Spent(took_s, time.process_time() - cpu_began_s - reading_s)


def measure(plan: Plan, result: Result, disk: Path, progress: Progress) -> None:
    """Adds the samples of medium `native`; `disk`, a folder, is where the cache and curl's file lie.
    Raises BenchError."""
    size = plan.miss_mib * MIB
    with (
        tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="native-", dir=disk) as folder,
    ):
        home = Path(memory)
        (home / "served").mkdir()
        make_image(home / "served" / "image.raw", size)
        with nginx(home / "nginx", home / "served") as address:
            for i in range(plan.rounds):
                _round(plan, result, home, Path(folder), f"{address}/image.raw", i, progress)


def _round(plan: Plan, result: Result, home: Path, disk: Path, url: str, i: int, progress: Progress) -> None:
    size = plan.miss_mib * MIB

    def keep(name: str, depth: int, spent: Spent) -> None:
        result.samples.append(Sample("miss", "native", name, MIB, depth, i, size / spent.took_s / 1e6))
        result.samples.append(Sample("cpu", "native", name, MIB, depth, i, spent.cpu_s / (size / 1e9)))

    curled = curl(url, disk / "curl.out")
    (disk / "curl.out").unlink()
    for depth in plan.miss_depths:
        keep("curl", depth, curled)
        cache_dir, run_dir = disk / "cache", home / "run"
        file = home / "tierblk.toml"
        file.write_text(CONFIG.format(url=url, cache_dir=cache_dir, cache_mib=plan.miss_mib * 5 // 4 + 64))
        try:
            spent = asyncio.run(_cold_read(config.load(file), run_dir, size, depth))
        except (TierblkError, OSError) as error:
            raise BenchError(f"a cold read through the in-process door: {error}") from None
        finally:
            shutil.rmtree(cache_dir, ignore_errors=True)
            shutil.rmtree(run_dir, ignore_errors=True)
        keep("tierblk", depth, spent)
        mb_per_s, s_per_gb = size / spent.took_s / 1e6, spent.cpu_s / (size / 1e9)
        progress(
            f"misses, native, round {i + 1}/{plan.rounds}: tierblk x{depth} {mb_per_s:.0f} MB/s, "
            f"{s_per_gb:.2f} CPU-s/GB; curl {size / curled.took_s / 1e6:.0f} MB/s"
        )
