"""Compares what is cached and clean with where it came from: the image of a base, or the store of a volume.
Exit code 6 when anything differs. Dirty pages are newer than any origin and are not compared; a volume that
is attached is not either, since only its daemon knows what the store has of it at every moment.

With --json: {"layers": [{"layer_id", "what", "compared_bytes", "skipped_bytes", "different":
[{"offset_bytes", "length_bytes"}]}]}.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli.arguments import add_json
from tierblk.cli.byterange import add_range, within
from tierblk.cli.cache_blocks import layers_wanted
from tierblk.cli.cache_evict import add_layer
from tierblk.cli.output import put, put_json, say
from tierblk.cli.target import add_target, looking
from tierblk.errors import CacheError
from tierblk.extent import PAGE_BYTES, Extent
from tierblk.units import format_exact_size, format_size

if TYPE_CHECKING:
    from tierblk.cache import LayerRecord, View
    from tierblk.config import Config

NAME = "diff"
HELP = "compare what is cached with where it came from"
SHOWN_MAX = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET [RANGE]."""
    add_target(parser)
    add_range(parser, optional=True)
    add_layer(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A line a range that differs, and a total a layer."""
    import asyncio

    from tierblk.config import load

    is_config = args.target.endswith(".toml") or Path(args.target).is_file()
    config = load(args.target) if is_config else None
    with looking(args) as (view, device):
        records = layers_wanted(device, args.layer)
        where = within(args.range or Extent(0, device.size_bytes), device.size_bytes, device.name)
        found = asyncio.run(_compare(view, records, config, where))
    if args.json:
        put_json({"layers": found})
    else:
        for layer in found:
            _show(layer)
    return CacheError.exit_code if any(layer["different"] for layer in found) else 0


async def _compare(
    view: View, records: list[LayerRecord], config: Config | None, where: Extent
) -> list[dict[str, Any]]:
    from tierblk.cache import State
    from tierblk.origin import origin_of

    found = []
    for record in records:
        if record.is_volume and (view.state is State.SERVED or not record.is_stored):
            why = "nobody else has it" if not record.is_stored else "its daemon may change it"
            say(f"{record.shown} is not compared: {why}")
            continue
        origin = await origin_of(view, record, config)
        assert origin is not None
        try:
            found.append(await _layer(view, record, origin, where))
        finally:
            await origin.aclose()
    return found


async def _layer(view: View, record: LayerRecord, origin: Any, where: Extent) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from tierblk.compare import compare

    layer, pages, skipped = view.layer(record), 0, 0
    different: list[Extent] = []
    total = sum(
        (entry.cached & ~entry.dirty).bit_count() * PAGE_BYTES
        for _, entry in layer.entries(where.blocks().start, where.clamp(record.size_bytes).blocks().stop)
    )
    console = Console(stderr=True)
    columns = TextColumn("comparing"), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("comparing", total=total)
        async for batch in compare(view, layer, origin, where):
            pages, skipped = pages + batch.pages, skipped + batch.skipped
            different += batch.different
            shown.update(task, advance=(batch.pages + batch.skipped) * PAGE_BYTES)
    return {
        "layer_id": record.layer_id,
        "what": record.shown,
        "compared_bytes": pages * PAGE_BYTES,
        "skipped_bytes": skipped * PAGE_BYTES,
        "different": [{"offset_bytes": d.offset, "length_bytes": d.length} for d in _joined(different)],
    }


def _joined(extents: list[Extent]) -> list[Extent]:
    joined: list[Extent] = []
    for extent in extents:
        if joined and joined[-1].end == extent.offset:
            joined[-1] = Extent(joined[-1].offset, joined[-1].length + extent.length)
        else:
            joined.append(extent)
    return joined


def _show(layer: dict[str, Any]) -> None:
    different = layer["different"]
    for each in different[:SHOWN_MAX]:
        offset, length = (format_exact_size(each[f"{key}_bytes"]) for key in ("offset", "length"))
        put(f"{layer['what']}: {length} at {offset} differ")
    if len(different) > SHOWN_MAX:
        put(f"... and {len(different) - SHOWN_MAX} more ranges")
    wrong = sum(each["length_bytes"] for each in different)
    if not layer["compared_bytes"] and not layer["skipped_bytes"]:
        put(f"{layer['what']}: nothing is compared: none of it is cached and clean")
        return
    same = "all of it the same" if not wrong else f"{format_size(wrong)} differ"
    skipped = f"; {format_size(layer['skipped_bytes'])} changed meanwhile" if layer["skipped_bytes"] else ""
    put(f"{layer['what']}: {format_size(layer['compared_bytes'])} compared, {same}{skipped}")
