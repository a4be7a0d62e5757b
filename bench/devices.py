"""Ten devices of one daemon, all read at once, beside one of them that the same ten jobs read.

Every job is half as deep as a run of hits, so that ten queues have something to batch, as the one queue has:
compared are ten busy devices with one busy device, at the same number of reads in flight. With fewer for each
the batches of ten queues would be small, and the ratio would say what a system call costs on that kernel."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import fio
from bench.context import Bench
from bench.targets import MIB, Target, Tierblk, all_attached

SECTION = "devices"
SHARE = "devices-share"
COUNT = 10
SIZE_BYTES = 4096
DEPTH = 16
"""Of each job."""


def measure(bench: Bench, url: str, image: Path) -> None:
    """All of them over one cache on a tmpfs. Raises BenchError."""
    folder = bench.home / "devices"
    devices = [
        Tierblk(
            folder / f"home{i}",
            folder / "cache",
            url,
            bench.plan.hit_mib * 2,
            device_name=f"ten{i}",
            queue_depth=COUNT * DEPTH,
        )
        for i in range(COUNT)
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        targets = stack.enter_context(all_attached(devices))
        bench.warm(devices[0], targets[0], image)
        paths = [target.path for target in targets]
        ways = {"tierblk": paths, "one device": paths[:1] * COUNT}
        both = [Target(name, devices_read[0]) for name, devices_read in ways.items()]
        bench.rounds(f"{COUNT} jobs, 4 KiB x{COUNT * DEPTH}", both, partial(_run, bench, ways))


def _run(bench: Bench, ways: dict[str, list[str]], way: Target, i: int) -> str:
    files: dict[str, Any] = {f"file{n}": path for n, path in enumerate(ways[way.name])}
    jobs = fio.run_jobs(
        "devices",
        size=bench.plan.hit_mib * MIB,
        bs=SIZE_BYTES,
        depth=DEPTH,
        runtime_ms=bench.plan.run_ms,
        **files,
    )
    iops = [read.iops for read in jobs.values()]
    bench.sample(SECTION, "tmpfs", way.name, SIZE_BYTES, COUNT * DEPTH, i, sum(iops))
    share = min(iops) / fmean(iops)
    bench.sample(SHARE, "tmpfs", way.name, SIZE_BYTES, COUNT * DEPTH, i, share)
    return f"{sum(iops):,.0f} IOPS, the least served {share:.2f} of the mean"
