"""Two queues beside one: two jobs read what is cached, each on a processor of another queue."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import fio
from bench.context import QUEUE_DEPTH, Bench
from bench.null import null_device
from bench.targets import MIB, Target, Tierblk, all_attached

SECTION = "queues"
DEPTH = 32
"""Of each job."""


def one_of_each(lists: Sequence[str], allowed: Set[int]) -> list[int]:
    """For each queue a processor out of its list (`0, 1, 4`, as sysfs says it) that is allowed; a queue that
    has none is left out."""
    found = []
    for text in lists:
        cpus = [int(word) for word in text.split(",") if word.strip()]
        found += [cpu for cpu in cpus if cpu in allowed][:1]
    return found


def _processors(path: str) -> list[int]:
    """Neighbours may share a queue, so which two to take is asked of the kernel."""
    queues = sorted(Path(f"/sys/block/{Path(path).name}/mq").iterdir(), key=lambda queue: int(queue.name))
    return one_of_each([(queue / "cpu_list").read_text() for queue in queues], os.sched_getaffinity(0))


def measure(bench: Bench, url: str, image: Path) -> None:
    """Two devices of one daemon over one cache on a tmpfs, and two null devices. Raises BenchError."""
    if (count := len(os.sched_getaffinity(0))) < 2:
        bench.skip("two queues", f"they need two processors, this kernel has {count}")
        return
    folder = bench.home / "queues"
    devices = [
        Tierblk(
            folder / f"home{queues}",
            folder / "cache",
            url,
            bench.plan.hit_mib * 2,
            name=name,
            device_name=f"queues{queues}",
            queues=queues,
            queue_depth=QUEUE_DEPTH,
        )
        for name, queues in (("one queue", 1), ("tierblk", 2))
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        targets = stack.enter_context(all_attached(devices))
        if (granted := devices[1].status()["queues"]) != 2:
            bench.skip("two queues", f"the driver granted {granted}")
            return
        cpus = _processors(targets[1].path)
        if len(cpus) != 2:
            bench.skip("two queues", "they serve no two processors that this process may run on")
            return
        bench.warm(devices[0], targets[0], image)
        for name, queues in (("null, one queue", 1), ("null", 2)):
            device = null_device(
                bench.null_server,
                size_bytes=bench.plan.hit_mib * MIB,
                depth=QUEUE_DEPTH,
                user_copy=True,
                queues=queues,
            )
            targets.append(Target(name, stack.enter_context(device), os.getpid()))
        for size_kib in bench.plan.queues_kib:
            run = partial(_run, bench, cpus, size_kib * 1024)
            bench.rounds(f"two jobs, {size_kib} KiB x{2 * DEPTH}", targets, run)


def _run(bench: Bench, cpus: list[int], size: int, target: Target, i: int) -> str:
    read = fio.run(
        "queues",
        file=target.path,
        size=bench.plan.hit_mib * MIB,
        bs=size,
        depth=DEPTH,
        runtime_ms=bench.plan.run_ms,
        cpus=",".join(map(str, cpus)),
    )
    bench.sample(SECTION, "tmpfs", target.name, size, 2 * DEPTH, i, read.iops)
    return f"{read.iops:,.0f} IOPS"
