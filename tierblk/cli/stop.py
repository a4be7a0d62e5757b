"""Stops daemons in order: devices are detached, caches closed clean. Without --cache-dir, all of them.

Refuses while a device is mounted or otherwise held, unless --force is given: then its users get I/O errors.
A daemon that has died and whose keeper is about to start the next one is waited for; if none comes, its
keeper is told to give up.

With --json: {"stopped": [cache directories], "warnings": [what went wrong with their ends]}.
"""

from __future__ import annotations

import argparse
import json
import os
import time

from tierblk import records
from tierblk.cli import blockdev, kept, orphans
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import Daemon, DeadSocket, candidates, same_directory
from tierblk.cli.output import complain, put_json, say, warn
from tierblk.cli.starting import wait_for_end
from tierblk.errors import DaemonError, TierblkError, from_dict
from tierblk.rundir import END_NAME

NAME = "stop"
HELP = "stop daemons and their devices"
STOP_TIMEOUT_S = 60.0
NEXT_DAEMON_S = 10.0
"""Twice the longest pause of a keeper: whoever has not come by then dies before it serves."""
KEEPER_END_S = 5.0
POLL_S = 0.05
DEATH_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--cache-dir, --force."""
    add_cache_dir(parser, "only the daemon of this cache directory")
    parser.add_argument("--force", action="store_true", help="also when devices are in use")
    add_json(parser)
    add_timeout(parser, STOP_TIMEOUT_S)


def run(args: argparse.Namespace) -> int:
    """Returns when their processes have ended. Tries all, then fails if one failed."""
    stopped: list[str] = []
    warnings: list[str] = []
    failed: TierblkError | None = None
    for daemon in _daemons(args.timeout_s):
        if args.cache_dir is not None and not same_directory(daemon.cache_dir, args.cache_dir):
            continue
        try:
            if not _stop_with_keeper(daemon, force=args.force):
                continue
            stopped.append(daemon.cache_dir)
            warnings += _last_words(daemon)
        except TierblkError as error:
            complain(error)
            failed = error
    for warning in warnings:
        warn(warning)
    if args.json:
        put_json({"stopped": stopped, "warnings": warnings})
    elif not stopped and not failed:
        say("no daemon is running" if args.cache_dir is None else f"no daemon serves {args.cache_dir}")
    return failed.exit_code if failed else 0


def _daemons(timeout_s: float) -> list[Daemon]:
    """All that run, and those that keepers are about to start: one that died early has left no socket."""
    found = candidates(timeout_s)
    for run_dir in kept.run_dirs() - {daemon.run_dir for daemon in found}:
        known, _ = records.read_all(run_dir)
        cache_dir = orphans.cache_of(run_dir, known[0] if known else None)
        found.append(Daemon(run_dir, {"cache_dir": cache_dir} if cache_dir else {}, timeout_s))
    return found


def _stop_with_keeper(daemon: Daemon, *, force: bool) -> bool:
    """Whether there was anything to stop: a daemon, or a keeper between two of them, whose pause would else
    bring back what was stopped."""
    found = _stop_or_wait(daemon, force=force)
    if not kept.is_kept(daemon.run_dir):
        return found
    deadline = time.monotonic() + KEEPER_END_S
    while True:
        kept.dismiss(daemon.run_dir)
        if kept.wait_while_kept(daemon.run_dir, POLL_S):
            return True
        try:
            _stop(daemon, force=force)  # it was on its way already
        except DeadSocket:
            if time.monotonic() > deadline:
                raise DaemonError(
                    f"{daemon} has ended, but its keeper starts it again",
                    f"end that process: fuser -k -TERM {daemon.run_dir / 'keeper'}",
                ) from None


def _stop_or_wait(daemon: Daemon, *, force: bool) -> bool:
    """False: no daemon listens, nor will. A keeper has NEXT_DAEMON_S for its next one: its devices wait for
    it, and only a daemon can take them away in order."""
    deadline = time.monotonic() + NEXT_DAEMON_S
    while True:
        try:
            _stop(daemon, force=force)
            return True
        except DeadSocket:
            if not kept.is_kept(daemon.run_dir) or time.monotonic() > deadline:
                return False
        time.sleep(POLL_S)


def _stop(daemon: Daemon, *, force: bool) -> None:
    # Before it is asked to stop: afterwards its number could be another process's.
    process_fd = daemon.process()
    try:
        try:
            if not force:
                blockdev.settle()
                for device in daemon.devices():
                    blockdev.ensure_free(str(device.get("path")))
            daemon.request("POST", "/v1/stop", {})
        except DaemonError:
            if wait_for_end(process_fd, DEATH_S):  # it broke off because it died
                raise DeadSocket(str(daemon.run_dir)) from None
            raise
        if not wait_for_end(process_fd, daemon.timeout_s):
            raise DaemonError(
                f"{daemon} is still stopping after {daemon.timeout_s:g} s",
                "tierblk doctor and its log may say why",
            )
    finally:
        os.close(process_fd)


def _last_words(daemon: Daemon) -> list[str]:
    """What a daemon that has ended says of its end, if anything went wrong with it."""
    try:
        error = from_dict(json.loads((daemon.run_dir / END_NAME).read_text()))
    except (OSError, ValueError):
        return []
    return [f"{daemon} has stopped, but its cache did not end clean: {error.message}"]
