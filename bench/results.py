"""What was measured, and what may be said of it. Pure: no files, no clock, no devices.

A sample is one short run of one target. The targets of a series run one after the other in every round, so
what disturbs the machine for longer than a round disturbs them alike; a ratio is therefore made inside each
round, and its median over the rounds is the figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

FORMAT = 1
SUBJECT = "tierblk"
PEERS = (
    "null", "loop", "nbdkit", "nbdkit+cache", "qemu", "bare", "curl", "one queue", "one device", "idle",
    "beside curl",
)  # fmt: skip
"""What ratios are made to. Other targets stand beside them for orientation."""
CHANGE_MIN = 0.03
"""A smaller change of a figure is never called one: two runs of one binary differ by as much."""
ROUNDS_MIN = 3
"""With fewer rounds in either result nothing can be said about noise."""


@dataclass(frozen=True)
class Figure:
    """Something that is told by itself, not as a ratio to a peer. `noise`: a relative change that is none;
    None where rounds have to say."""

    title: str
    unit: str
    noise: float | None


FIGURES = {
    "memory-idle": Figure("memory of a daemon with an empty cache and an idle device", "MiB", 0.03),
    "memory-warm": Figure("memory of the same after it passed on what is not cached", "MiB", 0.03),
    "memory-block": Figure("memory that a cached block of 64 KiB adds", "bytes", 0.05),
    "devices-share": Figure("what the least served of ten devices gets, to their mean", "", None),
    "boot-bytes": Figure("a boot, replayed: bytes fetched for each byte read for the first time", "", 0.0),
    "boot-gets": Figure("a boot, replayed: requests", "", 0.0),
    "boot-wait": Figure("a boot, replayed: wait for a link of 20 ms and 1 Gbit/s", "s", 0.0),
}
"""By section. Counted, or a share: another machine finds nearly the same."""


@dataclass(frozen=True)
class Sample:
    """`section`: hit (IOPS), latency (us), p99 (us), miss (MB/s), cpu (CPU-seconds per GB of the server),
    cpu-hit (CPU us a request), cpu-block (CPU us a block), queues and devices (IOPS), p99-mixed and
    p99-writing (us), write, fsync and fsync-row (IOPS), write-stream (MB/s), cold-random (IOPS), cold-cpu
    (CPU us a read), cold-stream (MB/s), or one of FIGURES. `medium`: where the cache is, or native; the
    pattern of cold reads. `size_bytes` of a request, `depth`: both 0 where there is none; `round` from 0."""

    section: str
    medium: str
    target: str
    size_bytes: int
    depth: int
    round: int
    value: float

    @property
    def series(self) -> tuple[str, str, int, int]:
        return self.section, self.medium, self.size_bytes, self.depth


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a ratio over the rounds."""

    value: float
    low: float
    high: float
    rounds: int


@dataclass
class Result:
    """One run of the benchmark; what is kept as JSON. `facts`: counts that are no timings, by series and
    name. `skipped`: what was left out, and why."""

    date: str
    commit: str
    kernel: dict[str, Any]
    settings: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    host_load: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """ValueError when it is not a result of this format."""
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"this is no benchmark result of format {FORMAT}")
        try:
            document["samples"] = [Sample(**sample) for sample in document["samples"]]
            return cls(**document)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this benchmark result lacks something: {error}") from None

    def series(self) -> list[tuple[str, str, int, int]]:
        """Every series, in the order of measuring."""
        return list(dict.fromkeys(sample.series for sample in self.samples))

    def values(self, series: tuple[str, str, int, int], target: str) -> dict[int, float]:
        """By round."""
        return {s.round: s.value for s in self.samples if s.series == series and s.target == target}

    def targets(self, series: tuple[str, str, int, int]) -> list[str]:
        return list(dict.fromkeys(s.target for s in self.samples if s.series == series))

    def ratio(self, series: tuple[str, str, int, int], peer: str) -> Ratio | None:
        """The subject's value over the peer's; None when no round has both."""
        return ratio(self.values(series, SUBJECT), self.values(series, peer))

    def figure(self, series: tuple[str, str, int, int]) -> Ratio | None:
        """The subject's value itself; None when there is none."""
        values = self.values(series, SUBJECT)
        return ratio(values, dict.fromkeys(values, 1.0))


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> Ratio | None:
    """Of the rounds that both have, by round; None when there is none, or only zeros to divide by."""
    each = sorted(ours[i] / theirs[i] for i in ours.keys() & theirs.keys() if theirs[i] > 0)
    if not each:
        return None
    return Ratio(median(each), quantile(each, 0.25), quantile(each, 0.75), len(each))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the neighbours; `ordered` ascending and not empty, 0 <= share <= 1."""
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Change:
    """A ratio in two results, or a figure (`peer` is empty). `verdict`: same, up, down, or unknown (too few
    rounds)."""

    series: tuple[str, str, int, int]
    peer: str
    before: Ratio
    after: Ratio
    verdict: str

    @property
    def relative(self) -> float:
        return self.after.value / self.before.value - 1


def verdict(before: Ratio, after: Ratio) -> str:
    """A change is one when it is at least CHANGE_MIN and the middle halves of the rounds do not overlap."""
    if min(before.rounds, after.rounds) < ROUNDS_MIN:
        return "unknown"
    if abs(after.value / before.value - 1) < CHANGE_MIN:
        return "same"
    if after.low > before.high:
        return "up"
    return "down" if after.high < before.low else "same"


def figure_verdict(before: Ratio, after: Ratio, noise: float | None) -> str:
    """The same for a figure; most need no rounds."""
    if noise is None:
        return verdict(before, after)
    if abs(after.value - before.value) <= noise * before.value:
        return "same"
    return "up" if after.value > before.value else "down"


def compare(before: Result, after: Result) -> list[Change]:
    """Every ratio that both results have, and every figure. No other absolute ones: they change with the
    machine's mood."""
    changes = []
    for series in before.series():
        if (known := FIGURES.get(series[0])) is not None:
            was, is_now = before.figure(series), after.figure(series)
            if was is not None and is_now is not None and was.value > 0:
                found = figure_verdict(was, is_now, known.noise)
                changes.append(Change(series, "", was, is_now, found))
            continue
        for peer in before.targets(series):
            old, new = before.ratio(series, peer), after.ratio(series, peer)
            if peer in PEERS and old is not None and new is not None and old.value > 0:
                changes.append(Change(series, peer, old, new, verdict(old, new)))
    return changes


def load_summary(loads: Iterable[float]) -> dict[str, float]:
    """Load averages of the machine while it measured; empty when none was taken."""
    ordered = sorted(loads)
    if not ordered:
        return {}
    return {"min": ordered[0], "median": median(ordered), "max": ordered[-1]}
