"""The keeper: starts a daemon and starts it again when it dies. Run by path; standard library only, since it
has to be small and to survive what kills the daemon.

    python -I -S keeper.py READY_FD COMMAND...

READY_FD (-1: none) gets the first daemon's line about its start, and is closed. A daemon that never got ready
is not tried again, one that ends with 0 was stopped; both end the keeper with its exit code. Between two
daemons RUN/<uuid>/stopped ends it when its time is newer than the last start (`tierblk stop`). SIGTERM and
SIGINT are passed on and end both; SIGHUP replaces the daemon by a new one (after an upgrade), for which its
devices wait.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import stat
import sys
import time

DELAY_FIRST_S = 0.2
DELAY_MAX_S = 5.0
LONG_LIFE_S = 60.0
LOG_BYTES_MAX = 1 << 20
LOG_CHECK_S = 10.0
STOPPED_CHECK_S = 0.1
OOM_SCORE_ADJ = "/proc/self/oom_score_adj"
OOM_SCORE_KEEPER = "-900"


def say(text: str) -> None:
    """A line of the log, in the shape of the daemon's. Lost when the log takes none: its disk may be full,
    which is no reason to keep no daemon."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    line = f"{stamp},{int(now % 1 * 1000):03d} WARNING tierblk.keeper: {text}\n"
    try:
        os.write(2, line.encode())  # sys.stderr would keep it, and fail again at the end
    except OSError:
        pass


def next_delay(delay_s: float, lived_s: float) -> float:
    """The pause before the next start: doubling, and from the beginning after a long life."""
    return DELAY_FIRST_S if lived_s >= LONG_LIFE_S else min(delay_s * 2, DELAY_MAX_S)


def fate(status: int) -> str:
    """What a wait status means, for people."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal"
    return f"was ended by {name} ({-code})"


class Keeper:
    """One daemon after the other. `run` returns the exit code."""

    def __init__(self, command: list[str], ready_fd: int) -> None:
        self.command = command
        self.ready_fd = ready_fd
        self.pid = 0
        self.dead_pid = 0
        self.run_dir = ""
        self.ending = False
        self.replacing = False
        self.was_ready = False
        self._stopped_ns = 0
        self._line = b""
        self._report_fd = -1
        self._oom_score = ""
        self._signals: list[int] = []
        self._wake_fd, wake_write = os.pipe()
        for fd in (self._wake_fd, wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: self._signals.append(number))

    def run(self) -> int:
        """Until the daemon is stopped, or its first start fails."""
        self._protect()
        delay_s = DELAY_FIRST_S / 2
        while True:
            began_s = time.monotonic()
            self._start()
            status = self._wait()
            lived_s = time.monotonic() - began_s
            code = os.waitstatus_to_exitcode(status)
            if self.ending or (code == 0 and not self.replacing) or not self.was_ready:
                return code if code >= 0 else 128 - code
            if self.replacing and code == 0:
                continue
            delay_s = next_delay(delay_s, lived_s)
            say(f"the daemon {fate(status)} after {lived_s:.1f} s; starting it again in {delay_s:g} s")
            if self._pause(delay_s):
                return 0  # told to end while there was nothing to end
            if self._stopped_at() != self._stopped_ns:
                say("somebody asked for no daemon; not starting one again")
                return 0
            if other := self._other_daemon():
                say(f"another daemon (process {other}) serves the cache now; not starting one again")
                return 0

    def _protect(self) -> None:
        """The kernel that looks for memory is to find somebody else; the daemon gets what we had."""
        try:
            with open(OOM_SCORE_ADJ) as file:
                self._oom_score = file.read().strip()
            if int(self._oom_score) > int(OOM_SCORE_KEEPER):
                with open(OOM_SCORE_ADJ, "w") as file:
                    file.write(OOM_SCORE_KEEPER)
        except (OSError, ValueError):
            pass  # not allowed: it is small anyway

    def _start(self) -> None:
        self.replacing = False  # what was to be replaced is gone, however it ended
        self._stopped_ns = self._stopped_at()
        self._line = b""
        self._report_fd, write_fd = os.pipe()
        os.set_inheritable(write_fd, True)
        self.pid = os.fork()
        if self.pid == 0:
            self._become([*self.command, "--ready-fd", str(write_fd)])
        os.close(write_fd)

    def _become(self, command: list[str]) -> None:
        """The child: nothing of the keeper's is left but its log."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            if self._oom_score:
                try:
                    with open(OOM_SCORE_ADJ, "w") as file:
                        file.write(self._oom_score)
                except OSError:
                    pass
            if self.ready_fd >= 0:
                os.close(self.ready_fd)
            os.execv(command[0], command)
        finally:
            os._exit(127)

    def _wait(self) -> int:
        """The daemon's wait status. Meanwhile signals are passed on, its report is read and its log kept
        short: it is on tmpfs, and a daemon may live for years."""
        while True:
            self._poll(LOG_CHECK_S)
            self._shorten_log()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid, self.dead_pid = 0, pid
                while self._report_fd >= 0 and self._read_report():  # what it wrote before it ended
                    pass
                self._close_report()
                return status

    def _poll(self, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if self._report_fd >= 0:
            poll.register(self._report_fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(timeout_s * 1000)]
        if self._wake_fd in ready:
            try:
                os.read(self._wake_fd, 4096)
            except BlockingIOError:
                pass
        if self._report_fd in ready:
            self._read_report()
        signals, self._signals = self._signals, []
        for number in signals:
            self._heed(number)

    def _heed(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if number == signal.SIGHUP:
            self.replacing = True
        else:
            self.ending = True
        if self.pid:
            os.kill(self.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def _read_report(self) -> bool:
        """A piece of the daemon's line; False when it is complete or will not come."""
        piece = os.read(self._report_fd, 4096)
        self._line += piece
        if piece and not self._line.endswith(b"\n"):
            return True
        try:
            report = json.loads(self._line)
        except ValueError:
            report = None
        if isinstance(report, dict) and report.get("ok"):
            self.was_ready = True
            if not self.run_dir:
                self.run_dir = os.path.dirname(str(report.get("socket") or ""))
                self._stopped_ns = self._stopped_at()  # where it is was not known at the start
                self._claim()
        self._pass_on()
        os.close(self._report_fd)
        self._report_fd = -1
        return False

    def _close_report(self) -> None:
        if self._report_fd >= 0:
            os.close(self._report_fd)
            self._report_fd = -1
        self._pass_on()

    def _pass_on(self) -> None:
        if self.ready_fd >= 0:
            try:
                os.write(self.ready_fd, self._line)
            except OSError:
                pass  # nobody waits any more
            os.close(self.ready_fd)
            self.ready_fd = -1

    def _claim(self) -> None:
        """Commands that look for what is left over see by this lock that the next daemon is about to come."""
        try:
            lock_fd = os.open(
                os.path.join(self.run_dir, "keeper"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            fcntl.flock(lock_fd, fcntl.LOCK_SH)  # who looks whether a keeper is there has it for an instant
        except OSError:
            pass

    def _other_daemon(self) -> int:
        """The process of somebody else's daemon of the same cache; 0: there is none."""
        try:
            with open(os.path.join(self.run_dir, "daemon.json")) as file:
                pid = int(json.load(file)["pid"])
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return 0
        # The number of one's own dead daemon may be any process's by now.
        return 0 if state in "ZX" or pid == self.dead_pid else pid

    def _stopped_at(self) -> int:
        """When somebody last asked for no daemon; 0: never, or not known."""
        try:
            return os.stat(os.path.join(self.run_dir, "stopped")).st_mtime_ns if self.run_dir else 0
        except OSError:
            return 0

    def _pause(self, seconds: float) -> bool:
        """Whether a signal ends the keeper. Shorter then, and when there is a reason to start no daemon: a
        `stop` waits for the keeper's end."""
        deadline = time.monotonic() + seconds
        while not self.ending and (left := deadline - time.monotonic()) > 0:
            self._poll(min(left, STOPPED_CHECK_S))
            if self._stopped_at() != self._stopped_ns or self._other_daemon():
                break
        return self.ending

    def _shorten_log(self) -> None:
        try:
            status = os.fstat(2)
            if stat.S_ISREG(status.st_mode) and status.st_size > LOG_BYTES_MAX:
                os.ftruncate(2, 0)
        except OSError:
            pass


if __name__ == "__main__":
    sys.exit(Keeper(sys.argv[2:], int(sys.argv[1])).run())
