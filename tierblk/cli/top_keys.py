"""The terminal under `tierblk top`: keys as they are pressed, signals as events, and everything as it was
before on every way out."""

from __future__ import annotations

import os
import select
import signal
import termios
import tty
from types import FrameType

WAKE, RESIZE, SUSPEND, CONTINUE, END = "wake", "resize", "suspend", "continue", "end"
"""Events that are no keys."""

_SIGNALS = {
    signal.SIGWINCH: RESIZE,
    signal.SIGTSTP: SUSPEND,
    signal.SIGCONT: CONTINUE,
    signal.SIGINT: END,
    signal.SIGTERM: END,
    signal.SIGQUIT: END,
    signal.SIGHUP: END,
}
_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\r": "enter",
    b"\n": "enter",
    b"\x1b": "esc",
}


class Terminal:
    """A terminal from `__enter__` to `__exit__`: no echo, keys without enter. Ctrl-C and Ctrl-Z stay signals,
    which come as events. Belongs to the main thread."""

    def __init__(self, key_fd: int | None) -> None:
        """key_fd: where keys come from; None: there are none."""
        self._key_fd = key_fd if key_fd is not None and os.isatty(key_fd) else None
        self._attributes: list[object] | None = None
        self._handlers: dict[int, object] = {}
        self._signals: list[int] = []
        self.ended_by: int | None = None
        """The signal that asked for the end."""

    def __enter__(self) -> Terminal:
        self._wake_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._write_fd = write_fd
        self._old_wakeup = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)
        self.grab()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._wake_fd)
        os.close(self._write_fd)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def grab(self) -> None:
        """Keys come one by one from here on."""
        if self._key_fd is None:
            return
        try:
            if self._attributes is None:
                self._attributes = termios.tcgetattr(self._key_fd)
            tty.setcbreak(self._key_fd, termios.TCSADRAIN)
        except termios.error:  # it has hung up
            self._key_fd = None

    def release(self) -> None:
        """As it was before; keys that nobody has read are dropped, lest the shell takes them for commands."""
        if self._key_fd is None or self._attributes is None:
            return
        try:
            termios.tcsetattr(self._key_fd, termios.TCSAFLUSH, self._attributes)  # type: ignore[arg-type]
        except termios.error:
            pass

    def suspend(self) -> None:
        """Stop as Ctrl-Z stops any program; returns when somebody continues it. The screen is let go before,
        and taken again after, by the caller."""
        self.release()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            os.kill(os.getpid(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, ours)
        self.grab()

    def events(self, timeout_s: float, wake_fd: int) -> list[str]:
        """What came: names of events and keys; [] when the time is over. wake_fd: WAKE when it can be
        read."""
        fds = [self._wake_fd, wake_fd, *([self._key_fd] if self._key_fd is not None else [])]
        ready = select.select(fds, [], [], max(0.0, timeout_s))[0] if not self._signals else []
        found = []
        if self._wake_fd in ready:
            self._drain()
        if wake_fd in ready:
            found.append(WAKE)
        if self._key_fd is not None and self._key_fd in ready:
            found += self._keys()
        while self._signals:
            number = self._signals.pop(0)
            if _SIGNALS[signal.Signals(number)] == END:
                self.ended_by = self.ended_by or number
            found.append(_SIGNALS[signal.Signals(number)])
        return found

    def _drain(self) -> None:
        try:
            while os.read(self._wake_fd, 64):
                pass
        except BlockingIOError:
            pass

    def _keys(self) -> list[str]:
        assert self._key_fd is not None
        try:
            raw = os.read(self._key_fd, 64)
        except OSError:
            raw = b""
        if not raw:  # it has hung up
            self._key_fd = None
        return keys_of(raw)


def keys_of(raw: bytes) -> list[str]:
    """The keys of what a terminal sent: "up", "enter", "q" and so on. Sequences that are not known are
    nothing."""
    found = []
    while raw:
        known = next((s for s in sorted(_SEQUENCES, key=len, reverse=True) if raw.startswith(s)), None)
        if known == b"\x1b" and len(raw) > 1 and raw[1:2] in (b"[", b"O"):
            end = next((at for at in range(2, len(raw)) if 0x40 <= raw[at] <= 0x7E), len(raw) - 1)
            raw = raw[end + 1 :]
            continue
        if known is not None:
            found.append(_SEQUENCES[known])
            raw = raw[len(known) :]
            continue
        letter = raw[:1].decode("ascii", "ignore")
        if letter.isprintable() and letter:
            found.append(letter)
        raw = raw[1:]
    return found
