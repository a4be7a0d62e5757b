"""Hits: IOPS and CPU of what is cached, and the latency of one read at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import fio
from bench.context import QUEUE_DEPTH, Bench
from bench.fio import BenchError
from bench.null import null_device
from bench.process import cpu_s, io_workers
from bench.targets import MIB, Target, Tierblk, attached, loop, nbdkit, null_blk, qemu_nbd, read_all

KIB = 1024
ALL_DEPTH = 32
DEEP = ("tierblk", "tierblk-copy", "null", "loop")
"""Who is read at more than ALL_DEPTH: enough to see whether a deeper queue brings anything."""


def measure(bench: Bench, medium: str, folder: Path, url: str, image: Path) -> None:
    """IOPS with many reads at once, and latency of one at a time, of what is cached in `folder`. Of medium
    memory all of it is in the device's memory tier as well. Raises BenchError."""
    tierblk = Tierblk(
        bench.home / f"tierblk-{medium}",
        folder / "cache",
        url,
        bench.plan.hit_mib * 2,
        queue_depth=QUEUE_DEPTH,
        **_hot(bench, medium),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        target = stack.enter_context(attached(tierblk))
        bench.warm(tierblk, target, image)
        _warm_more(bench, medium, target)
        bench.result.kernel["plane"] = tierblk.status()["plane"]
        targets = [target, *_other_plane(bench, stack, medium, folder, url, image)]
        targets += _peers(bench, stack, medium, tierblk)
        for size_kib, depth in bench.plan.hits:
            before = tierblk.status()
            run = partial(_hit_run, bench, medium, size_kib * KIB, depth)
            read = targets if depth <= ALL_DEPTH else [each for each in targets if each.name in DEEP]
            bench.rounds(f"{medium} {size_kib} KiB x{depth}", read, run)
            _facts(bench, f"hit {medium} {size_kib} KiB x{depth}", target, before, tierblk.status())
        servers = [each for each in targets if each.name != "null-copy"]
        bench.rounds(f"{medium} 4 KiB x1", servers, partial(_latency_run, bench, medium))


def _other_plane(
    bench: Bench, stack: ExitStack, medium: str, folder: Path, url: str, image: Path
) -> Iterator[Target]:
    """The same on plane copy, where the kernel grants a better one."""
    if bench.result.kernel["plane"] == "copy":
        return
    home, cache_dir = bench.home / f"tierblk-copy-{medium}", folder / "cache-copy"
    tierblk = Tierblk(
        home,
        cache_dir,
        url,
        bench.plan.hit_mib * 2,
        name="tierblk-copy",
        plane="copy",
        queue_depth=QUEUE_DEPTH,
        **_hot(bench, medium),
    )
    target = stack.enter_context(attached(tierblk))
    bench.warm(tierblk, target, image)
    _warm_more(bench, medium, target)
    yield target


def _hot(bench: Bench, medium: str) -> dict[str, str]:
    """Room for twice the blocks: they spread over sets of eight frames, and none may be too full."""
    return {"hot_memory": f"{bench.plan.hit_mib * 2}MiB"} if medium == "memory" else {}


def _warm_more(bench: Bench, medium: str, target: Target) -> None:
    """Until the memory tier has it: a block is read twice before it gets a frame, and then once more."""
    for _ in range(3 if medium == "memory" else 0):
        read_all(target.path)


def _peers(bench: Bench, stack: ExitStack, medium: str, tierblk: Tierblk) -> Iterator[Target]:
    """On a disk only loop: null has no disk, and the NBD servers read through the page cache. Beside the
    memory tier those that say how fast it could be."""
    if medium != "disk":
        for name, user_copy in (("null", True), ("null-copy", False)):
            size_bytes = bench.plan.hit_mib * MIB
            device = null_device(
                bench.null_server, size_bytes=size_bytes, depth=QUEUE_DEPTH, user_copy=user_copy
            )
            yield Target(name, stack.enter_context(device), os.getpid())
    yield stack.enter_context(loop(tierblk.slots))
    if medium == "tmpfs":
        yield stack.enter_context(nbdkit(bench.home, tierblk.slots))
        if shutil.which("qemu-nbd"):
            yield stack.enter_context(qemu_nbd(bench.home, tierblk.slots))
        else:
            bench.skip("hits through QEMU's server", "qemu-nbd is not installed")
        if (kernels_own := null_blk()) is not None:
            yield kernels_own


def _hit_run(bench: Bench, medium: str, size: int, depth: int, target: Target, i: int) -> str:
    before_s = cpu_s(target.pid) if target.pid else 0.0
    read = fio.run(
        "hits",
        file=target.path,
        size=bench.plan.hit_mib * MIB,
        bs=size,
        depth=depth,
        runtime_ms=bench.plan.run_ms,
    )
    bench.sample("hit", medium, target.name, size, depth, i, read.iops)
    if target.pid:
        cpu_us = (cpu_s(target.pid) - before_s) * 1e6
        bench.sample("cpu-hit", medium, target.name, size, depth, i, cpu_us / max(read.requests, 1))
    return f"{read.iops:,.0f} IOPS"


def _latency_run(bench: Bench, medium: str, target: Target, i: int) -> str:
    size = 4 * KIB
    read = fio.run(
        "latency", file=target.path, size=bench.plan.hit_mib * MIB, bs=size, runtime_ms=bench.plan.run_ms
    )
    bench.sample("latency", medium, target.name, size, 1, i, read.mean_us)
    bench.sample("p99", medium, target.name, size, 1, i, read.p99_us)
    return f"{read.mean_us:.1f} us"


def _facts(bench: Bench, name: str, target: Target, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Counts, which noise cannot touch. A hit run in which something missed measured something else."""

    def grown(name: str) -> float:
        return float(after.get(name, 0)) - float(before.get(name, 0))

    if grown("miss_requests") or grown("errors"):
        raise BenchError(
            f"{grown('miss_requests'):.0f} misses and {grown('errors'):.0f} errors in a run of hits"
        )
    facts = {"requests": grown("requests"), "io_workers": float(io_workers(target.pid or 0))}
    if "enters" in after:
        facts["enters_per_request"] = grown("enters") / max(grown("requests"), 1)
    bench.result.facts[name] = facts
