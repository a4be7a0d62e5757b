"""Memory of the daemon: with an empty cache and one idle device, and what a cached block adds.

Counted is what belongs to the daemon alone or is no file on a disk: anonymous memory, and shared memory (the
block map lies on a tmpfs). The image begins with zeros, of which nothing is cached: reading them first
touches what is touched once however much is cached (rings, arenas), so that this is not in the growth. And
growth is taken twice: what every block adds is in both, a library's next arena in one. The smaller counts."""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from bench import fio
from bench.context import Bench
from bench.process import wait_until
from bench.server import MadeUp
from bench.shaped import shaped
from bench.targets import MIB, Tierblk, attached

IDLE = "memory-idle"
WARM = "memory-warm"
BLOCK = "memory-block"
BLOCK_BYTES = 65536
QUIET_S = 7.0
"""With nothing given back for so long nothing will be: the daemon gives staging memory back after 5 s."""
LIMIT_S = 60.0
GIVEN_BACK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Resident:
    """Memory of a process in bytes."""

    anonymous: int
    shared: int

    @property
    def total(self) -> int:
        return self.anonymous + self.shared


def resident(status: str) -> Resident:
    """Of what /proc/PID/status says."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Resident(*(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem")))


def measure(bench: Bench) -> None:
    """On the disk if there is one. Raises BenchError."""
    folder = (bench.disk or bench.home) / "memory"
    warm_mib, size_mib = bench.plan.memory_warm_mib, bench.plan.memory_mib
    cache_mib = size_mib * 9 // 8 + 64
    free_mib = shutil.disk_usage(folder.parent).free // MIB
    if free_mib < cache_mib + 64:
        bench.skip("memory", f"the cache takes {cache_mib} MiB, and {folder.parent} has {free_mib}")
        return
    home = bench.home / "memory-home"
    home.mkdir()
    image = MadeUp((warm_mib + size_mib) * MIB, zero_bytes=warm_mib * MIB)
    try:
        with shaped(home, image) as server:
            _grow(bench, Tierblk(home, folder / "cache", server.url, cache_mib), image)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _grow(bench: Bench, tierblk: Tierblk, image: MadeUp) -> None:
    with attached(tierblk) as target:
        assert target.pid is not None
        bench.progress("memory: waits until the daemon is idle")
        idle = _settled(target.pid)
        bench.progress("memory: reads what is not cached")
        fio.run("misses", file=target.path, size=image.zero_bytes, depth=4)
        tierblk.wait_cached(0)
        steps = [(_settled(target.pid), _blocks(tierblk))]
        cached_bytes = image.size_bytes - image.zero_bytes
        for cached in (cached_bytes // 2, cached_bytes):
            bench.progress(f"memory: fills the cache with {cached // MIB} MiB")
            fio.run("misses", file=target.path, size=image.zero_bytes + cached, depth=4)
            tierblk.wait_cached(cached)
            steps.append((_settled(target.pid), _blocks(tierblk)))
    growths = [
        (after.total - before.total) / (last - first)
        for (before, first), (after, last) in itertools.pairwise(steps)
    ]
    (warm, first), (full, last) = steps[0], steps[-1]
    bench.sample(IDLE, "one device", "tierblk", 0, 0, 0, idle.total / MIB)
    bench.sample(WARM, "one device", "tierblk", 0, 0, 0, warm.total / MIB)
    bench.sample(BLOCK, "contiguous", "tierblk", 0, 0, 0, min(growths))
    bench.result.facts["memory"] = {
        "blocks": last - first,
        "bytes a block, first half": growths[0],
        "bytes a block, second half": growths[1],
        "anonymous bytes a block": (full.anonymous - warm.anonymous) / (last - first),
        "shared bytes a block": (full.shared - warm.shared) / (last - first),
        "MiB idle": idle.total / MIB,
        "MiB in the end": full.total / MIB,
    }


def _blocks(tierblk: Tierblk) -> int:
    return int(tierblk.status()["cached_bytes"]) // BLOCK_BYTES


def _settled(pid: int) -> Resident:
    """Once nothing was given back for a while."""
    status = Path(f"/proc/{pid}/status")
    least, since_s = resident(status.read_text()).total, time.monotonic()

    def quiet() -> bool:
        nonlocal least, since_s
        now = resident(status.read_text()).total
        if now < least - GIVEN_BACK_BYTES:
            least, since_s = now, time.monotonic()
        return time.monotonic() - since_s > QUIET_S

    wait_until(quiet, "the daemon gives no more memory back", LIMIT_S)
    return resident(status.read_text())
