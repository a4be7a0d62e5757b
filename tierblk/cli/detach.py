"""Takes a device away; what is cached stays. Refuses while the device is mounted or otherwise held.

With --json: {"detached": NAME}.
"""

from __future__ import annotations

import argparse

from tierblk.cli import blockdev
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import DeadSocket, device_path, find_device
from tierblk.cli.output import put_json
from tierblk.errors import DaemonError

NAME = "detach"
HELP = "take a device away"
DETACH_TIMEOUT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="NAME", help="the device's name in its config")
    add_cache_dir(parser, "where several caches have a device of this name")
    add_json(parser)
    add_timeout(parser, DETACH_TIMEOUT_S)


def run(args: argparse.Namespace) -> int:
    """Returns when the device is gone."""
    daemon, device = find_device(args.name, args.cache_dir, args.timeout_s)
    path = str(device.get("path"))
    blockdev.settle()  # or udev's own look at the device would make it busy
    blockdev.ensure_free(path)
    try:
        daemon.request("DELETE", device_path(args.name), timeout_s=args.timeout_s)
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked") from None
    if args.json:
        put_json({"detached": args.name})
    return 0
