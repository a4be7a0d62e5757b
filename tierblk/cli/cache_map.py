"""Shows which ranges of a device are dirty, cached, zeros, absent and recently used, with its partitions and
what each of them holds; on a terminal, or as a picture (--svg, --png). Fetches nothing, and asks daemons only
which one has a device of that name.

With --json: {"device", "layers", "state", "size_bytes", "range", "total": {"dirty_bytes", ...}, "cell_bytes",
"cells": {"dirty_bytes": [...], ...}, "partition_table", "partitions": [{"number", "type", "name",
"start_bytes", "length_bytes", "in_range": {"dirty_bytes", ...}, "contents": {"kind", "label", "uuid",
"total_bytes", "used_bytes"}}]}.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tierblk.cli.arguments import add_json
from tierblk.cli.byterange import FORMS, range_argument, within
from tierblk.cli.output import put_json, say
from tierblk.cli.target import add_target, looking
from tierblk.errors import DeviceError, TierblkError

if TYPE_CHECKING:
    from rich.console import Console

    from tierblk.cli.heatmap import HeatMap

NAME = "map"
HELP = "show what is cached of a device, and its partitions"
WIDTH_MIN = 40
PICTURE_COLUMNS, PICTURE_ROWS = 128, 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET, which part of it, and where the map goes."""
    add_target(parser)
    parser.add_argument(
        "--layer", choices=("volume", "base"), help="of the device's two layers only this one"
    )
    parser.add_argument(
        "--range",
        type=range_argument,
        metavar="RANGE",
        help=f"only this part, in whole blocks of 64KiB: {FORMS}",
    )
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw it into a file, for browsers")
    parser.add_argument("--png", metavar="FILE", type=Path, help="the same picture in pixels; needs Pillow")
    parser.add_argument(
        "--width", type=_width, metavar="COLUMNS", help="in place of the terminal's (80 in a pipe)"
    )
    add_json(parser)


def _width(text: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", text) or int(text) < WIDTH_MIN:
        raise argparse.ArgumentTypeError(f"a width is a number of columns, {WIDTH_MIN} or more")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Draws it, everywhere where it was asked for."""
    from rich.console import Console

    from tierblk.cli import heatmap, map_text

    console = Console(width=args.width, highlight=False, soft_wrap=True)
    colours = _has_colours(console)
    if args.svg or args.png or args.json:
        columns, rows = PICTURE_COLUMNS, PICTURE_ROWS
    else:
        characters = map_text.columns_of(console.width)
        columns, rows = characters * (2 if colours else 1), map_text.ROWS_MAX
    with looking(args) as (view, device):
        if args.layer is not None and getattr(device, args.layer) is None:
            raise DeviceError(f"the cache has no {args.layer} of {device.name}")
        extent = args.range and within(args.range, device.size_bytes, device.name)
        drawn = heatmap.draw(view, device, columns, rows, extent, layer=args.layer)
    if args.svg or args.png:
        _put_pictures(args, drawn)
    if args.json:
        put_json(heatmap.document(drawn))
    elif not (args.svg or args.png):
        map_text.put_map(drawn, console, colours=colours, columns=characters)
    return 0


def _has_colours(console: Console) -> bool:
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return bool(console.is_terminal and console.color_system and not console.no_color and encoding == "utf8")


def _put_pictures(args: argparse.Namespace, drawn: HeatMap) -> None:
    from datetime import UTC, datetime

    from tierblk.cli import map_picture, map_png, map_svg

    picture = map_picture.layout(drawn, PICTURE_COLUMNS, datetime.now(UTC))
    for path, render in ((args.svg, map_svg.render), (args.png, map_png.render)):
        if path is not None:
            data = render(picture)
            try:
                path.write_bytes(data)
            except OSError as error:
                raise TierblkError(f"cannot write {os.fspath(path)}: {error.strerror}") from None
            say(f"wrote {os.fspath(path)}")
