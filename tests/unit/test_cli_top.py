"""`tierblk top` as a command: in a pipe, as JSON, and on a terminal, which it leaves as it was."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from bench.top import serve
from tests.unit.cli_harness import Cli, cli
from tests.unit.test_top_ask import Daemons
from tierblk.cli import entry, top
from tierblk.cli.top_ask import Rounds
from tierblk.cli.top_keys import keys_of
from tierblk.errors import DeviceError

__all__ = ["cli"]  # a fixture

LIMIT_S = 45.0
FAST = ("--interval", "100ms")


def arguments(*words: str) -> Namespace:
    return entry.make_parser().parse_args(["top", *words])


class TestText:
    def test_without_a_daemon(self, cli: Cli) -> None:
        done = cli("top")
        assert (done.code, done.out, done.err) == (0, "", "no daemon is running\n")
        assert cli("top", "--json").json["caches"] == []

    def test_once_in_a_pipe(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        for words in (("--once",), ()):
            done = cli("top", *words, *FAST, COLUMNS="80")
            assert (done.code, done.err) == (0, "")
            assert "\x1b" not in done.out
            assert all(len(line) <= 80 for line in done.out.splitlines())
            (row,) = [line for line in done.out.splitlines() if line.startswith(" a ")]
            # the fake daemon's second is 60 reads and 3 MiB
            assert row.split()[:6] == ["a", "ok", "60", "3.0M", "-", "100"]

    def test_so_many_documents_one_a_line(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        done = cli("top", "--json", "--count", "3", *FAST)
        documents = [json.loads(line) for line in done.out.splitlines()]
        assert len(documents) == 3
        for document in documents:
            (device,) = document["devices"]
            assert (device["iops"], device["read_bytes_per_s"], device["interval_s"]) == (60, 3 * 2**20, 1)
            assert device["latencies"]["hit"]["requests_per_s"] == 60
            assert document["caches"][0]["state"] == "ok"

    def test_names(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("b"))
        done = cli("top", "--json", "b*", *FAST)
        assert [device["name"] for device in done.json["devices"]] == ["b"]
        done = cli("top", "--once", "x", *FAST)
        assert (done.code, done.out) == (DeviceError.exit_code, "")
        assert 'there is no device called "x"' in done.err
        assert "attached are: a, b" in done.err

    @pytest.mark.parametrize(
        "words", [("--interval", "1"), ("--interval", "1ms"), ("--count", "-1"), ("--once", "--count", "2")]
    )
    def test_wrong_usage(self, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            arguments(*words)
        assert ended.value.code == 2
        assert capsys.readouterr().err

    def test_a_reader_that_goes_away(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        process = cli.popen("top", "--count", "0", *FAST)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.wait(LIMIT_S) == 1
        assert process.stderr.read() == ""
        process.stderr.close()

    def test_rounds_come_at_their_interval(self, capsys: pytest.CaptureFixture[str]) -> None:
        daemons = Daemons()
        daemons.may_answer.set()
        rounds, waits = (
            Rounds(find=daemons.find, ask=daemons.ask, find_orphans=daemons.orphans),
            list[float](),
        )
        args = arguments("--json", "--count", "2", "--interval", "5s")
        assert top.measure(rounds, args, wait=waits.append) == 0
        rounds.end()
        assert len(waits) == 2
        assert all(0 < wait_s <= 5 for wait_s in waits)
        assert len(capsys.readouterr().out.splitlines()) == 2

    def test_a_daemon_that_hangs_is_named_and_the_others_are_shown(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        daemons = Daemons()
        rounds = Rounds(find=daemons.find, ask=daemons.ask, find_orphans=daemons.orphans)
        args = arguments("--once")
        assert top.measure(rounds, args, wait=lambda _: None) == 8
        rounds.end()
        daemons.may_answer.set()
        out, err = capsys.readouterr()
        assert "tierblk: /cache/slow: its daemon (pid 5) does not answer" in err
        states = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith(" /cache")}
        assert states["/cache/quick"] == "ok"


def test_keys() -> None:
    raw = b"q\x1b[A\x1bOBj\x1b[1;5C\r\x1b?\xff\x01\x1b[5~"
    assert keys_of(raw) == ["q", "up", "down", "j", "enter", "esc", "?", "page up"]
    assert keys_of(b"\x1b") == ["esc"]
    assert keys_of(b"\x1b[") == []


LEADER = """
import os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-m", "tierblk", "top", "--interval", "1h"])
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpgrp())
    if not os.WIFSTOPPED(status):
        break
    print("STOPPED", bool(termios.tcgetattr(0)[3] & termios.ECHO), flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, pid)
    os.killpg(pid, signal.SIGCONT)
print("ENDED", os.waitstatus_to_exitcode(status), flush=True)
"""


class Terminal:
    """A terminal of 80 by 24 with a command on it."""

    def __init__(self, cli: Cli, *command: str, env: dict[str, str] | None = None) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.raw = self.output = ""  # as it came, and without colours
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "tierblk", "top", "--interval", "1h"],
            preexec_fn=lambda: os.login_tty(os.dup(self.slave)),
            env=cli.env | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | (env or {}),
            cwd=cli.folder,
        )

    def read_until(self, pattern: str) -> str:
        """All that came up to this, which is then forgotten."""
        end_s = time.monotonic() + LIMIT_S
        while not (found := re.search(pattern, self.output, re.DOTALL)):
            left_s = end_s - time.monotonic()
            assert left_s > 0, self.output[-3000:]
            self._read(left_s)
        text, self.output = self.output[: found.end()], self.output[found.end() :]
        return text

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        new = os.read(self.master, 65536).decode(errors="replace")
        self.raw += new
        self.output = re.sub(r"\x1b\[[0-9;]*m", "", self.output + new)
        return True

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def finish(self) -> int:
        """The exit code, with the terminal as it was: attributes, cursor, and the screen under ours."""
        self.read_until(re.escape("\x1b[?1049l"))
        code = self.process.wait(LIMIT_S)
        while self._read(0):
            pass
        assert "Traceback" not in self.output
        assert termios.tcgetattr(self.slave) == self.before
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def host(cli: Cli) -> Iterator[Cli]:
    """With daemons that have five devices."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    serving = loop.create_task(serve(cli.folder / "run", ready.set))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(LIMIT_S)
    yield cli
    loop.call_soon_threadsafe(serving.cancel)
    thread.join(LIMIT_S)
    loop.close()


@pytest.fixture
def terminal(host: Cli) -> Iterator[Terminal]:
    """One that shows the screen."""
    made = Terminal(host)
    made.read_until("db-primary.*quit")
    yield made
    made.close()


class TestTerminal:
    def test_q_quits(self, terminal: Terminal) -> None:
        assert termios.tcgetattr(terminal.slave) != terminal.before
        terminal.press("q")
        assert terminal.finish() == 0

    def test_ctrl_c(self, terminal: Terminal) -> None:
        terminal.press("\x03")
        assert terminal.finish() == 130

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)]
    )
    def test_signals(self, terminal: Terminal, number: signal.Signals, code: int) -> None:
        terminal.process.send_signal(number)
        assert terminal.finish() == code

    def test_pages(self, terminal: Terminal) -> None:
        terminal.press("j")
        terminal.read_until(">ci-runner-07")
        terminal.press("\x1b[B")
        terminal.read_until(">ci-runner-08")
        terminal.press("\r")
        terminal.read_until("every 1h, ci-runner-08.*99.9 %.*esc back")
        terminal.press("k")
        terminal.read_until("every 1h, ci-runner-07")
        terminal.press("\x1b")
        terminal.read_until("sorted by iops.*select")
        terminal.press("s")
        terminal.read_until("sorted by bytes")
        terminal.press("?")
        terminal.read_until("binary units.*any other key")
        terminal.press("q")
        assert terminal.finish() == 0

    def test_another_size(self, terminal: Terminal) -> None:
        fcntl.ioctl(terminal.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.read_until("IMAGE.*ci.example.net/runner.img.*quit")
        terminal.press("q")
        assert terminal.finish() == 0

    def test_ctrl_z_and_fg(self, host: Cli) -> None:
        terminal = Terminal(host, sys.executable, "-c", LEADER)
        try:
            terminal.read_until("db-primary.*quit")
            terminal.press("\x1a")
            stopped = terminal.read_until("STOPPED (True|False)")
            assert "\x1b[?1049l" in stopped
            assert "STOPPED True" in stopped
            terminal.press("\n")
            assert "\x1b[?1049h" in terminal.read_until("db-primary.*quit")
            terminal.press("q")
            assert "\x1b[?1049l" in terminal.read_until("ENDED 0")
            assert terminal.process.wait(LIMIT_S) == 0
            assert termios.tcgetattr(terminal.slave) == terminal.before
        finally:
            terminal.close()

    def test_an_error_leaves_the_terminal_as_it_was(self, host: Cli) -> None:
        program = (
            "import sys\n"
            "from tierblk.cli import entry, top_screen\n"
            "def broken(*_):\n    raise RuntimeError('a bug')\n"
            "top_screen.overview = broken\n"
            "sys.exit(entry.main(['top', '--interval', '1h']))\n"
        )
        terminal = Terminal(host, sys.executable, "-c", program)
        try:
            assert terminal.finish() == 1
            assert "unexpected: RuntimeError: a bug" in terminal.output
        finally:
            terminal.close()

    @pytest.mark.parametrize(
        ("words", "env", "colours"),
        [((), {}, True), ((), {"NO_COLOR": "1"}, False), (("--no-color",), {}, False)],
    )
    def test_colours(self, host: Cli, words: tuple[str, ...], env: dict[str, str], colours: bool) -> None:
        command = (sys.executable, "-m", "tierblk", "top", "--interval", "1h", *words)
        terminal = Terminal(host, *command, env=env)
        try:
            terminal.read_until("degraded.*quit")
            assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.raw)) == colours
            terminal.press("q")
            assert terminal.finish() == 0
        finally:
            terminal.close()

    def test_a_terminal_without_a_cursor_gets_text(self, host: Cli) -> None:
        command = (sys.executable, "-m", "tierblk", "top", *FAST)
        terminal = Terminal(host, *command, env={"TERM": "dumb"})
        try:
            text = terminal.read_until("db-primary.*\n")
            assert "\x1b" not in text
            assert terminal.process.wait(LIMIT_S) == 0
        finally:
            terminal.close()


def test_the_screen_is_not_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Out:
        def __init__(self, *, is_terminal: bool) -> None:
            self.is_terminal = is_terminal

        def isatty(self) -> bool:
            return self.is_terminal

    cases: list[tuple[bool, Any, bool]] = [
        (True, "xterm", True),
        (True, "dumb", False),
        (True, None, False),
        (False, "xterm", False),
    ]
    for is_terminal, term, expected in cases:
        monkeypatch.setattr(sys, "stdout", Out(is_terminal=is_terminal))
        monkeypatch.delenv("TERM", raising=False)
        if term is not None:
            monkeypatch.setenv("TERM", term)
        assert top._has_screen() is expected
