"""Where what is asked of a cache by hand is done: by the daemon that serves the directory, or here, in one
that nobody serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli.client import Daemon, DeadSocket, candidates
from tierblk.errors import DaemonError
from tierblk.rundir import run_root

if TYPE_CHECKING:
    from tierblk.cache import Cache, View

CHANGE_TIMEOUT_S = 600.0
"""Evicting a terabyte, or a commit on a slow disk."""


def daemon_of(view: View, timeout_s: float) -> Daemon | None:
    """That which serves the directory, and answers; None: nobody does. DaemonError: it cannot be reached."""
    from tierblk.cache import State

    if view.state is not State.SERVED:
        return None
    for daemon in candidates(timeout_s):
        if daemon.run_dir == run_root() / str(view.superblock.uuid):
            try:
                daemon.get("/v1/daemon")  # what it is asked to do may take longer than a hang is borne
            except DeadSocket:
                break
            return daemon
    raise DaemonError(
        f"the daemon that serves {view.path} has no control socket", "it may be starting or ending"
    )


def change(
    daemon: Daemon | None,
    directory: Path,
    ask: Callable[[Daemon], dict[str, Any]],
    here: Callable[[Cache], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """ask: does it by a daemon; here: in an opened directory. TierblkError."""
    if daemon is not None:
        try:
            return ask(daemon)
        except DeadSocket:
            raise DaemonError(f"{daemon} ended while it was asked", "do it again") from None

    import asyncio

    async def work() -> dict[str, Any]:
        from tierblk.workshop import workshop

        async with workshop(directory) as cache:
            return await here(cache)

    return asyncio.run(work())
