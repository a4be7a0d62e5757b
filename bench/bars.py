"""What the figures must at least reach. A missed bar is printed, and is no failure of the run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.results import Ratio, Result

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Bar:
    """For one series: the ratio to `peer`, or the figure itself when there is none. One of the two limits is
    given."""

    series: tuple[str, str, int, int]
    peer: str
    at_least: float | None = None
    at_most: float | None = None

    def meets(self, value: float) -> bool:
        """Whether a ratio or figure is as good as it must be."""
        if self.at_least is not None and value < self.at_least:
            return False
        return self.at_most is None or value <= self.at_most


@dataclass(frozen=True)
class Checked:
    """A bar and what was measured; None when it was not."""

    bar: Bar
    found: Ratio | None

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "meets" if self.bar.meets(self.found.value) else "misses"


def _hits(medium: str, peer: str, *least: tuple[int, float]) -> list[Bar]:
    return [Bar(("hit", medium, kib * KIB, 32), peer, at_least=value) for kib, value in least]


def _writes(section: str, kib: int, depth: int, **least: float) -> list[Bar]:
    """By medium."""
    return [
        Bar((section, medium, kib * KIB, depth), "loop", at_least=value) for medium, value in least.items()
    ]


BARS: Sequence[Bar] = (
    *_hits("tmpfs", "null", (4, 0.70), (16, 0.55), (64, 0.45)),
    *_hits("tmpfs", "loop", (4, 0.80), (16, 0.85), (64, 0.90)),
    *_hits("disk", "loop", (4, 0.80), (16, 0.90), (64, 0.75)),
    *_hits("tmpfs", "nbdkit", (4, 4.0)),
    *(Bar(("latency", medium, 4 * KIB, 1), "loop", at_most=1.5) for medium in ("tmpfs", "memory", "disk")),
    *(Bar(("queues", "tmpfs", kib * KIB, 64), "one queue", at_least=1.5) for kib in (4, 64)),
    Bar(("devices", "tmpfs", 4 * KIB, 160), "one device", at_least=0.9),
    Bar(("memory-idle", "one device", 0, 0), "", at_most=64),
    Bar(("memory-block", "contiguous", 0, 0), "", at_most=40),
    *(Bar(("p99-mixed", medium, 4 * KIB, 1), "idle", at_most=2.0) for medium in ("tmpfs", "disk")),
    *_writes("write", 4, 32, tmpfs=0.80, disk=0.90),
    *_writes("write-stream", 64, 32, tmpfs=0.90, disk=0.75),
    *_writes("fsync", 4, 1, tmpfs=0.7, disk=0.7),
    *_writes("fsync-row", 4, 1, tmpfs=0.4, disk=0.4),
    *(Bar(("p99-writing", medium, 4 * KIB, 1), "idle", at_most=3.0) for medium in ("tmpfs", "disk")),
    *(Bar(("cpu", "native", MIB, depth), "", at_most=1.1) for depth in (1, 4)),
    *(Bar(("cpu", "native, unwritten", MIB, depth), "", at_most=0.8) for depth in (1, 4)),
    *(Bar(("cpu-block", "native", 64 * KIB, depth), "", at_most=300) for depth in (1, 4)),
)


def check(result: Result, bars: Sequence[Bar] = BARS) -> list[Checked]:
    """Every bar, measured or not."""
    return [
        Checked(bar, result.ratio(bar.series, bar.peer) if bar.peer else result.figure(bar.series))
        for bar in bars
    ]
