"""What a person sees while something long runs: a line that moves every second, and the last words of what
failed.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

TAIL_LINES = 25
TERMINAL_PERIOD_S = 0.5
LOG_PERIOD_S = 2.0
ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\].*?(?:\x07|\x1b\\)|.)")


class Failed(Exception):
    """Something needed could not be made or run; the message is one sentence for a person, then what was
    printed.
    """


def end_in_order() -> None:
    """SIGTERM ends a command as Ctrl-C does: through every clean-up."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))


def say(text: str) -> None:
    """Prints one line at once (the ticker of a running step leaves whole lines alone)."""
    erase = "\r\033[K" if sys.stdout.isatty() else ""
    sys.stdout.write(f"{erase}{text}\n")
    sys.stdout.flush()


def plain(line: str) -> str:
    """A line of a console without its colours and cursor moves."""
    return "".join(letter for letter in ESCAPE.sub("", line) if letter.isprintable()).strip()


class Step:
    """A named stretch of work as a context manager: shows its elapsed seconds and a hint of what it is doing.

    On a terminal one line is rewritten; in a log a line comes every two seconds. `hint` may be set from any
    thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.hint = ""
        self.seconds = 0.0
        self._done = threading.Event()
        self._began_s = 0.0
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Step:
        self._began_s = time.monotonic()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._done.set()
        self._ticker.join()
        self.seconds = time.monotonic() - self._began_s
        say(f"  {self.name}: {'done' if kind is None else 'stopped'} after {self.seconds:.1f} s")

    def _tick(self) -> None:
        terminal = sys.stdout.isatty()
        while not self._done.wait(TERMINAL_PERIOD_S if terminal else LOG_PERIOD_S):
            elapsed_s = time.monotonic() - self._began_s
            hint = f" | {self.hint}" if self.hint else ""
            line = f"  {self.name}: {elapsed_s:.0f} s{hint}"[:118]
            sys.stdout.write(f"\r\033[K{line}" if terminal else f"{line}\n")
            sys.stdout.flush()

    def run(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        """Runs a command, its newest line as the hint. Raises Failed with its last lines when it does not
        exit with 0.
        """
        tail: deque[str] = deque(maxlen=TAIL_LINES)

        def hear(line: str) -> None:
            tail.append(line)
            self.hint = line.strip() or self.hint

        status = follow(command, hear, env=env, cwd=cwd)
        self.hint = ""
        if status != 0:
            words = "\n    ".join(tail)
            raise Failed(
                f"{Path(command[0]).name} failed with status {status} while: {self.name}.\n    {words}"
            )


def follow(
    command: Sequence[str | Path],
    hear: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> int:
    """Runs a command to its end; each printed line (both streams) goes to `hear`. Returns the exit status."""
    words = [str(word) for word in command]
    try:
        process = subprocess.Popen(
            words, env=env, cwd=cwd, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError:
        raise Failed(f"{words[0]} is not installed; `make vm-host` installs what is missing.") from None
    assert process.stdout is not None
    with process:
        try:
            for line in process.stdout:
                hear(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def output(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> str:
    """The standard output of a short command. Raises Failed with its words when it does not exit with 0."""
    lines: list[str] = []
    status = follow(command, lines.append, env=env)
    if status != 0:
        words = "\n    ".join(lines[-TAIL_LINES:])
        raise Failed(f"{' '.join(str(word) for word in command)} failed with status {status}.\n    {words}")
    return "\n".join(lines)
