"""Writes: random ones and a stream, writes that are flushed one by one, and what hits wait beside writes.

To a local volume without a base whose blocks were all written before, beside the kernel's loop over a file
on the same filesystem that was written before as well: both are measured as they are after long use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import fio
from bench.context import Bench
from bench.fio import BenchError
from bench.process import output
from bench.results import SUBJECT
from bench.targets import MIB, PAGE_BYTES, Target, Tierblk, attached, loop, read_all, write_all

KIB = 1024
BLOCK_BYTES = 64 * KIB
DEPTH = 32
SPARE_MIB = 128
"""Of the filesystem: the index, and whatever else lies beside the blocks."""
COUNTED = ("enters", "space_waits", "flush_requests", "flush_records", "flush_commits")
"""Of `status`; noise cannot touch them."""


def measure(bench: Bench, medium: str, folder: Path) -> None:
    """Everything about writes to `folder`. The runs that change rows come last: before each of them the
    volume is emptied. Raises BenchError."""
    size_mib, folder = bench.plan.write_mib, folder / "writes"
    # Twice the volume: blocks that were discarded are free again only after a commit.
    needed_mib, free_mib = size_mib * 3 + SPARE_MIB, shutil.disk_usage(folder.parent).free // MIB
    if free_mib < needed_mib:
        bench.skip(f"writes, {medium}", f"they take {needed_mib} MiB, and {folder.parent} has {free_mib}")
        return
    home = bench.home / f"tierblk-writes-{medium}"
    tierblk = Tierblk(home, folder / "cache", None, size_mib * 2, volume=f"{size_mib}MiB")
    folder.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        targets = [stack.enter_context(attached(tierblk))]
        file = _allocated(folder / "loop.raw", size_mib * MIB)
        targets.append(stack.enter_context(loop(file, writable=True)))
        _fill(bench, targets[0])
        # And once more, into the other half of the slots: a filesystem records which parts of a file were
        # never written, so a flush after the first write to a slot costs more than any later one.
        _empty(targets[0].path)
        for target in targets:
            _fill(bench, target)
        bench.result.kernel.setdefault("plane", tierblk.status()["plane"])
        for section, size, depth, run in (
            ("write", 4 * KIB, DEPTH, partial(_write_run, bench, medium)),
            ("write-stream", 64 * KIB, DEPTH, partial(_stream_run, bench, medium)),
            ("fsync", 4 * KIB, 1, partial(_fsync_run, bench, medium)),
            ("p99-writing", 4 * KIB, 1, partial(_beside_run, bench, medium)),
            ("fsync-row", 4 * KIB, 1, partial(_row_run, bench, medium, tierblk)),
        ):
            before = tierblk.status()
            bench.rounds(f"{section} {medium} {size // KIB} KiB x{depth}", targets, run)
            facts = counts(before, tierblk.status())
            if section == "fsync" and facts["flush_records"] + facts["flush_commits"]:
                raise BenchError("a row changed in a run of writes that change none")
            bench.result.facts.setdefault(f"{section} {medium}", {}).update(facts)


def counts(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """What grew from one status of a device to the next. Raises BenchError when that are errors."""
    grown = {name: float(after[name]) - float(before[name]) for name in ("requests", "errors", *COUNTED)}
    if errors := grown.pop("errors"):
        raise BenchError(f"{errors:.0f} requests failed in runs of writes")
    requests = grown["requests"]
    return {"requests": requests, "enters_per_request": grown.pop("enters") / max(requests, 1), **grown}


def _allocated(file: Path, size_bytes: int) -> Path:
    with open(file, "wb") as made:
        os.posix_fallocate(made.fileno(), 0, size_bytes)
    return file


def _fill(bench: Bench, target: Target) -> None:
    """Writes all of a device, and compares every byte."""
    bench.progress(f"writes all of {target.name} and compares every byte")
    if write_all(target.path, bench.plan.write_mib * MIB) != read_all(target.path):
        raise BenchError(f"{target.path} does not hold what was written to it: no figure would mean anything")


def _write_run(bench: Bench, medium: str, target: Target, i: int) -> str:
    size = 4 * KIB
    job = _written(bench, target, "randwrite", size)
    bench.sample("write", medium, target.name, size, DEPTH, i, job.iops)
    return f"{job.iops:,.0f} IOPS"


def _stream_run(bench: Bench, medium: str, target: Target, i: int) -> str:
    size = 64 * KIB
    job = _written(bench, target, "write", size)
    bench.sample("write-stream", medium, target.name, size, DEPTH, i, job.bytes_per_s / 1e6)
    return f"{job.bytes_per_s / 1e6:,.0f} MB/s"


def _written(bench: Bench, target: Target, pattern: str, size: int) -> fio.FioJob:
    return fio.run(
        "writes",
        writes=True,
        file=target.path,
        size=bench.plan.write_mib * MIB,
        rw=pattern,
        bs=size,
        depth=DEPTH,
        runtime_ms=bench.plan.write_ms,
    )


def _fsync_run(bench: Bench, medium: str, target: Target, i: int) -> str:
    size = 4 * KIB
    job = fio.run(
        "fsync",
        writes=True,
        file=target.path,
        size=bench.plan.write_mib * MIB,
        bs=size,
        runtime_ms=bench.plan.write_ms,
    )
    bench.sample("fsync", medium, target.name, size, 1, i, job.iops)
    return f"{job.iops:,.0f} IOPS"


def _row_run(bench: Bench, medium: str, tierblk: Tierblk, target: Target, i: int) -> str:
    """loop's file stays as it is: it has no rows."""
    ours = target.name == SUBJECT
    if ours:
        _empty(target.path)
    job = fio.run(
        "fsync-row",
        writes=True,
        file=target.path,
        size=bench.plan.write_mib * MIB,
        write_size=bench.plan.write_mib * MIB * PAGE_BYTES // BLOCK_BYTES,
        runtime_ms=bench.plan.write_ms,
    )
    if ours and (pages := int(tierblk.status()["volume_bytes"]) // PAGE_BYTES) != job.requests:
        raise BenchError(f"{job.requests} writes, each to a block of its own, left {pages} pages")
    bench.sample("fsync-row", medium, target.name, 4 * KIB, 1, i, job.iops)
    return f"{job.iops:,.0f} IOPS"


def _empty(path: str) -> None:
    """Discards all of a volume. The flush belongs to it: else the first of the run would have all of that to
    record."""
    output(["blkdiscard", "--force", path])
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside_run(bench: Bench, medium: str, target: Target, i: int) -> str:
    """99 % of hits of the first `hit_mib`: with nothing else going on, and while the rest of the device is
    written."""
    hit_bytes = bench.plan.hit_mib * MIB
    idle = fio.run("latency", file=target.path, size=hit_bytes, bs=4 * KIB, runtime_ms=bench.plan.write_ms)
    jobs = fio.run_jobs(
        "writing",
        writes=True,
        file=target.path,
        hit_size=hit_bytes,
        write_size=bench.plan.write_mib * MIB - hit_bytes,
        runtime_ms=bench.plan.write_ms,
    )
    hits = jobs["hits"]
    alone = "idle" if target.name == SUBJECT else f"{target.name} idle"
    for name, job in ((target.name, hits), (alone, idle)):
        bench.sample("p99-writing", medium, name, 4 * KIB, 1, i, job.p99_us)
    facts = bench.result.facts.setdefault(f"p99-writing {medium}", {})
    facts[f"hits measured {target.name}"] = hits.requests
    facts[f"IOPS of the writes {target.name}"] = jobs["writes"].iops
    facts |= {f"mean us {target.name}": hits.mean_us, f"mean us {alone}": idle.mean_us}
    return f"idle {idle.p99_us:.0f} us, beside writes {hits.p99_us:.0f} us"
