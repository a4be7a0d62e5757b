"""Writes what a device reads as into a file: raw and sparse, or qcow2. CONFIG: its config file, with a daemon
or without one, so also for what another host has taken over; NAME: a device that is attached.

What is cached is read from the cache directory and checked, the rest is fetched. Of a device that is in use
the file has what was there when each piece was read: detach it, or freeze its filesystems, for one moment's
content. FILE "-" writes to a pipe. With --json: {"path", "format", "size_bytes", "data_bytes",
"cached_bytes", "fetched_bytes", "bad_pages", "damaged_pages": [offset in bytes], "holes": [{"offset_bytes",
"length_bytes"}]}; a device that is attached is read through its daemon, and then only the sizes are known.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli import orphans
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.output import plain, put_json, say, warn
from tierblk.errors import DaemonError, DeviceError, TierblkError
from tierblk.extent import PAGE_BYTES
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cli.client import Daemon
    from tierblk.config import Config
    from tierblk.exporting import Reader, Wanted
    from tierblk.records import DeviceRecord
    from tierblk.remote import Identity

NAME = "export"
HELP = "write what a device reads as into a file"
HOLES_SHOWN_MAX = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG or NAME, FILE, and how."""
    parser.add_argument("target", metavar="CONFIG|NAME", help="a config file, or the name of a device")
    parser.add_argument("file", metavar="FILE", help='the new file; "-" is standard output')
    parser.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="of FILE (default raw)")
    parser.add_argument("--replace", action="store_true", help="FILE may be there already")
    parser.add_argument("--offline", action="store_true", help="fetch nothing: only what is cached")
    parser.add_argument("--holes", action="store_true", help="leave out what cannot be had, and list it")
    add_cache_dir(parser, "where several caches have a device of this name")
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Says what came of it."""
    import asyncio

    from tierblk.exporting import Wanted

    if args.file == "-" and args.format != "raw":
        raise TierblkError("a qcow2 image cannot be written to a pipe", "name a file, or use --format raw")
    if args.file == "-" and (args.json or sys.stdout.isatty()):
        raise TierblkError("an image is nothing for a terminal, nor for --json", "name a file")
    wanted = Wanted(args.format, offline=args.offline, holes=args.holes)
    found = asyncio.run(_export(args, wanted))
    for hole in found["holes"][:HOLES_SHOWN_MAX]:
        warn(f"{hole['length_bytes']} bytes at {hole['offset_bytes']} are left out: they could not be had")
    if (more := len(found["holes"]) - HOLES_SHOWN_MAX) > 0:
        warn(f"and {more} more ranges")
    if args.json:
        put_json(found)
    else:
        _say(found)
    return 0


def _say(found: dict[str, Any]) -> None:
    size, data = format_size(found["size_bytes"]), format_size(found["data_bytes"])
    words = f"{found['path']}: {size}, of which {data} are not zero"
    if found["cached_bytes"] or found["fetched_bytes"]:
        words += f"; {format_size(found['cached_bytes'])} were cached"
        words += f", {format_size(found['fetched_bytes'])} fetched"
    say(words)
    if found["bad_pages"]:
        warn(
            f"{found['bad_pages']} cached pages were bad and were fetched: `tierblk cache verify` names them"
        )
    if damaged := found["damaged_pages"]:
        warn(
            f"{len(damaged)} pages are not what was written, and nobody else has them: the file has them as "
            f"they are here, the first at {damaged[0]:#x}"
        )


async def _export(args: argparse.Namespace, wanted: Wanted) -> dict[str, Any]:
    from tierblk import exporting

    bar = _Bar(args.target)
    # The file takes its name only behind all checks, also those of who closes the device.
    with bar.shown, _file(args) as descriptor:
        async with _open(args, wanted, bar.trouble) as reader:
            bar.begin(reader.size_bytes)
            if args.file == "-":
                sink: exporting.Sink = exporting.Stream(descriptor, reader.size_bytes)
            else:
                sink = exporting.sink_of(wanted.format, descriptor, reader.size_bytes)
            data_bytes = await exporting.copy(reader, sink, bar.more)
    tally = reader.tally
    return {
        "path": args.file,
        "format": wanted.format,
        "size_bytes": reader.size_bytes,
        "data_bytes": data_bytes,
        "cached_bytes": tally.cached_bytes,
        "fetched_bytes": tally.fetched_bytes,
        "bad_pages": tally.bad_pages,
        "damaged_pages": [page * PAGE_BYTES for page in sorted(tally.damaged)],
        "holes": [{"offset_bytes": offset, "length_bytes": length} for offset, length in sorted(tally.holes)],
    }


@contextmanager
def _file(args: argparse.Namespace) -> Iterator[int]:
    from tierblk.exporting import new_file

    if args.file == "-":
        yield sys.stdout.fileno()
        return
    try:
        with new_file(Path(args.file), replace=args.replace) as descriptor:
            yield descriptor
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TierblkError(f"cannot write {args.file}: {error.strerror}") from None


@asynccontextmanager
async def _open(
    args: argparse.Namespace, wanted: Wanted, trouble: Callable[[TierblkError], None]
) -> AsyncIterator[Reader]:
    """Through the daemon that has the device, or beside it."""
    from tierblk.cache import look
    from tierblk.cli.attached import AttachedReader
    from tierblk.exporting import open_device
    from tierblk.rundir import run_root

    found = _find(args)
    name = found.config.device.name
    if found.daemon is not None and found.size_bytes is not None and not wanted.offline:
        patience_s = found.config.device.on_outage
        before = _device(found.daemon, name)
        with _parts(found.config, found.size_bytes) as parts:
            yield AttachedReader(found.daemon, name, found.size_bytes, patience_s, trouble, parts)
        if _device(found.daemon, name) != before:
            raise DeviceError(f"{name} was attached anew meanwhile, or shows another version", "do it again")
        return
    with look(found.config.cache.dir, run_root()) as view:
        async with open_device(view, found.config, found.pin, wanted, trouble) as reader:
            yield reader


def _device(daemon: Daemon, name: str) -> tuple[object, ...]:
    """Which one of that name there is."""
    from tierblk.cli.client import DeadSocket

    try:
        device = next((each for each in daemon.devices() if each.get("name") == name), {})
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked") from None
    return tuple(device.get(key) for key in ("attached", "size_bytes", "validator"))


@contextmanager
def _parts(config: Config, size_bytes: int) -> Iterator[Callable[[], Iterator[tuple[int, int]]]]:
    """What of a device is to be read. The daemon's block map says it, which is looked into beside it; without
    one all of it is."""
    from tierblk.cache import look
    from tierblk.errors import CacheError
    from tierblk.reader import windows
    from tierblk.rundir import run_root

    with ExitStack() as undo:
        volume, base_bytes = None, 0
        if config.volume is not None:
            with suppress(CacheError):
                view = undo.enter_context(look(config.cache.dir, run_root()))
                name = config.device.name
                records = (record for record in view.records if record.is_volume and record.name == name)
                if (record := next(records, None)) is not None:
                    volume, base_bytes = view.layer(record), record.base_size_bytes
        yield lambda: windows(size_bytes, volume, base_bytes)


@dataclass(frozen=True)
class _Found:
    """The config of a device; the daemon of its cache; how large it is if that daemon has it; which version
    of its image it shows, where a record says so."""

    config: Config
    daemon: Daemon | None = None
    size_bytes: int | None = None
    pin: Identity | None = None


def _find(args: argparse.Namespace) -> _Found:
    from tierblk import config as configs
    from tierblk.cli.client import find_daemon, find_device

    if os.path.isfile(args.target):
        loaded = configs.load(args.target)
        name = loaded.device.name
        # For what is cached nobody has to answer.
        daemon = None if args.offline else find_daemon(loaded.cache.dir, args.timeout_s)
        devices = daemon.devices() if daemon is not None else []
        size = next((_size(device) for device in devices if device.get("name") == name), None)
        record = _record(daemon, name, str(loaded.cache.dir), args.timeout_s)
        return _Found(loaded, daemon, size, _pin(record))
    try:
        daemon, device = find_device(args.target, args.cache_dir, args.timeout_s)
    except DeviceError as error:
        record = _record(None, args.target, args.cache_dir, args.timeout_s)
        if record is None:
            raise DeviceError(error.message, f"{error.hint}; or name its config file") from None
        return _Found(configs.parse(record.config, Path(record.config_path)), pin=_pin(record))
    record = _record(daemon, args.target, args.cache_dir, args.timeout_s)
    loaded = (
        configs.parse(record.config, Path(record.config_path))
        if record is not None
        else configs.load(str(device.get("config_path")))
    )
    return _Found(loaded, daemon, _size(device), _pin(record))


def _size(device: dict[str, Any]) -> int | None:
    """In bytes, of one that its daemon can read: not of one that it has not, or not yet, taken over."""
    return None if device.get("state") in ("recovering", "failed") else int(device["size_bytes"])


def _record(daemon: Daemon | None, name: str, cache_dir: str | None, timeout_s: float) -> DeviceRecord | None:
    """Of a device that is there, with a daemon or waiting for one; others may have caches with one of that
    name."""
    from tierblk import records

    if daemon is not None:
        return next((each for each in records.read_all(daemon.run_dir)[0] if each.name == name), None)
    orphan = orphans.find(name, cache_dir, timeout_s)
    return orphan[1] if orphan is not None else None


def _pin(record: DeviceRecord | None) -> Identity | None:
    from tierblk.remote import Identity

    if record is None or not record.url:
        return None
    return Identity(record.url, record.size_bytes, record.validator)


class _Bar:
    """How far it is, on a terminal, and what holds it up."""

    def __init__(self, target: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._what = f"exporting {Path(target).name}"
        self._console = Console(stderr=True)
        self.shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self.shown.add_task(plain(self._what), total=None)
        self._said = ""

    def begin(self, size_bytes: int) -> None:
        """So much is to be done."""
        self.shown.update(self._task, total=size_bytes)

    def more(self, done_bytes: int) -> None:
        """So much more is."""
        self._said = ""
        self.shown.update(self._task, advance=done_bytes, description=plain(self._what))

    def trouble(self, error: TierblkError) -> None:
        """It waits for a remote."""
        if self._console.is_terminal:
            self.shown.update(self._task, description=plain(f"{self._what} ({error.message})"))
        elif error.message != self._said:
            self._said = error.message
            say(f"waiting: {error.message}")
