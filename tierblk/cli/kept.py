"""Keepers (keeper.py) as other commands see them: by the lock on RUN/<uuid>/keeper that they share."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from tierblk.rundir import STOPPED_NAME, run_root

POLL_S = 0.05


def is_kept(run_dir: Path) -> bool:
    """Whether a keeper is there, which will start the daemon again."""
    try:
        with open(run_dir / "keeper", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def run_dirs() -> set[Path]:
    """Of all keepers that are there."""
    try:
        return {path for path in run_root().iterdir() if is_kept(path)}
    except OSError:
        return set()


def dismiss(run_dir: Path) -> None:
    """Tells every keeper that has no daemon at the moment to start none; one whose daemon lives heeds it when
    that has died. The time of the file is the message: a keeper compares it with the one it saw when it
    last started a daemon. Without room for the file nobody is told."""
    path = run_dir / STOPPED_NAME
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.utime(path)
    except OSError:
        pass


def wait_while_kept(run_dir: Path, timeout_s: float) -> bool:
    """False: a keeper is still there."""
    deadline = time.monotonic() + timeout_s
    while is_kept(run_dir):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
