"""Processes as ps sees them: who serves, who is stuck in the kernel, who is left."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LOOK_EACH_S = 0.2
# Disk sleep for a moment is what waiting for a disk looks like; for longer than that it is being stuck.
STUCK_S = 5.0


@dataclass(frozen=True)
class Task:
    """A thread. words: the command line of its process, none for a kernel thread."""

    pid: int
    tid: int
    name: str
    state: str
    parent: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.tid} of {self.pid}: {' '.join(self.words)[:120]})"


def tasks() -> Iterator[Task]:
    """All threads of all processes but this one; what ends meanwhile is left out."""
    own = os.getpid()
    for process in PROC.glob("[0-9]*"):
        pid = int(process.name)
        if pid == own:
            continue
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            for thread in (process / "task").iterdir():
                name, _, rest = (thread / "stat").read_text().partition("(")[2].rpartition(")")
                state, parent, *_ = rest.split()
                yield Task(pid, int(thread.name), name, state, int(parent), tuple(filter(None, words)))
        except OSError:
            continue


class Victim:
    """A process that is about to be ended; nobody else is hit should its number be given away again."""

    def __init__(self, pid: int) -> None:
        """ProcessLookupError when there is none."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        """Sends it; to one that has ended already too."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    @property
    def lives(self) -> bool:
        """Whether it has not ended yet."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def ended(self, limit_s: float) -> None:
        """Returns when it has ended; AssertionError when that is not within the limit."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(limit_s * 1000), f"daemon {self.pid} still runs after {limit_s} s"
        os.close(self._fd)


def daemons() -> set[int]:
    """The pids of all processes that serve, or are about to; keepers are none."""
    return {
        task.pid
        for task in tasks()
        if "serve" in task.words
        and task.state != "Z"
        and not any(word.endswith("keeper.py") for word in task.words)
    }


class StuckWatch:
    """A thread that looks all the time whether any process stays in D state, or a dead one is not reaped.

    Kernel threads are left out, which wait for disks as their job, and so is this process: its readers wait
    in D state by right. `stuck`: a sentence for each that stayed so for longer than STUCK_S.
    """

    def __init__(self) -> None:
        self.stuck: dict[tuple[int, int, str], str] = {}
        self.looks = 0
        self.longest_s = 0.0
        self._over = threading.Event()
        self._since_s: dict[tuple[int, int, str], float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops looking."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_EACH_S):
            self._look(time.monotonic())

    def _look(self, now_s: float) -> None:
        before, self._since_s = self._since_s, {}
        self.looks += 1
        for task in tasks():
            if task.state not in "DZ" or (task.state == "D" and not task.words):
                continue
            key = task.pid, task.tid, task.state
            since_s = self._since_s[key] = before.get(key, now_s)
            self.longest_s = max(self.longest_s, now_s - since_s)
            if now_s - since_s > STUCK_S:
                self.stuck[key] = f"{task} is in {task.state} state for {now_s - since_s:.1f} s{_where(task)}"


def _where(task: Task) -> str:
    try:
        return f", in {(PROC / str(task.pid) / 'task' / str(task.tid) / 'wchan').read_text()}"
    except OSError:
        return ""
