"""Arguments that several verbs have."""

from __future__ import annotations

import argparse
import math

from tierblk.cli.client import ANSWER_TIMEOUT_S
from tierblk.units import format_duration, parse_duration


def duration(text: str) -> float:
    """Seconds of a --timeout, more than none."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0s")
    return seconds


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_timeout(parser: argparse.ArgumentParser, default_s: float = ANSWER_TIMEOUT_S) -> None:
    """--timeout, seconds in args.timeout_s."""
    parser.add_argument(
        "--timeout",
        dest="timeout_s",
        type=duration,
        default=default_s,
        metavar="DURATION",
        help=f"how long to wait for the daemon (default {format_duration(default_s)})",
    )


def add_cache_dir(parser: argparse.ArgumentParser, help_text: str) -> None:
    """--cache-dir."""
    parser.add_argument("--cache-dir", metavar="DIR", help=help_text)
