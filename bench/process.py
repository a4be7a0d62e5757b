"""Processes that a measurement needs: run one, keep one running, ask what CPU one used. And progress."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.fio import BenchError

POLL_S = 0.01
TICK_S = 2.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Progress:
    """Says a line per step, and one every two seconds of a step that takes longer: on stderr, or in a file
    for somebody who watches from outside this kernel."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._began_s = self._said_s = time.monotonic()
        self._last = ""
        threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def __call__(self, text: str) -> None:
        self._last = text
        self._write(text)

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            if self._last and time.monotonic() - self._said_s >= TICK_S:
                self._write(f"(after: {self._last})")

    def _write(self, text: str) -> None:
        self._said_s = time.monotonic()
        line = f"  {self._said_s - self._began_s:5.0f} s  {text}\n"
        if self._path is None:
            sys.stderr.write(line)
            sys.stderr.flush()
            return
        with open(self._path, "a") as file:
            file.write(line)


def output(command: Sequence[str | Path], *, limit_s: float = 120.0) -> str:
    """The standard output of a command. Raises BenchError with its words when it fails or takes too long."""
    words = [str(word) for word in command]
    name = Path(words[0]).name
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except FileNotFoundError:
        raise BenchError(f"{name} is not installed") from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(words)} did not end within {limit_s:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise BenchError(f"{' '.join(words)} ended with status {done.returncode}: {said}")
    return done.stdout


@contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the length of the block; its words go to `log`."""
    with open(log, "ab") as words:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=words, stderr=words
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(there: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Until `there` says so. Raises BenchError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not there():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(POLL_S)


def cpu_s(pid: int) -> float:
    """CPU that a process has used so far, its kernel threads of io_uring included, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def io_workers(pid: int) -> int:
    """Threads that io_uring works in for the queues of a daemon: a hit path that is right has none. (The
    filler's are not counted; the kernel names a worker after the thread that it works for.)"""
    names: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            names[int(task.name)] = (task / "comm").read_text().strip()
    queues = {f"iou-wrk-{tid}" for tid, name in names.items() if name.startswith("tb-queue")}
    return sum(name in queues for name in names.values())
