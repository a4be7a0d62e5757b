"""What every section of a run under a kernel with ublk shares: the plan, where things lie, and the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.fio import BenchError
from bench.plan import Plan
from bench.process import Progress
from bench.results import Result, Sample
from bench.targets import MIB, Target, Tierblk, make_image, read_all

QUEUE_DEPTH = 128
"""Tags of a device, the null targets' too: no read of a hit run waits for one."""


@dataclass(frozen=True)
class Bench:
    """One run. `home` lies on a tmpfs; `disk` is a folder on a disk's filesystem, if there is one;
    `null_server` is the compiled bench/null.c."""

    plan: Plan
    result: Result
    home: Path
    disk: Path | None
    null_server: Path
    progress: Progress

    def sample(
        self, section: str, medium: str, target: str, size: int, depth: int, i: int, value: float
    ) -> None:
        """Keeps one figure of round `i`; size in bytes."""
        self.result.samples.append(Sample(section, medium, target, size, depth, i, value))

    def skip(self, what: str, why: str) -> None:
        """Leaves something out, and says so."""
        self.result.skipped[what] = why
        self.progress(f"leaves out {what}: {why}")

    def rounds(self, what: str, targets: Sequence[Target], run: Callable[[Target, int], str]) -> None:
        """Every target in every round, in turn; each round in the other direction, so that none is always
        first. `run` is given the round, and answers what it found in a few words."""
        for i in range(self.plan.rounds):
            for target in targets if i % 2 == 0 else reversed(targets):
                said = run(target, i)
                self.progress(f"{what} round {i + 1}/{self.plan.rounds}: {target.name} {said}")

    @contextmanager
    def image(self, path: Path, size_mib: int) -> Iterator[Path]:
        """An image of that size, for the length of the block."""
        self.progress(f"makes an image of {size_mib} MiB")
        make_image(path, size_mib * MIB)
        try:
            yield path
        finally:
            path.unlink()

    def warm(self, tierblk: Tierblk, target: Target, image: Path) -> None:
        """Reads the whole device, so that all of it is cached, and compares every byte. Raises BenchError."""
        self.progress(f"fills {tierblk.cache_dir} and compares every byte")
        with open(image, "rb") as file:
            expected = hashlib.file_digest(file, "sha256").hexdigest()
        if read_all(target.path) != expected:
            raise BenchError(
                f"{target.path} does not hold the bytes of its image: no figure would mean anything"
            )
        tierblk.wait_cached(self.plan.hit_mib * MIB)
