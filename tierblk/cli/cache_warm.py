"""Fetches what is not cached yet: of RANGE, of a partition, or of files in the filesystem that is on the
device. It has to be attached, since its daemon fetches; who reads it meanwhile shares the network with this.

--file PATH names a file as the device's filesystem has it, which must be ext2, ext3 or ext4 (e2fsprogs'
debugfs is asked where its blocks are); with --partition it is that of a partition. With --json: {"name",
"ranges": [[offset, length]], "wanted_bytes", "fetched_bytes"}; what of the range was cached before is not
fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli import tended
from tierblk.cli.arguments import add_json
from tierblk.cli.byterange import add_range, within
from tierblk.cli.client import Daemon, DeadSocket, device_path
from tierblk.cli.filemap import extents_of_file
from tierblk.cli.output import put, put_json
from tierblk.cli.target import add_target, looking
from tierblk.errors import DaemonError, DeviceError
from tierblk.extent import Extent
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cache import View
    from tierblk.cli.target import CachedDevice

NAME = "warm"
HELP = "fetch what is not cached yet"
PIECE_BYTES = 8 << 20
READ_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET [RANGE], --partition, --file."""
    add_target(parser)
    add_range(parser, optional=True)
    parser.add_argument("--partition", type=int, metavar="N", help="all of it, or where --file is")
    parser.add_argument(
        "--file", action="append", default=[], metavar="PATH", help="a file of its filesystem"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Says how much came."""
    with looking(args) as (view, device):
        daemon = tended.daemon_of(view, args.timeout_s)
        shown = _attached(daemon, device) if daemon is not None else None
        if daemon is None or shown is None:
            raise DeviceError(
                f"{device.name} is not attached: its daemon is what fetches",
                "tierblk attach CONFIG",
            )
        size_bytes = int(shown["size_bytes"])
        ranges = [extent.clamp(size_bytes) for extent in _ranges(args, shown, size_bytes)]
        missing = [extent for extent in _missing(view, device, size_bytes, ranges) if extent]
    fetched = _fetch(daemon, str(shown["name"]), missing)
    document = {
        "name": shown["name"],
        "ranges": [[extent.offset, extent.length] for extent in ranges],
        "wanted_bytes": sum(extent.length for extent in ranges),
        "fetched_bytes": fetched,
    }
    if args.json:
        put_json(document)
    else:
        put(f"{format_size(fetched)} fetched; {format_size(document['wanted_bytes'])} are cached now")
    return 0


def _attached(daemon: Daemon, device: CachedDevice) -> dict[str, Any] | None:
    """What its daemon shows of it."""
    for shown in daemon.devices():
        if device.volume is not None and shown.get("name") == device.volume.name:
            return shown
        base = device.base
        is_alone = device.volume is None and base is not None and not shown.get("volume")
        if is_alone and base is not None and shown.get("validator") == base.validator:
            return shown
    return None


def _ranges(args: argparse.Namespace, shown: dict[str, Any], size_bytes: int) -> list[Extent]:
    node = str(shown["path"])
    where = Extent(0, size_bytes)
    if args.partition is not None:
        node, where = _partition(node, args.partition)
    if args.file:
        found = [extent for path in args.file for extent in extents_of_file(Path(node), path)]
        return [Extent(where.offset + extent.offset, extent.length) for extent in found]
    if args.range is not None:
        part = within(args.range, where.length, node)
        return [Extent(where.offset + part.offset, part.length)]
    return [where]


def _partition(node: str, number: int) -> tuple[str, Extent]:
    """As the kernel has found it."""
    folder = Path("/sys/class/block") / f"{Path(node).name}p{number}"
    try:
        start, sectors = (int((folder / name).read_text()) for name in ("start", "size"))
    except (OSError, ValueError):
        raise DeviceError(f"{node} has no partition {number}", f"`lsblk {node}` shows them") from None
    return f"{node}p{number}", Extent(start * 512, sectors * 512)


def _missing(view: View, device: CachedDevice, size_bytes: int, ranges: list[Extent]) -> Iterator[Extent]:
    from tierblk.cache.reading import Reader

    reader = Reader(view, device.layers, size_bytes)
    for extent in ranges:
        yield from reader.missing(extent)


def _fetch(daemon: Daemon, name: str, missing: list[Extent]) -> int:
    """How many bytes came. Ctrl-C ends it; what came stays."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    total, done = sum(extent.length for extent in missing), 0
    console = Console(stderr=True)
    columns = TextColumn("warming"), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("warming", total=total)
        for extent in missing:
            for piece in extent.split(PIECE_BYTES):
                query = f"offset={piece.offset}&length={piece.length}"
                try:
                    daemon.read(f"{device_path(name)}/content?{query}", READ_TIMEOUT_S)
                except DeadSocket:
                    raise DaemonError(f"{daemon} ended while it was asked") from None
                done += piece.length
                shown.update(task, advance=piece.length)
    return done
