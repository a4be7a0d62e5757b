"""What runs in the VM whose instructions are counted: the targets, and bench/hitter.c on each of them in
turn.

`python3 -m bench counted --result FILE [...]`; started by `bench.instructions`. What was counted is known
outside only: here a sample's value is the number of answers in its stretch, and the order of the samples is
that of the counts."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.fio import BenchError
from bench.null import null_device
from bench.process import Progress, output
from bench.results import Result, Sample
from bench.targets import MIB, Target, Tierblk, attached, loop, make_image, nginx, read_all

KIB = 1024
QUEUE_DEPTH = 64
"""Tags of a device: config.py's default, and the null targets' too."""
IMAGE_MIB = 16
CACHE_MIB = 64
RUN_LIMIT_S = 600.0
"""Of one stretch, by the guest's clock, which runs by instructions."""
ContextTarget = Callable[[], AbstractContextManager[Target]]
"""A target that is there for the length of a block."""
ANSWERS, MEDIUM = "answers", "tmpfs"


@dataclass(frozen=True)
class Load:
    """Reads of `size_kib`, so many at once, so many counted after so many that are not."""

    size_kib: int
    depth: int
    warm: int
    count: int


@dataclass(frozen=True)
class Plan:
    """How much is counted."""

    rounds: int = 5
    loads: tuple[Load, ...] = (Load(4, 1, 500, 5_000), Load(4, 32, 2_000, 20_000), Load(64, 32, 500, 5_000))

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that everything runs."""
        return cls(rounds=1, loads=(Load(4, 1, 100, 500), Load(64, 32, 100, 500)))


@dataclass(frozen=True)
class Tools:
    """Compiled outside: the null server and the hitter. `other`: a folder with the tierblk that is measured
    instead of this checkout's; trace: count also while `tierblk trace` looks for misses."""

    null_server: Path
    hitter: Path
    other: Path | None = None
    trace: bool = False


def _warm(stack: ExitStack, tierblk: Tierblk, image: Path, progress: Progress) -> Target:
    """The device, with everything in the cache and every byte compared."""
    progress(f"attaches {tierblk.name}, fills its cache and compares every byte")
    target = stack.enter_context(attached(tierblk))
    with open(image, "rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()
    if read_all(target.path) != expected:
        raise BenchError(f"{target.path} does not hold the bytes of its image: no figure would mean anything")
    tierblk.wait_cached(image.stat().st_size)
    return target


def _peers(stack: ExitStack, null_server: Path, slots: Path) -> Iterator[Target]:
    for name, user_copy in (("null", True), ("null-copy", False)):
        device = null_device(null_server, size_bytes=IMAGE_MIB * MIB, depth=QUEUE_DEPTH, user_copy=user_copy)
        yield Target(name, stack.enter_context(device), os.getpid())
    yield stack.enter_context(loop(slots))


def _misses(tierblk: Tierblk) -> int:
    status = tierblk.status()
    return int(status["miss_requests"]) + int(status["errors"])


def _as_it_is(target: Target) -> ContextTarget:
    return lambda: nullcontext(target)


@contextmanager
def _traced(target: Target, tierblk: Tierblk) -> Iterator[Target]:
    """The same device, of which each request is recorded and looked at, and none is shown."""
    words = ["trace", tierblk.device_name, "--cache-dir", str(tierblk.cache_dir), "--tier", "miss"]
    with subprocess.Popen([sys.executable, "-m", "tierblk", *words], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise BenchError("`tierblk trace` ended before it began")
            yield replace(target, name=f"{target.name}-traced")
        finally:
            process.send_signal(signal.SIGINT)


def _rounds(
    plan: Plan, targets: Sequence[ContextTarget], hitter: Path, result: Result, progress: Progress
) -> None:
    """Every load on every target, a process of the hitter each."""
    for i in range(plan.rounds):
        for load in plan.loads:
            size = load.size_kib * KIB
            for context in targets:
                with context() as target:
                    name = target.name
                    progress(f"round {i + 1}/{plan.rounds}: {load.size_kib} KiB x{load.depth} of {name}")
                    words = [target.path, IMAGE_MIB * MIB, size, load.depth, load.warm, load.count]
                    answers = float(output([hitter, *map(str, words)], limit_s=RUN_LIMIT_S))
                    result.samples.append(Sample(ANSWERS, MEDIUM, name, size, load.depth, i, answers))


def measure(plan: Plan, result: Result, tools: Tools, progress: Progress) -> None:
    """Everything, on this kernel; into `result` what the counts outside belong to. Raises BenchError."""
    result.kernel.update(release=os.uname().release, cpus=os.cpu_count() or 1)
    for module in ("ublk_drv", "loop"):
        with suppress(BenchError):  # built in, or the target says what is missing
            output(["modprobe", "-q", module])
    with tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir="/dev/shm") as name, ExitStack() as stack:
        home = Path(name)
        os.environ["TIERBLK_RUN_DIR"] = f"{home}/run"
        served = home / "served"
        served.mkdir()
        image = served / "hits.raw"
        make_image(image, IMAGE_MIB * MIB)
        url = f"{stack.enter_context(nginx(home / 'nginx', served))}/hits.raw"
        # What is started from here on is another tierblk; this process, with the null server in it, is not.
        if tools.other:
            os.environ["PYTHONPATH"] = os.pathsep.join([str(tools.other), os.environ.get("PYTHONPATH", "")])
        ours = [Tierblk(home / "tierblk", home / "cache", url, CACHE_MIB)]
        targets = [_warm(stack, ours[0], image, progress)]
        result.kernel["plane"] = ours[0].status()["plane"]
        if result.kernel["plane"] != "copy":
            folders = home / "tierblk-copy", home / "cache-copy"
            ours.append(Tierblk(*folders, url, CACHE_MIB, name="tierblk-copy", plane="copy"))
            targets.append(_warm(stack, ours[1], image, progress))
        targets += _peers(stack, tools.null_server, ours[0].slots)
        contexts: list[ContextTarget] = [_as_it_is(target) for target in targets]
        if tools.trace:
            contexts.insert(1, partial(_traced, targets[0], ours[0]))
        before = [_misses(tierblk) for tierblk in ours]
        _rounds(plan, contexts, tools.hitter, result, progress)
        if before != [_misses(tierblk) for tierblk in ours]:
            raise BenchError("something missed or failed among reads of what is cached")
