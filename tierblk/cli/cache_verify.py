"""Checks a cache directory, beside a daemon too: its superblock, its index or block maps, who has which slot,
and every checksum. Changes nothing; exit code 6 when something is wrong. Ctrl-C ends it with what was found
so far, and exit code 130.

With --repair bad clean pages are fetched anew, where they came from, and nothing else is touched; a config
file as TARGET says how that is reached. Exit code 0 when nothing is wrong any more. A bad page that nobody
else has is named and left as it is.

What was written gets checksums when nobody has written to its block for a while (cache.checksum_after), and
loses them at a power cut: until then only masks and slots are checked, and such blocks are counted.

With --json: {"ok", "complete", "state", "clean", "session", "slots", "checked_slots", "unsettled_blocks",
"bad_superblocks", "layers": [{"layer_id", "kind", "name", "url", "size_bytes", "cached_bytes", "dirty_bytes",
"zero_bytes", "unchecked_blocks", "bad_pages", "damaged"}], "violations": [{"invariant", "layer", "block",
"text"}], "left_off", "repaired": null or {"pages", "left_pages", "reasons"}}. Invariants have the numbers
that the design gives them; left_off is how many violations are not listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli.arguments import add_json
from tierblk.cli.output import put, put_json, put_table, say
from tierblk.cli.states import STATE_TEXTS
from tierblk.cli.target import add_target, resolve
from tierblk.extent import BLOCK_BYTES
from tierblk.rundir import run_root
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cache.verify import Found, LayerFound
    from tierblk.repair import Repaired

NAME = "verify"
HELP = "check every invariant and every checksum"
SHOWN_MAX = 50
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET."""
    add_target(parser, device=False)
    parser.add_argument("--repair", action="store_true", help="fetch bad clean pages anew")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A table of its layers, and what is wrong."""
    from tierblk.cache.verify import verify
    from tierblk.errors import CacheError

    directory = resolve(args.target, args.timeout_s).directory
    with _bar() as progress:
        found = verify(directory, run_root(), progress)
    repaired = None
    if args.repair and found.complete and any(layer.bad for layer in found.layers):
        from tierblk.cli.repairing import repair

        repaired = repair(args, directory, [bad for layer in found.layers for bad in layer.bad])
    if args.json:
        done = repaired and repaired.to_dict()
        put_json({**_document(found), "repaired": done})
    else:
        _show(directory, found)
        if repaired is not None:
            _show_repaired(repaired)
    if not found.complete:
        return INTERRUPTED
    # Each bad page is a violation of its own.
    others = len(found.violations) + found.left_off - sum(_bad_pages(layer) for layer in found.layers)
    well = found.ok or (repaired is not None and not repaired.left and not others)
    return 0 if well else CacheError.exit_code


def _show_repaired(repaired: Repaired) -> None:
    left = f", {repaired.left_pages} are not" if repaired.left else ""
    put(f"{repaired.pages} pages are repaired{left}")
    for reason in repaired.reasons:
        say(reason)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """How far it is, how fast, and how long it will take, on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("checksums"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("checksums", total=None)
        yield lambda done, total: shown.update(task, completed=done * BLOCK_BYTES, total=total * BLOCK_BYTES)


def _document(found: Found) -> dict[str, Any]:
    return {
        "ok": found.ok,
        "complete": found.complete,
        "state": found.state.value,
        "clean": found.clean,
        "session": found.superblock.session,
        "slots": found.superblock.slot_count - 1,
        "checked_slots": found.checked_slots,
        "unsettled_blocks": found.unsettled_blocks,
        "bad_superblocks": found.bad_superblocks,
        "layers": [_layer(layer) for layer in found.layers],
        "violations": [violation._asdict() for violation in found.violations],
        "left_off": found.left_off,
    }


def _layer(layer: LayerFound) -> dict[str, Any]:
    return {
        "layer_id": layer.record.layer_id,
        "kind": layer.record.kind,
        "name": layer.record.name or None,
        "url": layer.record.shown_base if layer.record.url else None,
        "size_bytes": layer.record.size_bytes,
        "cached_bytes": layer.cached_bytes,
        "dirty_bytes": layer.dirty_bytes,
        "zero_bytes": layer.zero_bytes,
        "unchecked_blocks": layer.unchecked_blocks,
        "bad_pages": _bad_pages(layer),
        "damaged": layer.record.damaged or None,
    }


def _bad_pages(layer: LayerFound) -> int:
    return sum(bad.pages.bit_count() for bad in layer.bad)


def _show(directory: Path, found: Found) -> None:
    rows = [
        (
            layer.record.kind,
            format_size(layer.record.size_bytes),
            format_size(layer.cached_bytes),
            format_size(layer.dirty_bytes),
            f"{layer.unchecked_blocks} blocks" if layer.unchecked_blocks else "-",
            f"{_bad_pages(layer)} pages" if layer.bad else "-",
            layer.record.shown,
        )
        for layer in found.layers
    ]
    if rows:
        put_table(("KIND", "SIZE", "HERE", "DIRTY", "NO CHECKSUM", "BAD", "WHAT"), rows)
    for layer in found.layers:
        if layer.record.damaged:
            say(f"{layer.record.shown} cannot be attached: {layer.record.damaged}")
    if not found.clean:
        say(STATE_TEXTS[found.state.value])
    if found.bad_superblocks:
        say(f"{found.bad_superblocks} of 2 superblocks cannot be read; the other one is good")
    if found.unsettled_blocks:
        say(f"{found.unsettled_blocks} blocks changed faster than they could be checked")
    for violation in found.violations[:SHOWN_MAX]:
        put(str(violation))
    more = len(found.violations) + found.left_off - SHOWN_MAX
    if more > 0:
        put(f"... and {more} more")
    if not found.complete:
        say(f"interrupted after {found.checked_slots} blocks; what is above was found by then")
    elif found.ok:
        put(f"{directory} is well")
