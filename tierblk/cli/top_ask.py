"""Asks all daemons at once for `tierblk top`, each in a thread of its own: one that hangs holds nobody up.

A round begins, and is closed when all have answered that are expected to, or when it is time. Who has not
answered by then may still do so: that answer counts in a later round, and until then it is not asked again.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

from tierblk.cli import orphans
from tierblk.cli.client import Daemon, DeadSocket, candidates, same_directory
from tierblk.cli.top_counters import Document, dicts
from tierblk.cli.top_model import Answer
from tierblk.errors import TierblkError

ASK_TIMEOUT_S = 10.0
_ORPHANS = "orphans"


def ask(daemon: Daemon) -> Document:
    """A sample. TierblkError, DeadSocket."""
    return daemon.get("/v1/top")


def waiting_devices(cache_dir: str | None) -> list[Document]:
    """Devices that no daemon serves."""
    return [orphans.shown(record) for _, record in orphans.waiting(ASK_TIMEOUT_S, cache_dir)]


class Rounds:
    """Rounds of questions, from `begin` to `close`. `fd` can be read when there may be an answer."""

    def __init__(
        self,
        cache_dir: str | None = None,
        *,
        find: Callable[[float], list[Daemon]] = candidates,
        ask: Callable[[Daemon], Document] = ask,
        find_orphans: Callable[[str | None], list[Document]] = waiting_devices,
    ) -> None:
        """cache_dir: only its daemon and devices."""
        self._cache_dir = cache_dir
        self._find, self._ask, self._find_orphans = find, ask, find_orphans
        self._lock = threading.Lock()
        self._results: dict[str, Any] = {}  # by run directory: a sample, or what was raised
        self._asked: set[str] = set()  # whose thread runs
        self._late: set[str] = set()  # of those, who missed the end of a round
        self._known: dict[str, tuple[str, int]] = {}  # cache directory and pid, as the daemon said them
        self._daemons: dict[str, Daemon] = {}
        self._orphans: list[Document] = []
        self.fd, self._wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def begin(self) -> None:
        """Ask everybody who is not being asked. TierblkError: one may not look for daemons."""
        self._daemons = {str(daemon.run_dir): daemon for daemon in self._find(ASK_TIMEOUT_S)}
        if self._cache_dir is not None:
            self._daemons = {key: daemon for key, daemon in self._daemons.items() if self._is_wanted(daemon)}
        for key, daemon in self._daemons.items():
            self._start(key, lambda daemon=daemon: self._ask(daemon))  # type: ignore[misc]
        self._start(_ORPHANS, lambda: self._find_orphans(self._cache_dir))

    def _is_wanted(self, daemon: Daemon) -> bool:
        """One that has not said yet whose it is may be the one."""
        known = self._known.get(str(daemon.run_dir), (daemon.info.get("cache_dir"), 0))[0]
        return known is None or same_directory(str(known), str(self._cache_dir))

    def _start(self, key: str, question: Callable[[], Any]) -> None:
        with self._lock:
            if key in self._asked:
                return
            self._asked.add(key)
        threading.Thread(target=self._run, args=(key, question), name=f"ask {key}", daemon=True).start()

    def _run(self, key: str, question: Callable[[], Any]) -> None:
        result: Any
        try:
            result = question()
        except (TierblkError, DeadSocket, OSError, ValueError) as error:
            result = error
        with self._lock:
            self._results[key] = result
            self._asked.discard(key)
            self._late.discard(key)
            if self._wake_fd >= 0:
                try:
                    os.write(self._wake_fd, b"\0")
                except BlockingIOError:  # it is awake
                    pass

    @property
    def is_complete(self) -> bool:
        """Whether waiting any longer is of no use: who missed the last round is not waited for."""
        self._drain()
        with self._lock:
            return not self._asked - self._late

    def wait(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Until the round is complete, or so long."""
        end_s = clock() + timeout_s
        while not self.is_complete and (left_s := end_s - clock()) > 0:
            select.select([self.fd], [], [], left_s)

    def _drain(self) -> None:
        try:
            while os.read(self.fd, 4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> tuple[list[Answer], list[Document]]:
        """End the round: what every daemon said, and the devices that have none."""
        with self._lock:
            results, self._results = self._results, {}
            self._late = set(self._asked)
        found = results.pop(_ORPHANS, None)
        if isinstance(found, list):
            self._orphans = found
        answers = [self._answer(key, daemon, results.get(key)) for key, daemon in self._daemons.items()]
        return [answer for answer in answers if answer is not None], self._orphans

    def _answer(self, key: str, daemon: Daemon, result: Any) -> Answer | None:
        """None: it has ended, or is not asked for."""
        if isinstance(result, DeadSocket):
            return None
        if isinstance(result, dict):
            said = result.get("daemon")
            info = said if isinstance(said, dict) else {}
            pid = info.get("pid")
            self._known[key] = (str(info.get("cache_dir", "?")), pid if isinstance(pid, int) else 0)
            result = result if dicts(result, "devices") or "devices" in result else ValueError("no devices")
        known_pid = daemon.info.get("pid")
        default = (daemon.cache_dir, known_pid if isinstance(known_pid, int) else 0)
        cache_dir, pid = self._known.get(key, default)
        if self._cache_dir is not None and not self._is_wanted(daemon):
            return None
        if isinstance(result, dict):
            return Answer(key, cache_dir, pid, result)
        return Answer(key, cache_dir, pid, error=_why(result, pid))

    def end(self) -> None:
        """No more rounds. Threads that still ask end with the process."""
        with self._lock:
            os.close(self.fd)
            os.close(self._wake_fd)
            self._wake_fd = -1


def _why(result: Any, pid: int) -> str:
    """A sentence for a person: what kept a sample from coming."""
    daemon = f"its daemon (pid {pid})" if pid else "its daemon"
    if result is None or (isinstance(result, TierblkError) and "has not answered" in result.message):
        return f"{daemon} does not answer"
    if not isinstance(result, TierblkError):
        return f"{daemon} gave an answer that is not understood"
    if "/v1/top" in result.message:  # it does not know what was asked
        return f"{daemon} is of an older version, which tells nothing to `tierblk top`"
    return result.message
