"""What the daemon that serves a cache directory says, for commands that look at the files themselves: it is
asked for a moment, and one that does not answer costs a line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli.client import DeadSocket, candidates
from tierblk.errors import TierblkError

if TYPE_CHECKING:
    from tierblk.cache.view import View

ANSWER_S = 2.0
_BOTH_S = 0.9  # each of two questions


@dataclass(frozen=True)
class Beside:
    """info: of the daemon, None when nobody serves the directory or nobody answers. trouble: why nothing is
    known of a daemon that serves it."""

    pid: int | None = None
    info: dict[str, Any] | None = None
    devices: list[dict[str, Any]] = field(default_factory=list)
    trouble: str | None = None

    @property
    def cache(self) -> dict[str, Any]:
        """The engine's counters."""
        found = (self.info or {}).get("cache")
        return found if isinstance(found, dict) else {}


def ask(view: View, run_root: Path) -> Beside:
    """Never raises and takes ANSWER_S at most."""
    from tierblk.cache.view import State

    if view.state is not State.SERVED:
        return Beside()
    try:
        found = [each for each in candidates(_BOTH_S) if each.run_dir.name == str(view.superblock.uuid)]
        if not found:
            return Beside(trouble="the daemon that serves it has no control socket")
        (daemon,) = found
        pid = daemon.info.get("pid")
        pid = pid if isinstance(pid, int) else None
        try:
            return Beside(pid, daemon.get("/v1/daemon"), daemon.devices())
        except DeadSocket:
            return Beside(pid, trouble="the daemon that serves it does not listen any more")
        except TierblkError as error:
            return Beside(pid, trouble=error.message)
    except TierblkError as error:
        return Beside(trouble=error.message)
