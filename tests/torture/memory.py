"""Running out of memory on command: a memory control group (cgroup v2) into which a process is put."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

from tests.vm.guest.helpers import wait_until

MOUNT_POINT = Path("/sys/fs/cgroup")


class Squeeze:
    """A group without room: whoever is put into it is killed by the kernel at its next new page.

    What it has stays accounted where it was, so nobody else is hit. RuntimeError where the kernel has no
    cgroup v2 with memory accounting, with what is missing.
    """

    def __init__(self, name: str = "tierblk-torture") -> None:
        root = _hierarchy()
        if "memory" not in (root / "cgroup.controllers").read_text().split():
            raise RuntimeError(f"{root} has no memory controller")
        (root / "cgroup.subtree_control").write_text("+memory")
        self._group = root / name
        self._group.mkdir(exist_ok=True)
        (self._group / "memory.max").write_text("0")

    def put(self, pid: int) -> None:
        """The process has run out of memory from now on. ProcessLookupError when it is gone."""
        (self._group / "cgroup.procs").write_text(str(pid))

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed here."""
        events = dict(line.split() for line in (self._group / "memory.events").read_text().splitlines())
        return int(events["oom_kill"])

    def __str__(self) -> str:
        return " ".join((self._group / "memory.events").read_text().split())

    def close(self) -> None:
        """Removes the group; it must be empty."""

        def removed() -> bool:
            with suppress(OSError):
                self._group.rmdir()
            return not self._group.exists()

        wait_until(removed, 10, f"{self._group} stays")


def _hierarchy() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    # A small system may have left it to whoever wants it.
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(MOUNT_POINT)], check=True)
    return MOUNT_POINT
