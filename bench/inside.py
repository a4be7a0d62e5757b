"""What runs under a kernel that has ublk, as root: its sections, one after the other.

`python3 -m bench inside --result FILE [...]`; started by `bench.where`, on whichever kernel that found."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from bench import devices, hits, memory, misses, mixed, queues, writes
from bench.context import Bench
from bench.disk import folder_on
from bench.fio import BenchError
from bench.plan import Plan
from bench.process import Progress, output
from bench.results import Result
from bench.targets import nginx

SECTIONS = (
    "hits-tmpfs",
    "hits-memory",
    "hits-disk",
    "queues",
    "devices",
    "mixed",
    "misses",
    "memory",
    "writes-tmpfs",
    "writes-disk",
)


def measure(
    plan: Plan,
    result: Result,
    disk: str | None,
    null_server: Path,
    progress: Progress,
    sections: Container[str] = SECTIONS,
) -> None:
    """Runs the plan under this kernel and puts what it finds into `result`. Raises BenchError."""
    release, cpus = os.uname().release, os.cpu_count() or 1
    result.kernel.update(release=release, cpus=cpus)
    for module in ("ublk_drv", "loop", "nbd"):
        with suppress(BenchError):  # built in, or the target says what is missing
            output(["modprobe", "-q", module])
    with (
        tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir="/dev/shm") as home,
        folder_on(disk) as folder,
    ):
        os.environ["TIERBLK_RUN_DIR"] = f"{home}/run"
        _run(Bench(plan, result, Path(home), folder, null_server, progress), sections)


def _run(bench: Bench, sections: Container[str]) -> None:
    served = bench.home / "served"
    served.mkdir()
    with (
        nginx(bench.home / "nginx", served) as address,
        bench.image(served / "hits.raw", bench.plan.hit_mib) as image,
    ):
        url = f"{address}/{image.name}"
        if "hits-tmpfs" in sections:
            hits.measure(bench, "tmpfs", bench.home / "tmpfs", url, image)
        if "hits-memory" in sections:
            hits.measure(bench, "memory", bench.home / "tmpfs", url, image)
        if "hits-disk" in sections and bench.disk:
            hits.measure(bench, "disk", bench.disk / "hits", url, image)
        if "queues" in sections:
            queues.measure(bench, url, image)
        if "devices" in sections:
            devices.measure(bench, url, image)
    if not bench.disk:
        bench.skip("hits, latency, mixed reads and writes on a disk", "TIERBLK_BENCH_DISK names none")
    if "mixed" in sections:
        size_mib = bench.plan.hit_mib + bench.plan.mixed_mib
        with (
            nginx(bench.home / "nginx", served) as address,
            bench.image(served / "mixed.raw", size_mib) as image,
        ):
            for medium, folder in (("tmpfs", bench.home), ("disk", bench.disk)):
                if folder:
                    mixed.measure(bench, medium, folder, f"{address}/{image.name}", image)
    if "misses" in sections:
        medium, folder = ("disk", bench.disk) if bench.disk else ("tmpfs", bench.home)
        with (
            nginx(bench.home / "nginx", served) as address,
            bench.image(served / "misses.raw", bench.plan.miss_mib) as image,
        ):
            misses.measure(bench, medium, folder, f"{address}/{image.name}", image)
    if "memory" in sections:
        memory.measure(bench)
    if "writes-tmpfs" in sections:
        writes.measure(bench, "tmpfs", bench.home)
    if "writes-disk" in sections and bench.disk:
        writes.measure(bench, "disk", bench.disk)
