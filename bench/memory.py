"""Memory of the daemon: with an empty cache and one idle device, and what a cached block adds.

Counted is what belongs to the daemon alone or is no file on a disk: anonymous memory, and shared memory (the
block map lies on a tmpfs). The growth is taken between two fills, so that what the first one makes the
interpreter and its libraries keep is not in it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from bench import fio
from bench.context import Bench
from bench.process import wait_until
from bench.shaped import shaped
from bench.targets import MIB, Tierblk, attached

IDLE = "memory-idle"
BLOCK = "memory-block"
BLOCK_BYTES = 65536
QUIET_S = 7.0
"""With nothing given back for so long nothing will be: the daemon gives staging memory back after 5 s."""
LIMIT_S = 60.0
GIVEN_BACK_BYTES = 256 * 1024


def resident(status: str) -> int:
    """Anonymous and shared memory in bytes, of what /proc/PID/status says."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def measure(bench: Bench) -> None:
    """On the disk if there is one. Raises BenchError."""
    folder = (bench.disk or bench.home) / "memory"
    size_mib = bench.plan.memory_mib
    cache_mib = size_mib * 9 // 8 + 64
    free_mib = shutil.disk_usage(folder.parent).free // MIB
    if free_mib < cache_mib + 64:
        bench.skip("memory", f"the cache takes {cache_mib} MiB, and {folder.parent} has {free_mib}")
        return
    home = bench.home / "memory-home"
    home.mkdir()
    try:
        with shaped(home, size_mib * MIB) as server:
            _grow(bench, Tierblk(home, folder / "cache", server.url, cache_mib))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _grow(bench: Bench, tierblk: Tierblk) -> None:
    plan = bench.plan
    with attached(tierblk) as target:
        assert target.pid is not None
        bench.progress("memory: waits until the daemon is idle")
        idle = _settled(target.pid)
        bench.sample(IDLE, "one device", "tierblk", 0, 0, 0, idle / MIB)
        taken = []
        for size_mib in (plan.memory_first_mib, plan.memory_mib):
            bench.progress(f"memory: fills the cache up to {size_mib} MiB")
            fio.run("misses", file=target.path, size=size_mib * MIB, depth=4)
            tierblk.wait_cached(size_mib * MIB)
            cached = int(tierblk.status()["cached_bytes"]) // BLOCK_BYTES
            taken.append((cached, _settled(target.pid)))
        (first, before), (last, after) = taken
        bench.sample(BLOCK, "contiguous", "tierblk", 0, 0, 0, (after - before) / (last - first))
        bench.result.facts["memory"] = {
            "idle MiB": idle / MIB,
            "blocks": last - first,
            "MiB before": before / MIB,
            "MiB after": after / MIB,
        }


def _settled(pid: int) -> int:
    """Bytes, once nothing was given back for a while."""
    status = Path(f"/proc/{pid}/status")
    least, since_s = resident(status.read_text()), time.monotonic()

    def quiet() -> bool:
        nonlocal least, since_s
        now = resident(status.read_text())
        if now < least - GIVEN_BACK_BYTES:
            least, since_s = now, time.monotonic()
        return time.monotonic() - since_s > QUIET_S

    wait_until(quiet, "the daemon gives no more memory back", LIMIT_S)
    return resident(status.read_text())
