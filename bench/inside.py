"""What runs under a kernel that has ublk, as root: its sections, one after the other.

`python3 -m bench inside --result FILE [...]`; started by `bench.where`, on whichever kernel that found."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from bench import devices, hits, memory, misses, mixed, queues
from bench.context import Bench
from bench.disk import folder_on
from bench.fio import BenchError
from bench.plan import Plan
from bench.process import Progress, output
from bench.results import Result
from bench.targets import MIB, make_image, nginx


def measure(plan: Plan, result: Result, disk: str | None, null_server: Path, progress: Progress) -> None:
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
        _run(Bench(plan, result, Path(home), folder, null_server, progress))


def _run(bench: Bench) -> None:
    served = bench.home / "served"
    served.mkdir()
    bench.progress("makes the image")
    image = served / "hits.raw"
    make_image(image, bench.plan.hit_mib * MIB)
    with nginx(bench.home / "nginx", served) as address:
        url = f"{address}/{image.name}"
        hits.measure(bench, "tmpfs", bench.home / "tmpfs", url, image)
        if bench.disk:
            hits.measure(bench, "disk", bench.disk / "hits", url, image)
        else:
            bench.skip("hits, latency and mixed reads on a disk", "TIERBLK_BENCH_DISK names none")
        queues.measure(bench, url, image)
        devices.measure(bench, url, image)
        image.unlink()
        image = served / "mixed.raw"
        make_image(image, (bench.plan.hit_mib + bench.plan.mixed_mib) * MIB)
        for medium, folder in (("tmpfs", bench.home), ("disk", bench.disk)):
            if folder:
                mixed.measure(bench, medium, folder, f"{address}/{image.name}", image)
        image.unlink()
        image = served / "misses.raw"
        make_image(image, bench.plan.miss_mib * MIB)
        medium, folder = ("disk", bench.disk) if bench.disk else ("tmpfs", bench.home)
        misses.measure(bench, medium, folder, f"{address}/{image.name}", image)
        image.unlink()
    memory.measure(bench)
