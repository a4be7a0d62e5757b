"""Says whether a config is right and changes nothing; with --connect, also whether the image can be read, and
whether the store of a volume can hold one (some objects below proof/ are made there, and deleted).

With --json: {"ok": true, "path", "config", "remote", "store"}, where the last two are null without --connect.
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
    parser.add_argument("--connect", action="store_true", help="also open the image, and try the store")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a sentence, and one about the remote."""
    import asyncio

    from tierblk import config

    loaded = config.load(args.config)
    remote = asyncio.run(_look(loaded)) if args.connect and loaded.url else None
    is_far = loaded.volume is not None and loaded.volume.url is not None
    store = asyncio.run(_try(loaded)) if args.connect and is_far else None
    for warning in remote["warnings"] if remote else ():
        warn(warning)
    if args.json:
        document = {"ok": True, "path": str(loaded.path), "config": _public(loaded)}
        put_json({**document, "remote": remote, "store": store})
        return 0
    device, cache = loaded.device, loaded.cache
    where = f"{cache.dir} ({format_size(cache.size)})"
    volume = f" with a {loaded.volume.mode} volume" if loaded.volume else ""
    put(f"{loaded.path} is right: {device.name} from {loaded.shown_base}{volume}, cached in {where}")
    if remote:
        size = f"{format_size(remote['size_bytes'])} ({remote['size_bytes']} bytes)"
        put(f"the image can be read: {size}, {remote['validator']}")
    if store:
        has = "has no volume yet"
        if store["epoch"] is not None:
            state = "released" if store["released"] else "held by a host"
            has = f"has a volume of {format_size(store['size_bytes'])} at epoch {store['epoch']}, {state}"
        put(f"the store can be used, of racing creations one wins; {store['url']} {has}")
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


async def _try(loaded: Config) -> dict[str, Any]:
    """Proves the store, and looks at what is there as an attach would. TierblkError."""
    from tierblk import remote

    assert loaded.volume is not None
    assert loaded.volume.url is not None

    async def open_it(url: str) -> remote.Store:
        return await remote.open_store(url, loaded.store, loaded.remote)

    store = await open_it(loaded.volume.url)
    try:
        await remote.prove(store)
        found: dict[str, Any] = {"url": store.shown, "size_bytes": None, "epoch": None, "released": None}
        if await remote.read_birth(store) is None:
            return found
        lineage = await remote.open_lineage(store, open_it)
        head = (await remote.load(lineage)).head
        name = str(remote.EpochName(head.epoch)) if head.epoch else None
        data = await lineage.store_of(head.epoch).read(name, remote.RECORD_BYTES_MAX) if name else None
        released = data is None or name is None or remote.decode_record(data, name=name).released
        return {**found, "size_bytes": head.size_bytes, "epoch": head.epoch, "released": released}
    finally:
        await store.aclose()
