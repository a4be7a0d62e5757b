"""`tierblk cache verify --repair`: here, in a directory that nobody serves; else by its daemon, which drops
the pages, and fetches them again as soon as a device that shows them is read."""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tierblk.cli.client import Daemon, DeadSocket, device_path
from tierblk.cli.tended import CHANGE_TIMEOUT_S, daemon_of
from tierblk.errors import DaemonError, TierblkError
from tierblk.extent import BLOCK_BYTES, Extent
from tierblk.rundir import run_root

if TYPE_CHECKING:
    from tierblk.cache import LayerRecord
    from tierblk.cache.pagecheck import Bad
    from tierblk.config import Config
    from tierblk.repair import Repaired, Todo

PAGES_AT_ONCE = 4096


def repair(args: argparse.Namespace, directory: Path, found: list[Bad]) -> Repaired:
    """What came of it. TierblkError: nothing did."""
    every = [(each, each.layer.record.layer_id) for each in found]
    repaired = _repair(
        args, directory, [(layer_id, each.block, each.clean) for each, layer_id in every if each.clean]
    )
    for each, layer_id in every:
        if each.dirty:
            reason = "what nobody else has cannot be fetched anew: it is left as it is, and reads as that"
            repaired.leave((layer_id, each.block, each.dirty), reason)
    return repaired


def _repair(args: argparse.Namespace, directory: Path, bad: list[Todo]) -> Repaired:
    from tierblk.cache import look
    from tierblk.repair import Repaired
    from tierblk.repair import repair as repair_here

    if not bad:
        return Repaired()
    with look(directory, run_root(), lenient=True) as view:
        daemon, records = daemon_of(view, args.timeout_s), view.records
    with _bar(sum(mask.bit_count() for _, _, mask in bad)) as progress:
        if daemon is not None:
            return _by_daemon(daemon, records, bad, progress)
        return asyncio.run(repair_here(directory, bad, _config(args), progress))


def _config(args: argparse.Namespace) -> Config | None:
    from tierblk.config import load

    return load(args.target) if args.target.endswith(".toml") or Path(args.target).is_file() else None


def _by_daemon(
    daemon: Daemon, records: list[LayerRecord], bad: list[Todo], progress: Callable[[int], None]
) -> Repaired:
    from tierblk.repair import Repaired

    done, by_layer = Repaired(), defaultdict[int, list[tuple[int, int]]](list)
    for layer_id, block, mask in bad:
        by_layer[layer_id].append((block, mask))
    try:
        devices = daemon.devices()
        for record in records:
            if not (pages := by_layer.get(record.layer_id)):
                continue
            left = iter(pages)
            while batch := list(islice(left, PAGES_AT_ONCE)):
                body = {"layer_id": record.layer_id, "pages": batch}
                answer = daemon.request("POST", "/v1/cache/drop", body, timeout_s=CHANGE_TIMEOUT_S)
                done.pages += int(answer["dropped_pages"])
                busy = set(answer["busy_blocks"])
                for block, mask in batch:
                    if block in busy:
                        done.leave((record.layer_id, block, mask), "some were in use: do it again")
            shown_by = next((d for d in devices if _shows(d, record)), None)
            for block, mask in pages:
                if shown_by is not None:
                    where = Extent(block * BLOCK_BYTES, BLOCK_BYTES)
                    try:
                        _read(daemon, str(shown_by["name"]), where, record)
                    except TierblkError as error:  # it may be of what else is in that block
                        done.leave((record.layer_id, block, mask), error.message)
                progress(mask.bit_count())
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked", "do it again") from None
    except TierblkError as error:
        done.reasons.append(f"{error.message}: what is not here again is fetched by the next read")
    return done


def _shows(device: dict[str, object], record: LayerRecord) -> bool:
    if record.is_volume:
        return device.get("name") == record.name
    return device.get("validator") == record.validator and device.get("url") == record.shown


def _read(daemon: Daemon, name: str, where: Extent, record: LayerRecord) -> None:
    """Through the device: where its volume hides the base nothing is fetched, and nothing is missed."""
    wanted = where.clamp(record.size_bytes)
    daemon.read(
        f"{device_path(name)}/content?offset={wanted.offset}&length={wanted.length}", CHANGE_TIMEOUT_S
    )


@contextmanager
def _bar(pages: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("repairing", total=pages)
        yield lambda done: shown.update(task, advance=done)
