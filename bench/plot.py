"""A picture of a result: every ratio to a peer, the middle half of its rounds, and what it must reach.

Drawn by matplotlib, which is not needed for anything else here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.bars import Bar, check
from bench.fio import BenchError
from bench.report import TITLES, name_of
from bench.results import FIGURES, PEERS, Ratio, Result

BAR_INCHES = 0.17
WIDTH_INCHES = 11.0
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Line:
    """One bar of the picture."""

    label: str
    peer: str
    ratio: Ratio
    bar: Bar | None

    @property
    def limit(self) -> float | None:
        """What the ratio must reach, or must not pass."""
        if self.bar is None:
            return None
        return self.bar.at_least if self.bar.at_least is not None else self.bar.at_most


def lines(result: Result) -> list[Line]:
    """Every ratio to a peer, in the order of the report."""
    bars = {(each.bar.series, each.bar.peer): each.bar for each in check(result)}
    found = []
    for series in sorted(result.series(), key=_order(result)):
        for peer in result.targets(series):
            ratio = result.ratio(series, peer) if peer in PEERS and series[0] not in FIGURES else None
            if ratio is not None and ratio.value > 0:
                less = " \N{DOWNWARDS ARROW}" if "lower is better" in TITLES.get(series[0], "") else ""
                label = f"{series[0]}{less}, {name_of(series)}, to {peer}"
                found.append(Line(label, peer, ratio, bars.get((series, peer))))
    return found


def _order(result: Result) -> Callable[[tuple[str, str, int, int]], int]:
    """By section, as each first appears."""
    sections = list(dict.fromkeys(section for section, *_ in result.series()))
    return lambda series: sections.index(series[0])


def draw(result: Result, path: Path) -> None:
    """Writes the picture; the name's end says which kind (.svg, .png). Raises BenchError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchError("no picture: matplotlib is not installed (make setup does it)") from None
    drawn = lines(result)
    if not drawn:
        raise BenchError("no picture: this result has no ratio to a peer")
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + BAR_INCHES * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    peers = list(dict.fromkeys(line.peer for line in drawn))
    places = range(len(drawn))
    values = [line.ratio.value for line in drawn]
    axes.barh(
        places,
        [value - 1 for value in values],
        left=1,
        color=[f"C{peers.index(line.peer) % 10}" for line in drawn],
        xerr=[
            [line.ratio.value - line.ratio.low for line in drawn],
            [line.ratio.high - line.ratio.value for line in drawn],
        ],
        error_kw={"elinewidth": 0.8, "ecolor": "0.2"},
    )
    limits = [(place, line.limit) for place, line in enumerate(drawn) if line.limit is not None]
    at = [limit for _, limit in limits]
    axes.plot(at, [place for place, _ in limits], "k|", markersize=9, markeredgewidth=1.8)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [tick for tick in TICKS if min(*values, 1) / 1.5 <= tick <= max(*values, 1) * 1.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(places, [line.label for line in drawn], fontsize=7)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlabel(
        "tierblk to its peer (\N{DOWNWARDS ARROW}: less is better); "
        "whiskers: the middle half of the rounds; black marks: what it must reach"
    )
    axes.set_title(
        f"tierblk {result.commit}, {result.date}, Linux {result.kernel.get('release')}", fontsize=9
    )
    figure.savefig(path)
