"""Begins an epoch now: what was written to a device goes to object storage. With --wait it returns when it is
there.

Shows how much is left while it waits; Ctrl-C ends the waiting, not the upload. With --json: the device, as in
`tierblk status`.
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import Daemon, DeadSocket, device_path, find_device
from tierblk.cli.output import plain, put_json
from tierblk.errors import DaemonError, TierblkError

NAME = "sync"
HELP = "upload what was written to a device"
_FOR_EVER_S = 10 * 365 * 86400.0
_LOOK_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="NAME", help="the device's name in its config")
    parser.add_argument("--wait", action="store_true", help="until all of it is in object storage")
    add_cache_dir(parser, "where several caches have a device of this name")
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Returns when an epoch was begun, or with --wait when it is there."""
    daemon, device = find_device(args.name, args.cache_dir, args.timeout_s)
    if not device.get("write_back"):
        kind = device.get("volume")
        raise TierblkError(
            f"{args.name} has no volume in object storage" + (f", but a {kind} one" if kind else ""),
            'volume.mode = "write-back" makes one',
        )
    if args.wait:
        device = wait(daemon, device)
    else:
        device = _ask(daemon, args.name, wait=False, timeout_s=args.timeout_s)
    if args.json:
        put_json(device)
    return 0


def _ask(daemon: Daemon, name: str, *, wait: bool, timeout_s: float) -> dict[str, Any]:
    try:
        return daemon.request("POST", f"{device_path(name)}/sync", {"wait": wait}, timeout_s=timeout_s)
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked") from None


def wait(daemon: Daemon, device: dict[str, Any]) -> dict[str, Any]:
    """Until the store has it, however long that takes; the device as it is then. What the daemon reports."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    name = str(device["name"])
    done: list[dict[str, Any] | BaseException] = []

    def ask() -> None:
        try:
            done.append(_ask(daemon, name, wait=True, timeout_s=_FOR_EVER_S))
        except BaseException as error:
            done.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # so that Ctrl-C need not wait for it
    asking.start()
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    total = int(device["write_back"].get("dirty_bytes") or 0)
    hidden = not console.is_terminal or not total
    with Progress(*columns, console=console, transient=True, disable=hidden) as shown:
        task = shown.add_task(f"uploading {name}", total=total)
        while not done:
            asking.join(_LOOK_S)
            left, trouble = _left(daemon, name)
            total = max(total, left)
            described = plain(f"uploading {name}" + (f" ({trouble})" if trouble else ""))
            shown.update(task, total=total, completed=total - left, description=described)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _left(daemon: Daemon, name: str) -> tuple[int, str]:
    """(dirty bytes, what holds the upload up)."""
    try:
        far = daemon.get(device_path(name)).get("write_back") or {}
    except (DeadSocket, TierblkError):
        return 0, ""
    return int(far.get("dirty_bytes") or 0), str(far.get("trouble") or "")
