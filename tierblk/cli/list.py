"""Lists the attached devices of all daemons of this machine, and those that wait for one.

With --json: {"devices": [...]}, each with all that `tierblk status` knows.
"""

from __future__ import annotations

import argparse
from typing import Any

from tierblk.cli import orphans
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import Daemon, ask_all, same_directory
from tierblk.cli.output import complain, put_json, put_table, say
from tierblk.errors import TierblkError
from tierblk.units import format_size

NAME = "list"
HELP = "list attached devices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but the common ones."""
    add_cache_dir(parser, "only devices of this cache directory")
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the table. A daemon that does not answer is an error, after the others' devices were shown."""
    found: list[dict[str, Any]] = []
    failed: TierblkError | None = None
    for daemon, devices, error in ask_all(Daemon.devices, args.timeout_s):
        if args.cache_dir is not None and not same_directory(daemon.cache_dir, args.cache_dir):
            continue
        found += devices or []
        if error:
            complain(error)
            failed = error
    found += [orphans.shown(record) for _, record in orphans.waiting(args.timeout_s, args.cache_dir)]
    if args.json:
        put_json({"devices": found})
    elif found:
        put_table(("NAME", "PATH", "SIZE", "STATE", "IMAGE"), [_row(device) for device in found])
    elif not failed:
        say("no device is attached")
    return failed.exit_code if failed else 0


def _row(device: dict[str, Any]) -> tuple[str, ...]:
    size = format_size(int(device.get("size_bytes") or 0))
    texts = [str(device.get(key) or "-") for key in ("name", "path", "state", "url")]
    return (texts[0], texts[1], size, texts[2], texts[3])
