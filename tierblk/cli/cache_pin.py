"""Keeps blocks in a cache for good: what lies in RANGE is not evicted any more, whether it is cached already
or comes later, also after a restart. At most half of a cache can be pinned. Without RANGE it shows what is.

With --json: {"layers": [{"layer_id", "pins": [[offset, length], ...]}]} in bytes.
"""

from __future__ import annotations

import argparse
from typing import Any

from tierblk.cli import tended
from tierblk.cli.arguments import add_json
from tierblk.cli.byterange import add_range
from tierblk.cli.cache_evict import add_layer, layers_of
from tierblk.cli.output import put, put_json, put_table
from tierblk.cli.target import add_target, looking
from tierblk.units import format_exact_size

NAME = "pin"
HELP = "keep blocks in a cache for good"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET [RANGE], --remove."""
    add_target(parser)
    add_range(parser, optional=True)
    parser.add_argument("--remove", action="store_true", help="RANGE may be evicted again")
    add_layer(parser)
    add_json(parser)
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> int:
    """What is pinned then."""
    if args.remove and args.range is None:
        args.refuse("--remove needs a RANGE (`all` is the whole device)")
    found = _shown(args) if args.range is None else _changed(args)
    if args.json:
        put_json({"layers": found})
        return 0
    rows = [
        (str(layer["layer_id"]), format_exact_size(offset), format_exact_size(length))
        for layer in found
        for offset, length in layer["pins"]
    ]
    if rows:
        put_table(("LAYER", "OFFSET", "LENGTH"), rows)
    else:
        put("nothing is pinned")
    return 0


def _shown(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tierblk.tending import pins_of

    with looking(args) as (_, device):
        return [{"layer_id": record.layer_id, "pins": pins_of(record)} for record in device.layers]


def _changed(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tierblk import tending

    directory, daemon, layer_ids, where = layers_of(args)
    body = {"ranges": [[where.offset, where.length]], "pinned": not args.remove}
    return [
        tended.change(
            daemon,
            directory,
            lambda daemon, i=layer_id: daemon.request(  # type: ignore[misc]
                "POST", "/v1/cache/pin", {"layer_id": i, **body}, timeout_s=tended.CHANGE_TIMEOUT_S
            ),
            lambda cache, i=layer_id: tending.pin(  # type: ignore[misc]
                cache, i, [where], pinned=not args.remove
            ),
        )
        for layer_id in layer_ids
    ]
