"""Looks into a cache, while a daemon serves it or none does, and changes what is in it.

stat, ls, map, blocks, dump, verify (without --repair) and diff change nothing. warm fetches what is missing,
and so does export of a device that is attached.
"""

from __future__ import annotations

import argparse

from tierblk.cli import (
    cache_blocks,
    cache_diff,
    cache_dump,
    cache_evict,
    cache_export,
    cache_gc,
    cache_ls,
    cache_map,
    cache_pin,
    cache_resize,
    cache_stat,
    cache_verify,
    cache_warm,
)
from tierblk.cli.arguments import add_debug

NAME = "cache"
HELP = "look into a cache, and change what is in it"
VERBS = (
    cache_stat,
    cache_ls,
    cache_map,
    cache_blocks,
    cache_dump,
    cache_verify,
    cache_diff,
    cache_export,
    cache_evict,
    cache_pin,
    cache_warm,
    cache_resize,
    cache_gc,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """COMMAND and what follows it."""
    # with prog given, argparse need not make a formatter to find it out
    verbs = parser.add_subparsers(prog="tierblk cache", title="commands", metavar="COMMAND", required=True)
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.NAME, description=verb.__doc__, help=verb.HELP, formatter_class=parser.formatter_class
        )
        verb.add_arguments(sub)
        add_debug(sub)
        sub.set_defaults(look=verb.run)


def run(args: argparse.Namespace) -> int:
    """What the verb does."""
    return int(args.look(args))
