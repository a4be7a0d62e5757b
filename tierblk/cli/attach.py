"""Makes the block device that a config describes, and prints its path when it and its partitions can be used.

Starts the daemon of the cache directory if none runs. With --json: the device, as in `tierblk status`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from typing import TYPE_CHECKING, Any

from tierblk.cli import blockdev, starting
from tierblk.cli.arguments import add_json, add_timeout
from tierblk.cli.client import DeadSocket, find_daemon
from tierblk.cli.output import put, put_json, warn
from tierblk.errors import DaemonError, TierblkError
from tierblk.ready import Ready

if TYPE_CHECKING:
    from tierblk.config import Config

NAME = "attach"
HELP = "make the block device that a config describes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG."""
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, see configs/reference.toml")
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="run the daemon in this process; SIGTERM leaves the device to the next one, Ctrl-C detaches it",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take a volume from a host that is gone without detaching it; that host can write no more",
    )
    parser.add_argument(
        "--discard-local",
        action="store_true",
        help="lose what was written here and is not in object storage, and go back to the last epoch",
    )
    parser.add_argument(
        "--clone-local",
        action="store_true",
        help="make a new volume at volume.url of what was written here and cannot be uploaded any more",
    )
    # The child of --foreground: waits at this pipe for its parent's daemon instead of starting one.
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the path alone on stdout."""
    from tierblk import config

    loaded = config.load(args.config)
    if args.ready_fd is not None:
        return _helper(loaded, args)
    if args.foreground:
        return _foreground(loaded, args)
    for _ in range(3):
        daemon, started = starting.running_or_started(loaded, timeout_s=args.timeout_s, debug=args.debug)
        try:
            device = daemon.request("POST", "/v1/devices", _body(loaded, args), _patience_s(loaded))
            break
        except DeadSocket:
            continue  # it stopped between being found and being asked
        except BaseException:
            if started:
                starting.stop_if_idle(daemon)
            raise
    else:
        raise DaemonError(f"the daemon of {loaded.cache.dir} ends again and again")
    finish(device, json=args.json)
    return 0


def _body(loaded: Config, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "config_path": str(loaded.path),
        "config": loaded.to_document(),
        "take_over": args.take_over,
        "discard_local": args.discard_local,
        "clone_local": args.clone_local,
    }


def _patience_s(loaded: Config) -> float:
    """Longer than the daemon can take for an attach: each request as often as the config allows."""
    remote = loaded.remote
    asked = 2 if loaded.volume is None or loaded.volume.url is None else 8  # the store is asked more often
    return 60 + asked * (remote.retries + 1) * (
        remote.connect_timeout + remote.read_timeout + remote.retry_delay
    )


def finish(device: dict[str, Any], *, json: bool) -> None:
    """Partitions, warnings, and then the path."""
    path = str(device.get("path"))
    warnings = list(device.get("warnings") or ())
    if blockdev.is_block_device(path):
        warnings += filter(None, (blockdev.scan_partitions(path), blockdev.wait_for_nodes(path)))
    for warning in warnings:
        warn(str(warning))
    if json:
        put_json({**device, "warnings": warnings})
    else:
        put(path)


def _foreground(loaded: Config, args: argparse.Namespace) -> int:
    """Runs the daemon here; a child attaches, because a daemon must not open its own devices."""
    from tierblk.cli.serve import serve

    other = find_daemon(loaded.cache.dir, args.timeout_s)
    if other:
        raise DaemonError(
            f"{other} already runs", "leave out --foreground to attach with it, or stop it: tierblk stop"
        )
    ready_read, ready_write = os.pipe()
    arguments = ["attach", str(loaded.path), "--ready-fd", str(ready_read), "--timeout", f"{args.timeout_s}s"]
    flags = ("--json", "--debug", "--take-over", "--discard-local", "--clone-local")
    arguments += [flag for flag in flags if getattr(args, flag[2:].replace("-", "_"))]
    helper = subprocess.Popen(starting.command(*arguments), stdin=subprocess.DEVNULL, pass_fds=(ready_read,))
    os.close(ready_read)
    ready = Ready(ready_write)
    try:
        code = serve(loaded, ready, debug=args.debug)
    finally:
        # The daemon is gone, so whatever the child still waits for has ended; also its line, which was never
        # written if Ctrl-C came early.
        ready.close()
        helper_code = helper.wait()
    return helper_code if helper_code > 0 else code


def _helper(loaded: Config, args: argparse.Namespace) -> int:
    """The child of --foreground. If it cannot attach, it stops the daemon; its exit code is the command's."""
    try:
        starting.await_ready(args.ready_fd, starting.READY_TIMEOUT_S, None)
    except TierblkError:
        return 0  # the daemon's own process says it, and with which code
    daemon = find_daemon(loaded.cache.dir, args.timeout_s)
    if daemon is None:
        return 0
    try:
        device = daemon.request("POST", "/v1/devices", _body(loaded, args), _patience_s(loaded))
        finish(device, json=args.json)
    except DeadSocket:
        return 0
    except BaseException:
        starting.stop_if_idle(daemon, wait=False)  # its process waits for this one
        raise
    return 0
