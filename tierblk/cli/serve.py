"""Runs the daemon of a cache directory in this process. `tierblk attach` starts it when none runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from tierblk.errors import ConfigError, TierblkError

if TYPE_CHECKING:
    from tierblk.config import Config

NAME = "serve"
HELP = "run the daemon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `attach` passes on."""
    parser.add_argument("--config", required=True, metavar="PATH", help="says which cache directory to serve")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="where to write a JSON line when it serves")
    parser.add_argument(
        "--keep", action="store_true", help="start it again when it dies, from a small process in front of it"
    )
    parser.add_argument("--log", metavar="FILE", help="append the log to this file instead of stderr")


def run(args: argparse.Namespace) -> int:
    """Until SIGTERM or `tierblk stop`."""
    if args.keep:
        _keep(args)
    from tierblk import config, control

    try:
        if args.log:
            _log_to(args.log)
        loaded = config.load(args.config)
    except TierblkError as error:
        if args.ready_fd is not None:
            control.report_failure(args.ready_fd, error)
        raise
    return serve(loaded, args.ready_fd, debug=args.debug)


def _keep(args: argparse.Namespace) -> NoReturn:
    """Becomes the keeper (keeper.py): a fresh interpreter, small for want of all that is loaded here."""
    from tierblk.cli.starting import keeper_command

    words = ["serve", "--config", os.path.abspath(args.config)]
    words += ["--log", os.path.abspath(args.log)] if args.log else []
    words += ["--debug"] if args.debug else []
    ready_fd = -1 if args.ready_fd is None else args.ready_fd
    command = keeper_command(ready_fd, *words)
    os.execv(command[0], command)


def serve(loaded: Config, ready_fd: int | None, *, debug: bool) -> int:
    """The daemon's exit code. ready_fd gets one line, and is closed: it serves, or why it does not."""
    from tierblk import control

    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    os.chdir("/")  # no directory stays busy because a daemon was started in it
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
    try:
        from tierblk.daemon import main

        return main(loaded, ready_fd=ready_fd)
    except TierblkError as error:
        if ready_fd is not None:
            control.report_failure(ready_fd, error)
        raise
    except Exception as error:
        if ready_fd is not None:
            control.report_failure(ready_fd, TierblkError(f"the daemon could not start: {error!r:.300}"))
        raise


def _log_to(path: str) -> None:
    try:
        log_fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the log {path}: {error.strerror}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
