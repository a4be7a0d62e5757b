"""The one main(): parses the command line, runs a verb, and turns errors into sentences and exit codes.

Exit codes: 0 done; 2 wrong usage; 3 to 8 by kind of error (errors.py); 130 Ctrl-C; 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import tierblk
from tierblk.cli import (
    attach,
    cache,
    check,
    completion,
    detach,
    doctor,
    metrics,
    reap,
    repin,
    serve,
    status,
    stop,
    sync,
    top,
    trace,
)
from tierblk.cli import list as list_
from tierblk.cli.arguments import DEBUG_HELP, VerbParser, add_debug
from tierblk.cli.output import complain, put_json
from tierblk.errors import TierblkError

EPILOG = """\
exit codes:
  0 done, 1 anything else, 2 wrong usage, 3 wrong config, 4 remote unavailable, 5 remote refused,
  6 cache directory, 7 device or kernel, 8 daemon, 130 interrupted
"""

# In the order in which one meets them. Each module has NAME, HELP, add_arguments(parser) and run(args).
VERBS = (
    attach,
    detach,
    list_,
    status,
    top,
    trace,
    sync,
    repin,
    stop,
    reap,
    check,
    cache,
    metrics,
    doctor,
    completion,
)


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Colours for help texts; imported when one is shown, which is seldom."""
    from rich_argparse import RawDescriptionRichHelpFormatter

    class Formatter(RawDescriptionRichHelpFormatter):
        text_markup = help_markup = False  # what is in brackets is shown, and no name of a style

    return Formatter(prog)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="tierblk",
        description=(tierblk.__doc__ or "").removeprefix("tierblk: "),
        epilog=EPILOG,
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"tierblk {tierblk.__version__}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    # with prog given, argparse need not make a formatter to find it out
    verbs = parser.add_subparsers(
        prog="tierblk", title="commands", metavar="COMMAND", required=True, parser_class=VerbParser
    )
    for verb in (*VERBS, serve):
        # serve is what attach starts; without a help text it is not listed
        listed = {} if verb is serve else {"help": verb.HELP}
        sub = verbs.add_parser(
            verb.NAME,
            description=verb.__doc__,
            formatter_class=_formatter,
            **listed,
        )
        verb.add_arguments(sub)
        add_debug(sub)
        sub.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Never raises, except SystemExit for --help and wrong usage."""
    args = make_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return int(code or 0)
    except TierblkError as error:
        if args.debug:
            traceback.print_exc()
        if getattr(args, "json", False):
            put_json({"error": error.to_dict()})
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output went away, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        complain(TierblkError(f"unexpected: {what}", "run it again with --debug to see where, and report it"))
        return 1
