"""Takes blocks out of a cache: those that lie in RANGE in whole, of all layers of a device, or of one with
--layer. What is dirty stays, since nobody else has it, and so does what is in use at that moment.

With --json: {"layers": [{"layer_id", "evicted_bytes", "dirty_bytes", "busy_bytes"}]}.
"""

from __future__ import annotations

import argparse
from typing import Any

from tierblk.cli import tended
from tierblk.cli.arguments import add_json
from tierblk.cli.byterange import add_range, within
from tierblk.cli.cache_blocks import layers_wanted
from tierblk.cli.output import put, put_json
from tierblk.cli.target import add_target, looking
from tierblk.extent import Extent
from tierblk.units import format_size

NAME = "evict"
HELP = "take blocks out of a cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET RANGE."""
    add_target(parser)
    add_range(parser)
    add_layer(parser)
    add_json(parser)


def add_layer(parser: argparse.ArgumentParser) -> None:
    """--layer, of a device that has two."""
    parser.add_argument("--layer", choices=("volume", "base"), help="only this one of a device's layers")


def layers_of(args: argparse.Namespace) -> tuple[Any, Any, list[int], Extent]:
    """(directory, daemon or None, layer ids, which part of the device) that the arguments mean. DeviceError:
    there is no such part, or the device has no such layer."""
    with looking(args) as (view, device):
        ids = [record.layer_id for record in layers_wanted(device, args.layer)]
        where = within(args.range, device.size_bytes, device.name)
        return view.path, tended.daemon_of(view, args.timeout_s), ids, where


def run(args: argparse.Namespace) -> int:
    """Says how much went."""
    from tierblk import tending

    directory, daemon, layer_ids, where = layers_of(args)
    wanted = [where]
    found = [
        tended.change(
            daemon,
            directory,
            lambda daemon, i=layer_id: daemon.request(  # type: ignore[misc]
                "POST",
                "/v1/cache/evict",
                {"layer_id": i, "ranges": [[each.offset, each.length] for each in wanted]},
                timeout_s=tended.CHANGE_TIMEOUT_S,
            ),
            lambda cache, i=layer_id: tending.evict(cache, i, wanted),  # type: ignore[misc]
        )
        for layer_id in layer_ids
    ]
    if args.json:
        put_json({"layers": found})
        return 0
    total = {key: sum(each[f"{key}_bytes"] for each in found) for key in ("evicted", "dirty", "busy")}
    put(f"{format_size(total['evicted'])} evicted")
    if total["dirty"]:
        put(f"{format_size(total['dirty'])} stay: nobody else has them")
    if total["busy"]:
        put(f"{format_size(total['busy'])} stay: they were in use")
    return 0
