"""Deletes devices that dead daemons left behind, and says each. Whoever waits for one gets errors.

Devices of a daemon that runs, or that a keeper is about to start again, are left alone; and so is every ublk
device that is not tierblk's. With --json: {"reaped": [device], "left": [device]}, each {"path", "reason"}.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from tierblk import records
from tierblk.cli import orphans
from tierblk.cli.arguments import add_json, add_timeout
from tierblk.cli.kept import is_kept
from tierblk.cli.output import put, put_json, say
from tierblk.errors import TierblkError
from tierblk.rundir import run_root

if TYPE_CHECKING:
    from tierblk.core.ublk import DeviceInfo

NAME = "reap"
HELP = "delete devices that dead daemons left behind"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--dry-run."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Tries all; fails if one could not be deleted."""
    from tierblk import driver

    try:
        ours = [info for info in driver.devices() if driver.is_stamped(info.stamp)]
    except OSError as error:
        raise driver.driver_error(error) from None
    alive = orphans.living(args.timeout_s)
    failed: TierblkError | None = None
    reaped, left = [], []
    for info in ours:
        path = f"/dev/ublkb{info.dev_id}"
        run_dir = _run_dir_of(info.stamp)
        try:
            if reason := _owner(info, run_dir, alive):
                left.append({"path": path, "reason": reason})
                continue
            name = _take_away(info, run_dir, dry=args.dry_run)
        except TierblkError as error:
            failed = error
            left.append({"path": path, "reason": str(error)})
            continue
        reaped.append({"path": path, "reason": f"left behind by a daemon that has ended{name}"})
    if args.json:
        put_json({"reaped": reaped, "left": left})
    else:
        for device in reaped:
            word = "would delete" if args.dry_run else "deleted"
            put(f"{word} {device['path']}: {device['reason']}")
        for device in left:
            say(f"left alone {device['path']}: {device['reason']}")
        if not reaped and not left:
            say("no device of tierblk is here")
    return failed.exit_code if failed else 0


def _run_dir_of(stamp: int) -> Path | None:
    """The run directory of the cache that a device belongs to, if a daemon of it ran since the last boot."""
    from tierblk import driver

    root = run_root()
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        try:
            if driver.stamp_of(UUID(path.name).bytes) == stamp:
                return path
        except ValueError:
            continue
    return None


def _owner(info: DeviceInfo, run_dir: Path | None, alive: set[Path]) -> str | None:
    """Why a device is none of our business; None when nobody looks after it."""
    from tierblk import driver

    if run_dir in alive:
        return "its daemon runs; `tierblk detach` takes it away"
    if run_dir is not None and is_kept(run_dir):
        return "its keeper starts the daemon again"
    info_now = driver.wait_for_rest(info.dev_id, 2.0)
    if info_now is not None and driver.has_server(info_now):
        return f"process {info_now.server_pid} serves it"
    return None


def _take_away(info: DeviceInfo, run_dir: Path | None, *, dry: bool) -> str:
    """Its name in a clause, if it has a record."""
    from tierblk import driver

    known = records.read_all(run_dir)[0] if run_dir else []
    record = next((found for found in known if found.dev_id == info.dev_id), None)
    name = f" ({record.name})" if record else ""
    if dry:
        return name
    with orphans.no_daemon(orphans.cache_of(run_dir, record) if run_dir else None):
        try:
            driver.take_away(info.dev_id)
        except OSError as error:
            raise driver.driver_error(error) from None
        if run_dir is not None:
            records.remove(run_dir, info.dev_id)
    return name
