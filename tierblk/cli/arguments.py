"""Arguments that several verbs have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from tierblk.cli.client import ANSWER_TIMEOUT_S
from tierblk.units import format_duration, parse_duration

DEBUG_HELP = "show where an error came from"


class VerbParser(argparse.ArgumentParser):
    """The parser of one verb. Options may stand anywhere: `pin web --remove 0+1MiB` too, where argparse
    itself takes RANGE, which may be left out, for left out as soon as an option comes."""

    _is_inside = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's."""
        positionals = [action for action in self._actions if not action.option_strings]
        # One alone is not behind any option that could be taken for its end; and this makes a help text.
        may_be_left_out = len(positionals) > 1 and any(action.nargs == "?" for action in positionals)
        if self._is_inside or not may_be_left_out:
            return super().parse_known_args(args, namespace)
        self._is_inside = True  # parse_known_intermixed_args comes here again
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def duration(text: str) -> float:
    """Seconds of a --timeout, more than none."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0s")
    return seconds


def add_debug(parser: argparse.ArgumentParser) -> None:
    """--debug, which may also stand before the verb."""
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)


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
