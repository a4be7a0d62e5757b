"""Takes a device away; what is cached stays. Refuses while the device is mounted or otherwise held. What was
written to a volume in object storage is uploaded first, and the volume can be attached anywhere then.

With --force whoever uses it gets I/O errors, also readers that wait for a remote that does not answer; and it
works for a device whose daemon has ended. With --json: {"detached": NAME}.
"""

from __future__ import annotations

import argparse

from tierblk.cli import blockdev, orphans, sync
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import DeadSocket, device_path, find_device
from tierblk.cli.output import put_json, warn
from tierblk.errors import DaemonError, DeviceError

NAME = "detach"
HELP = "take a device away"
DETACH_TIMEOUT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="NAME", help="the device's name in its config")
    parser.add_argument("--force", action="store_true", help="also when it is in use: readers get errors")
    add_cache_dir(parser, "where several caches have a device of this name")
    add_json(parser)
    add_timeout(parser, DETACH_TIMEOUT_S)


def run(args: argparse.Namespace) -> int:
    """Returns when the device is gone."""
    orphan = orphans.find(args.name, args.cache_dir, args.timeout_s)
    if orphan is None:
        _ask_daemon(args)
    elif args.force:
        orphans.take_away(*orphan)
    else:
        raise DeviceError(
            f"{args.name} ({orphan[1].path}) waits for a daemon, which could say whether it is in use",
            f"start one: tierblk attach {orphan[1].config_path}; or take it away: tierblk detach --force",
        )
    if args.json:
        put_json({"detached": args.name})
    return 0


def _ask_daemon(args: argparse.Namespace) -> None:
    daemon, device = find_device(args.name, args.cache_dir, args.timeout_s)
    if not args.force:
        blockdev.settle()  # or udev's own look at the device would make it busy
        blockdev.ensure_free(str(device.get("path")))
        if (device.get("write_back") or {"fenced": True}).get("fenced") is None:
            sync.wait(daemon, device)  # Ctrl-C here leaves everything as it was
    try:
        answer = daemon.request(
            "DELETE", device_path(args.name), {"force": args.force}, timeout_s=args.timeout_s
        )
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked") from None
    if answer.get("warning"):
        warn(str(answer["warning"]))
