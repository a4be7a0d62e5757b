"""Makes a device show the version of its image that the server has now, under the same path.

Refuses while the device is in use: whoever has it open or mounted would see two versions mixed. What is
cached of the old version stays until its space is needed. With --json: the device, as in `tierblk status`.
"""

from __future__ import annotations

import argparse

from tierblk.cli import blockdev
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.attach import finish
from tierblk.cli.client import DeadSocket, device_path, find_device
from tierblk.errors import DaemonError

NAME = "repin"
HELP = "show the image's present version"
REPIN_TIMEOUT_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME."""
    parser.add_argument("name", metavar="NAME", help="the device's name in its config")
    add_cache_dir(parser, "where several caches have a device of this name")
    add_json(parser)
    add_timeout(parser, REPIN_TIMEOUT_S)


def run(args: argparse.Namespace) -> int:
    """Prints the path alone on stdout."""
    daemon, device = find_device(args.name, args.cache_dir, args.timeout_s)
    blockdev.settle()
    blockdev.ensure_free(str(device.get("path")))
    try:
        device = daemon.request("POST", f"{device_path(args.name)}/repin", {}, timeout_s=args.timeout_s)
    except DeadSocket:
        raise DaemonError(f"{daemon} ended while it was asked") from None
    finish(device, json=args.json)
    return 0
