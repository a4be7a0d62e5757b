"""No wrong byte: random reads with a cache a tenth of the image, from a server that fails all the time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.torture.leftovers import check_directory
from tests.torture.reader import Readers, anywhere
from tests.torture.rig import MIB, SAY_EACH_S, Rig, rig, say

# Of all requests, about one in eight. What is a bad answer rather than trouble (other-etag and the like) is
# asked for once more and then believed, so an EIO is right if two come in a row: once in 100,000 or so.
FAULTS = (
    "truncate=0.02,error=0.02,busy=0.002:1,reset-head=0.01,reset=0.02,stall-head=0.0005:1,stall=0.0005:1,drip=0.001,"
    "redirect=0.01,hangup=0.02,no-http=0.0002,other-range=0.0002,other-etag=0.0002,no-etag=0.0002,"
    "wrong-length=0.0002,encoding=0.0002,whole=0.0002,drop=0.01"
)
STUCK_S = 120.0
READS_PER_REFUSAL = 50_000
# Not a multiple of a page: the last one is short.
ODD_BYTES = 3 * 512


@dataclass(frozen=True)
class Reads:
    """A run: `count` reads of an image of about image_mib, with a cache a tenth of it (16 MiB at least)."""

    seed: int
    count: int
    image_mib: int = 192
    threads: int = 8
    faults: str = FAULTS
    folder: Path = Path("/cache/torture")
    images: Path = Path("/srv")


def run(plan: Reads) -> dict[str, Any]:
    """Does it; a summary for JSON, of which `wrong` is a list of sentences, empty when all was right."""
    size_bytes = plan.image_mib * MIB + ODD_BYTES
    cache_bytes = max(size_bytes // 10, 16 * MIB)
    say(f"{plan.count} reads of {plan.image_mib} MiB, seed {plan.seed}, faults {plan.faults or 'none'}")
    with rig(plan.folder, plan.images, size_bytes, plan.seed) as stage:
        device = stage.attach(cache_bytes)
        stage.server.control.ask("faults", faults=plan.faults)
        readers = Readers(
            device,
            stage.image,
            anywhere(size_bytes),
            seed=plan.seed,
            count=plan.count,
            threads=plan.threads,
            refusable=True,
        )
        seconds = _watch(readers, stage, plan.count)
        status = stage.status()
        server = stage.server.control.ask("stats")
        wrong = [str(failure) for failure in readers.failures]
        if readers.running:
            wrong.append(f"a read does not end for {readers.longest_wait_s:.0f} s")
        if readers.refused > 1 + plan.count // READS_PER_REFUSAL:
            wrong.append(f"{readers.refused} reads ended in EIO, which is more than bad luck")
        stage.tierblk.run("stop")
        left = check_directory(stage.cache_dir, stage.image)
        wrong += left.wrong
        if readers.done < plan.count and not wrong:
            wrong.append(f"only {readers.done} reads were done")
        return {
            "run": "reads",
            "seed": plan.seed,
            "reads": readers.done,
            "bytes": readers.done_bytes,
            "seconds": round(seconds, 1),
            "reads_per_s": round(readers.done / seconds, 1),
            "slowest_read_s": round(readers.slowest_s, 3),
            "refused": readers.refused,
            "image_bytes": size_bytes,
            "cache_bytes": cache_bytes,
            "device": status["device"],
            "daemon": status["daemon"],
            "server": server,
            "left": {**asdict(left), "wrong": len(left.wrong)},
            "wrong": wrong,
        }


def _watch(readers: Readers, stage: Rig, count: int) -> float:
    """Until all reads are done, or one has hung; how many seconds that took."""
    began_s = time.monotonic()
    readers.start()
    while not readers.wait(SAY_EACH_S):
        seconds = time.monotonic() - began_s
        stats = stage.server.control.ask("stats")
        say(
            f"{readers.done}/{count} reads, {readers.done / seconds:.0f}/s, "
            f"{readers.done_bytes / MIB / seconds:.0f} MiB/s, slowest {readers.slowest_s:.2f} s, "
            f"{len(readers.failures)} wrong; server: {stats['requests']} requests, "
            f"{sum(stats['faults'].values())} faults"
        )
        if readers.longest_wait_s > STUCK_S:
            readers.stop()
            break
    return time.monotonic() - began_s
