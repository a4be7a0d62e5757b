"""The keeper, run as `attach` runs it, with small programs in the daemon's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tierblk.cli import keeper, kept
from tierblk.cli.keeper import fate, next_delay

KEEPER = str(Path(keeper.__file__))

# As when it is run by its path, but for how often it looks at the log.
IMPATIENT_KEEPER = """
import runpy, sys
keeper = runpy.run_path(sys.argv[1])
keeper["Keeper"].run.__globals__["LOG_CHECK_S"] = 0.1
sys.exit(keeper["Keeper"](sys.argv[3:], int(sys.argv[2])).run())
"""

# A daemon that says it is ready, tells its number of life, and does what its turn in `fates` says.
DAEMON = """
import json, os, select, signal, sys
folder, ready_fd = sys.argv[1], int(sys.argv[-1])
life = sum(name.isdecimal() for name in os.listdir(folder))
open(os.path.join(folder, str(life)), "w").write(str(os.getpid()))
fate = json.load(open(os.path.join(folder, "fates")))[life]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3 if fate == "waits, and hands over badly" else 0))
if fate != "fails":
    os.write(ready_fd, json.dumps({"ok": True, "socket": folder + "/control.sock"}).encode() + b"\\n")
os.close(ready_fd)
print("lives", life, flush=True)
if fate == "talks":
    os.write(2, b"x" * 2_000_000)
    for _ in range(2000):  # until somebody cuts it
        if os.fstat(2).st_size < 2_000_000:
            os.write(2, b"goes on")
            sys.exit(0)
        select.select([], [], [], 0.01)
    sys.exit(4)
if fate == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if fate.startswith("waits"):
    signal.pause()
sys.exit({"fails": 6, "errs": 1, "stops": 0}[fate])
"""


class Run:
    """A keeper whose daemons meet the given fates one after the other."""

    def __init__(self, folder: Path, fates: list[str], log: int = subprocess.PIPE) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "fates").write_text(json.dumps(fates))
        self.folder = folder
        self.ready_fd, write_fd = os.pipe()
        impatient = ["-c", IMPATIENT_KEEPER] if "talks" in fates else []
        command = [sys.executable, "-I", "-S", *impatient, KEEPER, str(write_fd)]
        command += [sys.executable, "-c", DAEMON, str(folder)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=(write_fd,)
        )
        os.close(write_fd)

    def lives(self, number: int) -> None:
        """The next line of a daemon says that it is that one."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"lives {number}\n"

    def pid_of(self, number: int) -> int:
        return int((self.folder / str(number)).read_text())

    def children(self) -> list[int]:
        """The daemons that run; asked before the keeper is reaped."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(word) for word in path.read_text().split()]
        except FileNotFoundError:
            return []

    def ready(self) -> str:
        with open(self.ready_fd, closefd=False) as pipe:
            return pipe.read()

    def end(self) -> tuple[int, str]:
        """Exit code and log."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Run]]:
    """Keepers that are killed at the end."""
    made: list[Run] = []
    yield made
    for run in made:
        children = run.children()
        run.process.kill()
        for pid in children:  # they have its stdout
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()
        with suppress(OSError):
            os.close(run.ready_fd)


def start(runs: list[Run], tmp_path: Path, *fates: str, log: int = subprocess.PIPE) -> Run:
    runs.append(Run(tmp_path / "run", list(fates), log))
    return runs[-1]


def test_a_daemon_that_dies_is_started_again_and_one_that_stops_is_not(
    runs: list[Run], tmp_path: Path
) -> None:
    run = start(runs, tmp_path, "killed", "errs", "stops")
    for life in range(3):
        run.lives(life)
    code, said = run.end()
    assert code == 0
    assert "was ended by SIGKILL (9)" in said
    assert "starting it again in 0.2 s" in said
    assert "ended with status 1" in said
    assert "starting it again in 0.4 s" in said
    assert json.loads(run.ready())["ok"], "one line, of the first start"


def test_a_log_that_takes_no_line_is_no_reason_to_keep_no_daemon(runs: list[Run], tmp_path: Path) -> None:
    """RUN is full, say."""
    with open("/dev/full", "w") as full:
        run = start(runs, tmp_path, "killed", "killed", "stops", log=full.fileno())
    for life in range(3):
        run.lives(life)
    assert run.end()[0] == 0


def test_the_log_is_cut_while_the_daemon_lives(runs: list[Run], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "a") as file:
        run = start(runs, tmp_path, "talks", log=file.fileno())
    assert run.end()[0] == 0
    assert log.read_text() == "goes on"


def test_a_first_start_that_fails_is_the_keepers_end(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, "fails")
    assert run.end() == (6, "")
    assert run.ready() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_to_the_keeper_ends_both(runs: list[Run], tmp_path: Path, number: int) -> None:
    run = start(runs, tmp_path, "waits")
    run.lives(0)
    run.process.send_signal(number)
    assert run.end() == (0, "")


def test_a_signal_while_no_daemon_runs_ends_the_keeper(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, *["killed"] * 20)
    for life in range(4):
        run.lives(life)  # the next pause is long
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] in (0, 128 + signal.SIGKILL)


def test_sighup_replaces_the_daemon_without_a_pause(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, "waits", "waits", "stops")
    run.lives(0)
    run.process.send_signal(signal.SIGHUP)
    run.lives(1)
    run.process.send_signal(signal.SIGHUP)
    run.lives(2)
    assert run.end() == (0, "")


def test_sighup_while_no_daemon_runs_leaves_a_later_stop_a_stop(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, *["killed"] * 4, "stops")
    assert run.process.stderr is not None
    for life in range(4):
        run.lives(life)
        assert "starting it again" in run.process.stderr.readline()
    run.process.send_signal(signal.SIGHUP)  # the last pause is long
    run.lives(4)
    assert run.end() == (0, "")


def test_a_hand_over_that_ends_badly_leaves_a_later_stop_a_stop(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, "waits, and hands over badly", "stops")
    run.lives(0)
    run.process.send_signal(signal.SIGHUP)
    run.lives(1)
    code, said = run.end()
    assert code == 0
    assert said.count("starting it again") == 1


def test_another_daemon_that_serves_the_cache_is_left_alone(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, "waits", "stops")
    run.lives(0)
    (run.folder / "daemon.json").write_text(json.dumps({"pid": os.getpid()}))
    os.kill(run.pid_of(0), signal.SIGKILL)
    code, said = run.end()
    assert code == 0
    assert f"another daemon (process {os.getpid()}) serves the cache now" in said


def test_a_keeper_in_its_pause_heeds_that_somebody_wants_no_daemon(runs: list[Run], tmp_path: Path) -> None:
    """Another daemon of the cache was stopped meanwhile, say."""
    run = start(runs, tmp_path, *["killed"] * 20)
    for life in range(5):
        run.lives(life)  # the next pause is 3.2 s long
    kept.dismiss(run.folder)
    code, said = run.end()
    assert code == 0
    assert said.endswith("somebody asked for no daemon; not starting one again\n")
    assert not (run.folder / "5").exists()


def test_that_nobody_wants_a_daemon_is_heeded_when_it_dies_and_by_no_later_keeper(
    runs: list[Run], tmp_path: Path
) -> None:
    early = start(runs, tmp_path, "waits", "killed", "stops")
    early.lives(0)
    early.ready()
    kept.dismiss(early.folder)
    os.kill(early.pid_of(0), signal.SIGKILL)
    assert "somebody asked for no daemon" in early.end()[1]
    late = start(runs, tmp_path, "waits", "killed", "stops")
    for life in (1, 2):
        late.lives(life)
    assert late.end()[0] == 0


def test_the_number_of_its_dead_daemon_may_be_anybodys(runs: list[Run], tmp_path: Path) -> None:
    run = start(runs, tmp_path, "waits", "waits", "stops")
    run.lives(0)
    (run.folder / "daemon.json").write_text(json.dumps({"pid": run.pid_of(0)}))
    os.kill(run.pid_of(0), signal.SIGKILL)
    run.lives(1)
    os.kill(run.pid_of(1), signal.SIGKILL)
    run.lives(2)
    assert run.end()[0] == 0


def test_it_is_small(runs: list[Run], tmp_path: Path) -> None:
    """Its own memory, not what it shares with every other interpreter."""
    run = start(runs, tmp_path, "waits")
    run.lives(0)
    status = Path(f"/proc/{run.process.pid}/status").read_text()
    (anonymous_kib,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
    assert anonymous_kib < 8192


def test_pauses_grow_and_begin_anew_after_a_long_life() -> None:
    delays = [0.1]
    for _ in range(7):
        delays.append(next_delay(delays[-1], 1.0))
    assert delays[1:] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert next_delay(5.0, 61.0) == 0.2


def test_fates_in_words() -> None:
    assert fate(6 << 8) == "ended with status 6"
    assert fate(signal.SIGABRT) == "was ended by SIGABRT (6)"
    assert fate(40) == "was ended by a signal (40)"
