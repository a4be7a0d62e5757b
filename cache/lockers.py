"""Who has taken the lock of a cache directory, out of /proc: for an error that can say whom to wait for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_COMMAND_MAX = 80


def shown(fd: int) -> str | None:
    """ "pid 4711, tierblk cache verify web" of each process that has locked this open file with flock; None
    when none can be found. Never raises."""
    found = [f"pid {pid}{_command(pid)}" for pid in pids(fd)]
    return "; ".join(found) or None


def pids(fd: int) -> list[int]:
    """As far as /proc/locks says and we may know. One that locked it and has left the open file to another
    process is named there, and left out here."""
    status = os.fstat(fd)
    found = set()
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            # one that waits has "->" in the second place; device numbers are not always those of stat
            if words[1] != "FLOCK" or int(words[5].rpartition(":")[2]) != status.st_ino:
                continue
            if _has_open(int(words[4]), status):
                found.add(int(words[4]))
    return sorted(found)


def _has_open(pid: int, status: os.stat_result) -> bool:
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for each in entries:
            with suppress(OSError):
                if os.path.samestat(each.stat(), status):
                    return True
    return False


def _command(pid: int) -> str:
    """What it was started as, short."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return f", {' '.join(words.split())[:_COMMAND_MAX]}" if words.strip() else ""
    return ""
