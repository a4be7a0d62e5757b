"""Shows what devices, caches, uploads and remotes do right now, on a screen that keeps up.

Rates and latencies are of the last interval. Keys: q quits, ? explains the rest. When the output is no
terminal, with --once or --count: plain text, one measurement, or so many. With --json: {"unix_s", "caches":
[...], "devices": [...], "remotes": [...]}, one line a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from tierblk.cli.arguments import add_cache_dir, add_json, duration
from tierblk.cli.output import complain, put, say
from tierblk.errors import DaemonError, DeviceError

if TYPE_CHECKING:
    from tierblk.cli.top_ask import Rounds
    from tierblk.cli.top_model import Picture

NAME = "top"
HELP = "show what happens right now, live"

INTERVAL_MIN_S = 0.1


def _interval(text: str) -> float:
    interval_s = duration(text)
    if interval_s < INTERVAL_MIN_S:
        raise argparse.ArgumentTypeError("must be at least 100ms")
    return interval_s


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"must be a number of measurements; this is {text!r:.60}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME..., and how often."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these devices; * and ? stand for letters"
    )
    parser.add_argument(
        "--interval",
        dest="interval_s",
        type=_interval,
        default=1.0,
        metavar="DURATION",
        help="how long a measurement takes (default 1s)",
    )
    rounds = parser.add_mutually_exclusive_group()
    rounds.add_argument("--once", action="store_true", help="one measurement, as plain text")
    rounds.add_argument(
        "--count", type=_count, metavar="N", help="so many measurements, as plain text; 0: until interrupted"
    )
    parser.add_argument("--no-color", action="store_true", help="no colours (as does NO_COLOR)")
    add_cache_dir(parser, "only this cache directory and its devices")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """The screen, or measurements as text."""
    from tierblk.cli.top_ask import Rounds

    rounds = Rounds(args.cache_dir)
    try:
        if args.json or args.once or args.count is not None or not _has_screen():
            return measure(rounds, args)
        from rich.console import Console

        from tierblk.cli.top_screen import Screen

        console = Console(no_color=True if args.no_color else None, highlight=False)
        return Screen(rounds, console, interval_s=args.interval_s, names=args.names).run()
    finally:
        rounds.end()


def _has_screen() -> bool:
    """Whether there is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown", "")


def measure(rounds: Rounds, args: argparse.Namespace, wait: Callable[[float], None] = time.sleep) -> int:
    """Measurements as text or JSON; the exit code. The first sample has no rates, so it is not shown. wait:
    so many seconds."""
    from tierblk.cli.top_model import Model

    model = Model()
    patience_s = max(1.0, min(args.interval_s, 5.0))
    wanted = 1 if args.count is None else args.count
    picture = None
    for number in count():
        began_s = time.monotonic()
        rounds.begin()
        rounds.wait(patience_s)
        answers, orphans = rounds.close()
        full = model.update(answers, orphans, now_s=time.monotonic(), unix_s=time.time())
        picture = full.only(args.names)
        if number == 0:
            _must_be_there(full, picture, args)
            if not full.caches:
                break
        else:
            _put(picture, args, is_first=number == 1)
        if wanted and number == wanted:
            break
        wait(max(0.0, args.interval_s - (time.monotonic() - began_s)))
    if picture is None or not picture.caches:
        if picture is not None and (picture.devices or args.json):
            _put(picture, args, is_first=True)
        elif not args.json:
            say("no daemon is running")
        return 0
    return _silent(picture)


def _must_be_there(full: Picture, picture: Picture, args: argparse.Namespace) -> None:
    """DeviceError: all have answered, and nobody has any of these devices."""
    if not args.names or picture.devices or any(cache.error for cache in full.caches):
        return
    names = ", ".join(sorted(device.name for device in full.devices))
    known = f"attached are: {names}" if names else "no device is attached"
    raise DeviceError(f'there is no device called "{" or ".join(args.names)}"', known)


def _put(picture: Picture, args: argparse.Namespace, *, is_first: bool) -> None:
    if args.json:
        print(json.dumps(picture.to_dict()), flush=True)
        return
    from tierblk.cli.top_rows import WIDTH_MIN, View, overview
    from tierblk.cli.top_text import plain_lines

    width = max(WIDTH_MIN, shutil.get_terminal_size().columns if sys.stdout.isatty() else _columns())
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    view = View(width=width, interval_s=args.interval_s, unicode=encoding.startswith("utf"))
    if not is_first:
        put("")
    for line in plain_lines(overview(picture, view)):
        put(line)


def _columns() -> int:
    """Of a pipe: what COLUMNS says."""
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 else WIDE


WIDE = 160
"""A pipe has no width, and what reads it has room."""


def _silent(picture: Picture) -> int:
    """The exit code: as any command's when a daemon does not answer."""
    code = 0
    for cache in picture.caches:
        if cache.error:
            error = DaemonError(f"{cache.cache_dir}: {cache.error}")
            complain(error)
            code = error.exit_code
    return code
