"""Checks what a cache directory says of itself: its superblock, its index, and the checksum of every clean
page. No daemon may serve it. Changes nothing; exit code 6 when something is wrong.

With --json: {"ok", "clean", "session", "slots", "bad_superblocks", "layers": [{"kind", "name", "url",
"size_bytes", "cached_bytes", "dirty_bytes", "damaged"}], "violations": [{"invariant", "layer", "block",
"text"}]}.
Invariants have the numbers that the design gives them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli.arguments import add_json
from tierblk.cli.output import put, put_json, put_table, say
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cache.verify import Found

NAME = "verify"
HELP = "check every invariant of a directory that no daemon serves"
SHOWN_MAX = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="cache.dir of a config")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A table of its layers, and what is wrong."""
    from tierblk.cache.verify import verify
    from tierblk.errors import CacheError

    with _bar() as progress:
        found = verify(args.directory, progress)
    if args.json:
        put_json(_document(found))
    else:
        _show(args.directory, found)
    return CacheError.exit_code if found.violations else 0


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """How far it is, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("checksums", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _document(found: Found) -> dict[str, Any]:
    return {
        "ok": not found.violations,
        "clean": found.clean,
        "session": found.superblock.session,
        "slots": found.superblock.slot_count - 1,
        "bad_superblocks": found.bad_superblocks,
        "layers": [
            {
                "kind": layer.record.kind,
                "name": layer.record.name or None,
                "url": layer.record.shown_base if layer.record.url else None,
                "size_bytes": layer.record.size_bytes,
                "cached_bytes": layer.cached_bytes,
                "dirty_bytes": layer.dirty_bytes,
                "damaged": layer.record.damaged or None,
            }
            for layer in found.layers
        ],
        "violations": [violation._asdict() for violation in found.violations],
    }


def _show(directory: Path, found: Found) -> None:
    rows = [
        (
            layer.record.kind,
            layer.record.shown,
            format_size(layer.record.size_bytes),
            format_size(layer.cached_bytes),
            format_size(layer.dirty_bytes),
        )
        for layer in found.layers
    ]
    if rows:
        put_table(("KIND", "WHAT", "SIZE", "HERE", "NOWHERE ELSE"), rows)
    for layer in found.layers:
        if layer.record.damaged:
            say(f"{layer.record.shown} cannot be attached: {layer.record.damaged}")
    if not found.clean:
        say("the last daemon did not end in order: as long as the machine runs, its block maps count")
    if found.bad_superblocks:
        say(f"{found.bad_superblocks} of 2 superblocks cannot be read; the other one is good")
    for violation in found.violations[:SHOWN_MAX]:
        put(str(violation))
    if len(found.violations) > SHOWN_MAX:
        put(f"... and {len(found.violations) - SHOWN_MAX} more")
    if not found.violations:
        put(f"{directory} is well")
