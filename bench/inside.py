"""What runs under a kernel that has ublk, as root: every target set up at once, short runs in
turn, samples out.

`python3 -m bench inside --result FILE [...]`; started by `bench.where`, on whichever kernel that found."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import fio
from bench.fio import BenchError
from bench.null import null_device
from bench.process import Progress, cpu_s, io_workers, output
from bench.results import Result, Sample
from bench.targets import (
    MIB,
    Target,
    Tierblk,
    attached,
    loop,
    make_image,
    nbdkit,
    nginx,
    null_blk,
    read_all,
)

DISK_LABEL = "tierblk-bench"
KIB = 1024
HIT_DEPTH = 32
QUEUE_DEPTH = 64
"""Tags of a device: config.py's default, and the null targets' too."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. Times in ms, sizes in MiB."""

    rounds: int = 5
    run_ms: int = 1000
    sizes_kib: tuple[int, ...] = (4, 16, 64)
    hit_mib: int = 64
    miss_mib: int = 256
    miss_depths: tuple[int, ...] = (1, 4)

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that everything runs; its figures mean little."""
        return cls(rounds=1, run_ms=300, sizes_kib=(4, 64), miss_mib=64, miss_depths=(4,))


class Bench:
    """One run. `home` lies on a tmpfs; `disk` is a folder on a disk's filesystem, if there is one."""

    def __init__(
        self, plan: Plan, result: Result, home: Path, disk: Path | None, null_server: Path, progress: Progress
    ) -> None:
        self.plan = plan
        self.result = result
        self.home = home
        self.disk = disk
        self.null_server = null_server
        self.progress = progress

    def sample(
        self, section: str, medium: str, target: str, size: int, depth: int, i: int, value: float
    ) -> None:
        self.result.samples.append(Sample(section, medium, target, size, depth, i, value))

    def run(self) -> None:
        """Everything, in order. Raises BenchError."""
        served = self.home / "served"
        served.mkdir()
        self.progress("makes the image")
        make_image(served / "hits.raw", self.plan.hit_mib * MIB)
        with nginx(self.home / "nginx", served) as url:
            self.hits("tmpfs", self.home / "tmpfs", f"{url}/hits.raw", served / "hits.raw")
            if self.disk:
                self.hits("disk", self.disk / "hits", f"{url}/hits.raw", served / "hits.raw")
            (served / "hits.raw").unlink()
            make_image(served / "misses.raw", self.plan.miss_mib * MIB)
            where = ("disk", self.disk) if self.disk else ("tmpfs", self.home)
            self.misses(*where, f"{url}/misses.raw", served / "misses.raw")

    # -- hits ---

    def hits(self, medium: str, folder: Path, url: str, image: Path) -> None:
        """IOPS at depth 32, and on tmpfs latency at depth 1, of what is cached."""
        tierblk = Tierblk(self.home / f"tierblk-{medium}", folder / "cache", url, self.plan.hit_mib * 2)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            target = stack.enter_context(attached(tierblk))
            self._warm(tierblk, target, image)
            targets = [target, *self._other_plane(stack, medium, folder, url, image)]
            targets += self._peers(stack, medium, tierblk)
            for size_kib in self.plan.sizes_kib:
                before = tierblk.status()
                self._rounds(medium, targets, size_kib, HIT_DEPTH, self._hit_run)
                self._facts(medium, size_kib, target, before, tierblk.status())
            if medium == "tmpfs":
                self._rounds(medium, [t for t in targets if t.name != "null-copy"], 4, 1, self._latency_run)

    def _other_plane(
        self, stack: ExitStack, medium: str, folder: Path, url: str, image: Path
    ) -> Iterator[Target]:
        """The same on plane copy, where the kernel grants a better one."""
        if self.result.kernel["plane"] == "copy":
            return
        home, cache_dir = self.home / f"tierblk-copy-{medium}", folder / "cache-copy"
        tierblk = Tierblk(home, cache_dir, url, self.plan.hit_mib * 2, name="tierblk-copy", plane="copy")
        target = stack.enter_context(attached(tierblk))
        self._warm(tierblk, target, image)
        yield target

    def _warm(self, tierblk: Tierblk, target: Target, image: Path) -> None:
        self.progress(f"fills {tierblk.cache_dir} and compares every byte")
        with open(image, "rb") as file:
            expected = hashlib.file_digest(file, "sha256").hexdigest()
        if read_all(target.path) != expected:
            raise BenchError(
                f"{target.path} does not hold the bytes of its image: no figure would mean anything"
            )
        tierblk.wait_cached(self.plan.hit_mib * MIB)
        if tierblk.name == "tierblk":
            self.result.kernel["plane"] = tierblk.status()["plane"]

    def _peers(self, stack: ExitStack, medium: str, tierblk: Tierblk) -> Iterator[Target]:
        """On a disk only loop: null has no disk, and nbdkit reads through the page cache."""
        if medium == "tmpfs":
            for name, user_copy in (("null", True), ("null-copy", False)):
                size_bytes = self.plan.hit_mib * MIB
                device = null_device(
                    self.null_server, size_bytes=size_bytes, depth=QUEUE_DEPTH, user_copy=user_copy
                )
                yield Target(name, stack.enter_context(device), os.getpid())
        yield stack.enter_context(loop(tierblk.slots))
        if medium == "tmpfs":
            yield stack.enter_context(nbdkit(self.home, tierblk.slots))
            if (kernels_own := null_blk()) is not None:
                yield kernels_own

    def _rounds(
        self, medium: str, targets: Sequence[Target], size_kib: int, depth: int, run: Callable[..., str]
    ) -> None:
        """Every target in every round, in turn; each round in the other direction, so that none is always
        first."""
        for i in range(self.plan.rounds):
            said = []
            for target in targets if i % 2 == 0 else reversed(targets):
                said.append(f"{target.name} {run(medium, target, size_kib * KIB, depth, i)}")
                self.progress(
                    f"{medium} {size_kib} KiB x{depth} round {i + 1}/{self.plan.rounds}: {said[-1]}"
                )

    def _hit_run(self, medium: str, target: Target, size: int, depth: int, i: int) -> str:
        before_s = cpu_s(target.pid) if target.pid else 0.0
        read = fio.run(
            "hits",
            file=target.path,
            size=self.plan.hit_mib * MIB,
            bs=size,
            depth=depth,
            runtime_ms=self.plan.run_ms,
        )
        self.sample("hit", medium, target.name, size, depth, i, read.iops)
        if target.pid:
            cpu_us = (cpu_s(target.pid) - before_s) * 1e6
            self.sample("cpu-hit", medium, target.name, size, depth, i, cpu_us / max(read.requests, 1))
        return f"{read.iops:,.0f} IOPS"

    def _latency_run(self, medium: str, target: Target, size: int, depth: int, i: int) -> str:
        read = fio.run(
            "latency", file=target.path, size=self.plan.hit_mib * MIB, bs=size, runtime_ms=self.plan.run_ms
        )
        self.sample("latency", medium, target.name, size, depth, i, read.mean_us)
        self.sample("p99", medium, target.name, size, depth, i, read.p99_us)
        return f"{read.mean_us:.1f} us"

    def _facts(
        self, medium: str, size_kib: int, target: Target, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
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
        self.result.facts[f"hit {medium} {size_kib} KiB"] = facts

    # -- misses ---

    def misses(self, medium: str, folder: Path, url: str, image: Path) -> None:
        """A cold sequential read against curl, to the same filesystem; CPU of the daemon and of curl a GB."""
        file, size = folder / "curl.out", image.stat().st_size
        for i in range(self.plan.rounds):
            took_s, curl_cpu_s = curl(url, file)
            file.unlink()
            self._miss_sample(medium, "curl", 1, i, size, took_s, curl_cpu_s)
            for depth in self.plan.miss_depths:
                cache_dir = folder / "cold"
                tierblk = Tierblk(self.home / "tierblk-cold", cache_dir, url, size // MIB * 5 // 4 + 64)
                try:
                    with attached(tierblk) as target:
                        self._miss_run(medium, tierblk, target, depth, i, size)
                finally:
                    shutil.rmtree(cache_dir, ignore_errors=True)

    def _miss_run(self, medium: str, tierblk: Tierblk, target: Target, depth: int, i: int, size: int) -> None:
        assert target.pid is not None
        before_s = cpu_s(target.pid)
        read = fio.run("misses", file=target.path, size=size, depth=depth)
        tierblk.wait_cached(size)
        self._miss_sample(
            medium, "tierblk", depth, i, size, size / read.bytes_per_s, cpu_s(target.pid) - before_s
        )
        status = tierblk.status()
        self.result.facts[f"miss {medium} x{depth}"] = {
            "remote_requests": float(status["remote_requests"]),
            "fetched_share": float(status["fetched_bytes"]) / size,
        }

    def _miss_sample(
        self, medium: str, name: str, depth: int, i: int, size: int, took_s: float, used_s: float
    ) -> None:
        # curl has no depth: it stands beside each of ours, so that every series has its peer.
        depths = self.plan.miss_depths if name == "curl" else (depth,)
        for each in depths:
            self.sample("miss", medium, name, MIB, each, i, size / took_s / 1e6)
            self.sample("cpu", medium, name, MIB, each, i, used_s / (size / 1e9))
        self.progress(
            f"misses, {medium}, round {i + 1}/{self.plan.rounds}: {name} x{depth} "
            f"{size / took_s / 1e6:.0f} MB/s, {used_s / (size / 1e9):.2f} CPU-s/GB"
        )


def curl(url: str, file: Path) -> tuple[float, float]:
    """(seconds, CPU-seconds) of `curl -o FILE URL`."""
    began_s = time.monotonic()
    process = subprocess.Popen(["curl", "-sS", "-f", "-o", str(file), url])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"curl ended with status {process.returncode}")
    return time.monotonic() - began_s, usage.ru_utime + usage.ru_stime


@contextmanager
def _disk(name: str | None) -> Iterator[Path | None]:
    """A folder on a disk: below `name` if that is a folder; if it is a block device, on an ext4 made on it.
    Only an empty device, or one that this made before, is ever formatted."""
    if name is None:
        yield None
        return
    path = Path(name)
    if path.is_dir():
        with tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir=path) as folder:
            yield Path(folder)
        return
    if not path.is_block_device():
        raise BenchError(f"TIERBLK_BENCH_DISK: {name} is neither a folder nor a block device")
    found = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "TYPE", str(path)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if found and DISK_LABEL not in found:
        raise BenchError(
            f"TIERBLK_BENCH_DISK: {name} is not empty ({' '.join(found)}); it would be overwritten"
        )
    output(["mkfs.ext4", "-q", "-F", "-L", DISK_LABEL, "-E", "lazy_itable_init=0,lazy_journal_init=0", path])
    with tempfile.TemporaryDirectory(prefix="tierblk-bench-") as mount:
        output(["mount", path, mount])
        try:
            yield Path(mount)
        finally:
            output(["umount", mount])


def measure(plan: Plan, result: Result, disk: str | None, null_server: Path, progress: Progress) -> None:
    """Runs the plan under this kernel and puts what it finds into `result`. Raises BenchError."""
    release, cpus = os.uname().release, os.cpu_count() or 1
    result.kernel.update(release=release, cpus=cpus)
    for module in ("ublk_drv", "loop", "nbd"):
        with suppress(BenchError):  # built in, or the target says what is missing
            output(["modprobe", "-q", module])
    with tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir="/dev/shm") as home, _disk(disk) as folder:
        os.environ["TIERBLK_RUN_DIR"] = f"{home}/run"
        Bench(plan, result, Path(home), folder, null_server, progress).run()
