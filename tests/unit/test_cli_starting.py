"""Daemons that an attach started for nothing."""

from __future__ import annotations

import os
from pathlib import Path

from tierblk.cli.client import Daemon
from tierblk.cli.starting import stop_if_idle


def test_a_daemon_that_is_gone_already_does_not_hide_the_first_error(tmp_path: Path) -> None:
    """Its socket goes first when it is stopped; an attach that fails meanwhile says why it failed."""
    stop_if_idle(Daemon(tmp_path, {"pid": os.getpid()}, 1.0))
