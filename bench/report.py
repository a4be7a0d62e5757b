"""The tables that people read."""

from __future__ import annotations

from collections.abc import Sequence

from bench.bars import Bar, check
from bench.results import FIGURES, PEERS, SUBJECT, Change, Ratio, Result

TITLES = {
    "hit": "hits, random reads (IOPS, higher is better)",
    "latency": "latency of a hit at depth 1 (us, mean; lower is better)",
    "p99": "latency of a hit at depth 1 (us, 99 % are faster; lower is better)",
    "queues": "two queues beside one, hits by two jobs on two processors (IOPS, higher is better)",
    "devices": "ten devices of one daemon beside one, hits by ten jobs (IOPS in total, higher is better)",
    "p99-mixed": "latency of a hit at depth 1 while misses stream (us, 99 % are faster; lower is better)",
    "write": "random writes of what was written before (IOPS, higher is better)",
    "write-stream": "writes from end to end of what was written before (MB/s, higher is better)",
    "fsync": "random writes with an fsync after each, no row changed (IOPS, higher is better)",
    "fsync-row": "writes with an fsync after each, a row changed by each (IOPS, higher is better)",
    "p99-writing": "latency of a hit at depth 1 beside writes (us, 99 % are faster; lower is better)",
    "cpu-block": "CPU of a cold random read of one block (us of the daemon or of curl; lower is better)",
    "miss": "misses, cold sequential read in 1 MiB pieces (MB/s, higher is better)",
    "cpu": "CPU of a miss (CPU-seconds of the server or of curl per GB; lower is better)",
    "cold-random": "cold random reads of 4 KiB, 20 ms a request (IOPS, higher is better)",
    "cold-cpu": "CPU of a cold random read (us of the daemon; lower is better)",
    "cold-stream": "cold reads through 20 ms and 1 Gbit/s (MB/s, higher is better)",
    "cpu-hit": "CPU of a hit (us of the server a request; lower is better)",
    "instructions": "instructions a hit (lower is better; user mode of the server, and the kernel)",
}
Row = list[str]


def number(value: float) -> str:
    """Three figures that matter: 0.412, 5.27, 48.1, 6,810, 71,300."""
    if value >= 1000:
        return f"{round(value, -2 if value >= 10_000 else -1):,.0f}"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    spread = f" ({ratio.low:.2f}-{ratio.high:.2f})" if ratio.rounds > 1 else ""
    return f"{ratio.value:.2f}{spread}"


def columns(rows: Sequence[Row]) -> str:
    """Rows of cells under each other: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def name_of(series: tuple[str, str, int, int]) -> str:
    """Medium, size and depth, for people."""
    _, medium, size_bytes, depth = series
    if not size_bytes:
        return medium
    size = f"{size_bytes // 1024} KiB" if size_bytes < 1 << 20 else f"{size_bytes >> 20} MiB"
    return f"{medium} {size} x{depth}"


def _median(result: Result, series: tuple[str, str, int, int], target: str) -> str:
    values = sorted(result.values(series, target).values())
    if not values:
        return ""
    middle = len(values) // 2
    return number(values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2)


def _section(result: Result, section: str) -> str:
    all_series = [series for series in result.series() if series[0] == section]
    targets = list(dict.fromkeys(t for series in all_series for t in result.targets(series)))
    peers = [target for target in targets if target in PEERS]
    rows = [["", *targets, *(f"to {peer}" for peer in peers)]]
    for series in all_series:
        figures = [_median(result, series, target) for target in targets]
        rows.append([name_of(series), *figures, *(_ratio(result.ratio(series, peer)) for peer in peers)])
    return f"{TITLES.get(section, section)}\n{columns(rows)}"


def _figures(result: Result) -> str:
    """What has no peer, a line each; another target's beside it for orientation."""
    rows, beside = [["figures", ""]], [""]
    for series in result.series():
        if (known := FIGURES.get(series[0])) is None:
            continue
        others = [target for target in result.targets(series) if target != SUBJECT]
        beside.append("; ".join(f"{target} {_median(result, series, target)}" for target in others))
        rows.append([f"  {known.title}", f"{_median(result, series, SUBJECT)} {known.unit}".strip()])
    if len(rows) == 1:
        return ""
    lines = zip(columns(rows).splitlines(), beside, strict=True)
    return "\n".join(f"{line}   ({others})" if others else line for line, others in lines)


def _limit(bar: Bar) -> str:
    if bar.at_least is not None:
        return f"at least {bar.at_least:g}"
    return f"at most {bar.at_most:g}"


def _bars(result: Result) -> str:
    """Nothing when none of them was measured."""
    rows, unmeasured = [["bars", "", "", ""]], 0
    for each in check(result):
        bar = each.bar
        if each.found is None:
            unmeasured += 1
            continue
        what = f"  {bar.series[0]} {name_of(bar.series)}" + (f" to {bar.peer}" if bar.peer else "")
        rows.append([what, number(each.found.value), _limit(bar), each.verdict])
    if len(rows) == 1:
        return ""
    return columns(rows) + (f"\n  {unmeasured} more were not measured" if unmeasured else "")


def _skipped(result: Result) -> str:
    lines = [f"  {what}: {why}" for what, why in result.skipped.items()]
    return "\n".join(["left out", *lines]) if lines else ""


def _facts(result: Result) -> str:
    lines = []
    for name, facts in result.facts.items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {value:,.6g}" for key, value in facts.items()))
    return "\n".join(["counts", *lines]) if lines else ""


def table(result: Result) -> str:
    """The whole report."""
    kernel, load = result.kernel, result.host_load
    head = f"tierblk {result.commit}, {result.date}: Linux {kernel.get('release')}, {kernel.get('where')}, "
    head += f"{kernel.get('cpus')} CPUs, plane {kernel.get('plane')}"
    if load:
        head += f"\nload of the machine meanwhile: {load['min']:.1f} to {load['max']:.1f},"
        head += f" median {load['median']:.1f}"
    rounds = result.settings.get("rounds")
    head += f"\nmedian of {rounds} rounds; a ratio, of tierblk to a peer, is made within each"
    head += " round; in brackets the middle half of the rounds"
    names = dict.fromkeys(s.section for s in result.samples if s.section not in FIGURES)
    parts = [head, *(_section(result, name) for name in names)]
    parts += [_figures(result), _bars(result), _skipped(result), _facts(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def changes(found: Sequence[Change]) -> str:
    """A comparison of two results: what changed beyond noise first, then the rest."""
    if not found:
        return "the two results have no figure in common\n"
    ordered = sorted(found, key=lambda change: change.verdict in ("same", "unknown"))
    rows = [["ratio of tierblk", "to", "before", "after", "change", ""]]
    for change in ordered:
        rows.append(
            [
                f"{change.series[0]} {name_of(change.series)}",
                change.peer or "(itself)",
                _ratio(change.before),
                _ratio(change.after),
                f"{change.relative:+.0%}",
                {"same": "within noise", "unknown": "too few rounds to tell"}.get(
                    change.verdict, change.verdict
                ),
            ]
        )
    return columns(rows) + "\n"
