"""Forgets images that nobody uses: no device shows them, no volume lies over them, nothing of them is pinned,
and they were used last longer ago than --older says. What they had in the cache is free then.

With --json: {"layers": [{"layer_id", "what", "validator", "used_unix_s", "cached_bytes"}], "cached_bytes"}.
"""

from __future__ import annotations

import argparse

from tierblk.cli import orphans, tended
from tierblk.cli.arguments import add_json, duration
from tierblk.cli.output import put, put_json, put_table
from tierblk.cli.status import ago
from tierblk.cli.target import add_target, resolve
from tierblk.rundir import run_root
from tierblk.units import format_size

NAME = "gc"
HELP = "forget images that nobody uses"
OLDER_S = 24 * 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET, --older, --dry-run."""
    add_target(parser, device=False)
    parser.add_argument(
        "--older",
        dest="older_s",
        type=duration,
        default=OLDER_S,
        metavar="DURATION",
        help="not used for so long (default 24h)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only name them")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A table of what went."""
    from tierblk import records, tending
    from tierblk.cache import look

    directory = resolve(args.target, args.timeout_s).directory
    with look(directory, run_root()) as view:
        daemon = tended.daemon_of(view, args.timeout_s)
        run_dir = run_root() / str(view.superblock.uuid)
    waiting = [] if daemon is not None or run_dir not in orphans.run_dirs() else records.read_all(run_dir)[0]
    needed = [(record.url, record.size_bytes, record.validator) for record in waiting]
    found = tended.change(
        daemon,
        directory,
        lambda daemon: daemon.request(
            "POST",
            "/v1/cache/gc",
            {"older_s": args.older_s, "dry_run": args.dry_run},
            timeout_s=tended.CHANGE_TIMEOUT_S,
        ),
        lambda cache: tending.collect(
            cache, older_s=args.older_s, dry_run=args.dry_run, needed=lambda: needed
        ),
    )
    if args.json:
        put_json(found)
        return 0
    rows = [
        (str(layer["layer_id"]), format_size(layer["cached_bytes"]), ago(layer["used_unix_s"]), layer["what"])
        for layer in found["layers"]
    ]
    if rows:
        put_table(("LAYER", "HERE", "LAST USED", "WHAT"), rows)
    verb = "would be free" if args.dry_run else "are free"
    put(f"{format_size(found['cached_bytes'])} {verb}" if rows else "every image is used, or was lately")
    return 0
