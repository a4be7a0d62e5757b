"""Runs the daemon of a cache directory in this process. `tierblk attach` starts it when none runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from tierblk.errors import ConfigError, TierblkError
from tierblk.ready import Ready

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
    from tierblk import config

    ready = Ready(args.ready_fd)
    try:
        if args.log:
            _log_to(args.log)
        loaded = config.load(args.config)
    except TierblkError as error:
        ready.failed(error)
        raise
    return serve(loaded, ready, debug=args.debug)


def _keep(args: argparse.Namespace) -> NoReturn:
    """Becomes the keeper (keeper.py): a fresh interpreter, small for want of all that is loaded here."""
    from tierblk.cli.starting import keeper_command

    words = ["serve", "--config", os.path.abspath(args.config)]
    words += ["--log", os.path.abspath(args.log)] if args.log else []
    words += ["--debug"] if args.debug else []
    ready_fd = -1 if args.ready_fd is None else args.ready_fd
    command = keeper_command(ready_fd, *words)
    os.execv(command[0], command)


def serve(loaded: Config, ready: Ready, *, debug: bool) -> int:
    """The daemon's exit code. ready is told that it serves, or why it does not."""
    begin_log(debug=debug)
    os.chdir("/")  # no directory stays busy because a daemon was started in it
    try:
        from tierblk.service import main

        return main(loaded, ready)
    except TierblkError as error:
        ready.failed(error)
        raise
    except Exception as error:
        ready.failed(TierblkError(f"the daemon could not start: {error!r:.300}"))
        raise


def begin_log(*, debug: bool) -> None:
    """On stderr. debug is for what tierblk says itself: libraries then write requests and answers out, those
    for credentials too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("tierblk").setLevel(logging.DEBUG if debug else logging.INFO)


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
