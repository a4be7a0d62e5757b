"""Says whether a config is right and changes nothing; with --connect, also whether the image can be read.

With --json: {"ok": true, "path", "config", "remote"}, where remote is null without --connect.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tierblk.cli.arguments import add_json
from tierblk.cli.output import put, put_json, warn
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.config import Config

NAME = "check"
HELP = "say whether a config is right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, --connect."""
    parser.add_argument("config", metavar="CONFIG", help="a TOML file")
    parser.add_argument("--connect", action="store_true", help="also open the image")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a sentence, and one about the remote."""
    import asyncio

    from tierblk import config

    loaded = config.load(args.config)
    remote = asyncio.run(_look(loaded)) if args.connect and loaded.url else None
    for warning in remote["warnings"] if remote else ():
        warn(warning)
    if args.json:
        put_json({"ok": True, "path": str(loaded.path), "config": _public(loaded), "remote": remote})
        return 0
    device, cache = loaded.device, loaded.cache
    where = f"{cache.dir} ({format_size(cache.size)})"
    volume = f" with a {loaded.volume.mode} volume" if loaded.volume else ""
    put(f"{loaded.path} is right: {device.name} from {loaded.shown_base}{volume}, cached in {where}")
    if remote:
        size = f"{format_size(remote['size_bytes'])} ({remote['size_bytes']} bytes)"
        put(f"the image can be read: {size}, {remote['validator']}")
    return 0


def _public(loaded: Config) -> dict[str, Any]:
    """The settings without what may be secret."""
    document = loaded.to_document()
    if loaded.base:
        document["base"]["url"] = loaded.shown_base
    document["remote"]["headers"] = dict.fromkeys(loaded.remote.headers, "...")
    return document


async def _look(loaded: Config) -> dict[str, Any]:
    """Opens the image as an attach would, and reads its first sectors by a range request. TierblkError."""
    from tierblk import partition
    from tierblk.remote.image import RawImage
    from tierblk.remote.source import open_source

    source = await open_source(loaded.url, loaded.remote)
    try:
        image = RawImage(source)
        head = bytearray(min(partition.HEAD_BYTES, image.size_bytes))
        await source.read_into(0, memoryview(head), lambda _: None)
    finally:
        await source.aclose()
    table = partition.parse(bytes(head), image.size_bytes)
    warning = table.warning() if table else None
    return {
        "size_bytes": image.size_bytes,
        "validator": image.identity.validator,
        "ranges": True,
        "warnings": [warning] if warning else [],
    }
