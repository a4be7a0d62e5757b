"""Shows each request of a device as it ends: when it came, what it asked for, which tier served it and how
long that took. It costs nothing while nobody looks, and little while somebody does.

Ends with Ctrl-C, --count or --duration, and says on stderr what there was in all. The tier is what served a
request: hit, memory (a hit in memory), zero (nothing to read), miss (the remote), write, flush. With --json:
a line of JSON for each request. What comes faster than it can be shown is lost, and counted; --tier, --op,
--slower and --range choose inside the daemon, so that little is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlencode

from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout, duration
from tierblk.cli.byterange import FORMS, range_argument
from tierblk.cli.client import Daemon, DeadSocket, device_path, find_device
from tierblk.cli.output import put_table, say
from tierblk.errors import DaemonError, TierblkError
from tierblk.latency import LATENCY_BUCKETS, OPERATIONS, TIERS, Latencies, bucket_of
from tierblk.units import format_size, parse_duration

NAME = "trace"
HELP = "show each request of a device"

_TICK_S = 1e-7
_COLOURS = {
    "hit": "32",
    "memory": "36",
    "zero": "2",
    "miss": "33",
    "write": "34",
    "flush": "35",
    "error": "31",
}
_HEADER = f"{'time':15}  {'op':7}  {'offset':>14}  {'length':>10}  {'tier':6}  {'latency':>8}  error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, what to show, and for how long."""
    parser.add_argument("name", metavar="NAME", help="the device's name in its config")
    operations = tuple(op for op in OPERATIONS if op)
    parser.add_argument("--tier", action="append", choices=TIERS, help="only this one's; may be repeated")
    parser.add_argument("--op", action="append", choices=operations, help="only these; may be repeated")
    parser.add_argument(
        "--slower", type=_latency, metavar="DURATION", help='only those that took as long, such as "10ms"'
    )
    parser.add_argument(
        "--range",
        dest="within",
        type=range_argument,
        metavar="RANGE",
        help=f"only those that touch these bytes: {FORMS}",
    )
    parser.add_argument("--count", type=_count, metavar="N", help="end after so many")
    parser.add_argument("--duration", type=duration, metavar="DURATION", help="end after so long")
    parser.add_argument("--summary", action="store_true", help="only how many there were, and how fast")
    add_cache_dir(parser, "where several caches have a device of this name")
    add_json(parser)
    add_timeout(parser)


def _latency(text: str) -> float:
    """Microseconds; these too may be given, which settings have no use for."""
    try:
        number, unit = text.removesuffix("us").strip(), text.endswith("us")
        if unit:
            return parse_duration(f"{number}ms") * 1000
        return parse_duration(text) * 1e6
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:19]) > 0 and len(text) < 20):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r:.60}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Prints lines until something ends it."""
    daemon, device = find_device(args.name, args.cache_dir, args.timeout_s)
    summary = Summary()
    lines = _documents(daemon, args)
    why = "interrupted"
    try:
        if args.summary:
            why = _watch(lines, summary, None)
        else:
            why = _watch(lines, summary, _JsonLines() if args.json else _Lines())
    except KeyboardInterrupt:
        pass  # its usual end
    except TierblkError:
        _conclude(summary, args)
        raise
    if why == "detached":
        say(f"tierblk: {device['name']} was detached")
    _conclude(summary, args)
    if why == "stopping":
        raise DaemonError(f"{daemon} was stopped", "trace the device again when it is attached again")
    return 0


def _documents(daemon: Daemon, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What the daemon sends, in the pieces in which it comes, until the time is over."""
    query: dict[str, str] = {}
    for key, value in (("op", args.op), ("tier", args.tier)):
        if value:
            query[key] = ",".join(value)
    if args.slower:
        query["min_latency_us"] = str(math.ceil(args.slower))
    if args.within:
        within = args.within.clamp((1 << 63) - 1)  # of "all"
        query["offset_bytes"], query["length_bytes"] = str(within.offset), str(within.length)
    if args.count:
        query["limit"] = str(args.count)
    path = f"{device_path(args.name)}/trace?{urlencode(query)}"
    deadline_s = time.monotonic() + args.duration if args.duration else math.inf
    try:
        yield from daemon.stream(path, deadline_s)
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked") from None


def _watch(
    pieces: Iterable[list[dict[str, Any]]], summary: Summary, shown: _Lines | _JsonLines | None
) -> str:
    """Why it ended: "limit", "detached", "stopping", or "time"."""
    for piece in pieces:
        for document in piece:
            if "end" in document:
                if shown:
                    shown.flush()
                return str(document["end"])
            summary.add(document)
            if shown:
                shown.add(document)
        if shown:
            shown.flush()
    return "time"


class _JsonLines:
    """As they came."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, document: dict[str, Any]) -> None:
        self._lines.append(json.dumps(document) + "\n")

    def flush(self) -> None:
        """One write for all that came at once."""
        lines, self._lines = self._lines, []
        if lines:
            sys.stdout.write("".join(lines))
            sys.stdout.flush()


class _Lines(_JsonLines):
    """For people, in colour where that is a terminal's."""

    def __init__(self) -> None:
        super().__init__()
        dumb = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self._coloured = sys.stdout.isatty() and not dumb
        self._lines.append(_HEADER + "\n")  # shown with the first answer: from then on all is recorded

    def add(self, document: dict[str, Any]) -> None:
        if "lost" in document:
            line, kind = f"... {document['lost']} more were lost", "error"
        else:
            line, kind = line_of(document), "error" if document["error"] else str(document["tier"])
        if self._coloured and kind in _COLOURS:
            line = f"\x1b[{_COLOURS[kind]}m{line}\x1b[0m"
        self._lines.append(line + "\n")


def line_of(document: dict[str, Any]) -> str:
    """A request, in 80 columns, unless it has an error's long name."""
    seconds, micros = divmod(round(document["time"] * 1e6), 1_000_000)
    when = f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{micros:06}"
    length = format_size(document["length_bytes"]) if document["op"] != "flush" else "-"
    offset = document["offset_bytes"] if document["op"] != "flush" else "-"
    took, tier = _short(document["latency_us"]), document["tier"] or "-"
    error = document["error"] or ""
    return f"{when}  {document['op']:7}  {offset:>14}  {length:>10}  {tier:6}  {took:>8}  {error}".rstrip()


def _short(us: float) -> str:
    """Three digits and a unit: "1.25 ms"."""
    for unit, divisor in (("s", 1e6), ("ms", 1e3)):
        if us >= divisor * 0.9995:
            return f"{us / divisor:.3g} {unit}" if us < divisor * 999.5 else f"{us / divisor:.0f} {unit}"
    return f"{us:.3g} us"


class Summary:
    """How many of each tier there were, and how long they took; in as much memory as that needs."""

    def __init__(self) -> None:
        self.lost = 0
        self.errors = 0
        self._counts: dict[str, list[int]] = {}
        self._bytes: dict[str, int] = {}
        self._longest_us: dict[str, float] = {}

    def add(self, document: dict[str, Any]) -> None:
        """A request, or what was lost."""
        if "lost" in document:
            self.lost += int(document["lost"])
            return
        kind = str(document["tier"] or document["op"])
        counts = self._counts.setdefault(kind, [0] * LATENCY_BUCKETS)
        bucket = bucket_of(round(document["latency_us"] * 1e-6 / _TICK_S))
        counts[min(bucket, LATENCY_BUCKETS - 1)] += 1
        self._bytes[kind] = self._bytes.get(kind, 0) + int(document["length_bytes"])
        self._longest_us[kind] = max(self._longest_us.get(kind, 0.0), document["latency_us"])
        self.errors += bool(document["error"])

    @property
    def requests(self) -> int:
        return sum(map(sum, self._counts.values()))

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        tiers = {
            kind: {
                **Latencies(counts, _TICK_S).to_dict(),
                "max_us": self._longest_us[kind],
                "bytes": self._bytes[kind],
            }
            for kind, counts in self._counts.items()
        }
        return {"requests": self.requests, "errors": self.errors, "lost": self.lost, "tiers": tiers}

    def sentence(self) -> str:
        """How many there were."""
        errors = f", {self.errors} with an error" if self.errors else ""
        lost = f", {self.lost} more were lost" if self.lost else ""
        return f"{self.requests} requests{errors}{lost}"

    def rows(self) -> list[list[str]]:
        """Of the table, the most first."""
        rows = []
        for kind, counts in sorted(self._counts.items(), key=lambda item: -sum(item[1])):
            latencies = Latencies(counts, _TICK_S)
            # A percentile may be a quarter too long, but none is longer than the longest.
            longest_us = self._longest_us[kind]
            each = [min((latencies.percentile_s(p) or 0.0) * 1e6, longest_us) for p in (50, 90, 99)]
            took = [_short(us) for us in (*each, longest_us)]
            rows.append([kind, str(latencies.total), format_size(self._bytes[kind]), *took])
        return rows


SUMMARY_HEADER = ("tier", "requests", "bytes", "p50", "p90", "p99", "max")


def _conclude(summary: Summary, args: argparse.Namespace) -> None:
    """The summary: where it was asked for on stdout, else on stderr."""
    if args.summary and args.json:
        print(json.dumps(summary.to_dict()), flush=True)
        return
    to = sys.stdout if args.summary else sys.stderr
    if rows := summary.rows():
        put_table(SUMMARY_HEADER, rows, to=to)
    print(summary.sentence(), file=to, flush=True)
