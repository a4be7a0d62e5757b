"""Gives a cache directory another size: SIZE is that of its slots, as cache.size. A smaller one forgets what
was in the part that goes, but never what nobody else has. No daemon may serve the directory: for one that is
served, change cache.size and restart it. A config file as TARGET is to say the same size afterwards, or the
next daemon that is started with it sizes the directory back.

With --json: {"directory", "size_bytes", "before_bytes"}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tierblk.cli.arguments import add_json
from tierblk.cli.output import put, put_json, warn
from tierblk.cli.target import add_target, resolve
from tierblk.errors import CacheError, ConfigError
from tierblk.units import format_exact_size, format_size

NAME = "resize"
HELP = "give a cache directory another size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET SIZE."""
    add_target(parser, device=False)
    parser.add_argument("size", metavar="SIZE", help='such as "20GiB"')
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Says what it was and is."""
    import asyncio

    directory = resolve(args.target, args.timeout_s).directory
    wanted = _size(args.size)
    before, after = asyncio.run(_resize(directory, wanted))
    if args.json:
        put_json({"directory": str(directory), "size_bytes": after, "before_bytes": before})
    else:
        put(f"{directory}: {format_size(after)}, was {format_size(before)}")
    if args.target.endswith(".toml") or Path(args.target).is_file():
        from tierblk.config import load

        said = load(args.target).cache.size
        if said != wanted:
            warn(f'{args.target} says cache.size = "{format_exact_size(said)}": let it say "{args.size}" too')
    return 0


def _size(text: str) -> int:
    """By the rules of cache.size."""
    from pydantic import ValidationError

    from tierblk.config import CacheSettings

    try:
        return CacheSettings.model_validate({"dir": "/", "size": text}).size
    except ValidationError as error:
        raise ConfigError(f"SIZE: {error.errors()[0]['ctx']['error']}") from None


async def _resize(directory: Path, size_bytes: int) -> tuple[int, int]:
    import asyncio

    from tierblk.cache.superblock import SLOT_BYTES
    from tierblk.workshop import size_of, workshop

    before = await asyncio.to_thread(size_of, directory)
    async with workshop(directory, size_bytes) as cache:
        after = cache.engine.slot_count * SLOT_BYTES
    if after // SLOT_BYTES != size_bytes // SLOT_BYTES:
        raise CacheError(f"{directory} has {format_size(after)} now, not {format_size(size_bytes)}")
    return before, after
