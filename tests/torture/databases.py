"""Databases on ext4 on a volume, killed while they commit: alone, with the daemon under them, or as by a
power cut. What they said was committed is there, and they find nothing wrong with themselves."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.torture.rig import say
from tests.vm.guest.helpers import Tierblk, mounted, run, tierblk_processes, wait_until
from tierblk.rundir import RUN_DIR_VARIABLE

NAMES = ("sqlite", "postgresql")
KINDS = ("process", "daemon", "power")
KEYS = 400
VOLUME, CACHE = "640MiB", "768MiB"
LIMIT_S = 120.0
WORK_S = (0.0, 1.0)


@dataclass(frozen=True)
class Databases:
    """count: rounds of each database; kinds: of death, in turn."""

    seed: int
    count: int
    folder: Path
    plane: str = "auto"
    names: tuple[str, ...] = NAMES
    kinds: tuple[str, ...] = KINDS


class Database(Protocol):
    """Of a folder that is on the device. Transaction n sets key n modulo KEYS to n."""

    acknowledged: int

    def start(self, first: int) -> None:
        """Commits transactions from `first` on without pause; the first one is when this returns."""

    def kill(self) -> None:
        """Nothing of it runs any more when this returns."""

    def found(self) -> dict[int, int]:
        """Key -> n, of a database that is brought up, checks itself and is shut down. AssertionError."""


class Lines:
    """Follows a writer's lines, each the number of a transaction that was committed."""

    def __init__(self, stream: Any) -> None:
        self.last = -1
        self._stream = stream
        self._thread = threading.Thread(target=self._run, args=(stream,), daemon=True)
        self._thread.start()

    def _run(self, stream: Any) -> None:
        for line in stream:
            if line.strip().isdigit():
                self.last = int(line)

    def end(self) -> int:
        """When the writer has ended."""
        self._thread.join(LIMIT_S)
        self._stream.close()
        return self.last


def _killed(processes: list[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Sqlite:
    """With a write-ahead log and a rollback journal in turn."""

    def __init__(self, folder: Path) -> None:
        self.acknowledged = -1
        self._file = folder / "db.sqlite"
        self._mode = "DELETE"
        with closing(sqlite3.connect(self._file)) as database:
            database.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, n INTEGER, text TEXT)")
            database.execute("CREATE INDEX by_n ON t (n)")

    def start(self, first: int) -> None:
        self._mode = "WAL" if self._mode == "DELETE" else "DELETE"
        script = Path(__file__).with_name("sqlite_writer.py")
        words = [sys.executable, str(script), str(self._file), str(first), self._mode, str(KEYS)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self._lines = Lines(self._process.stdout)
        wait_until(lambda: self._lines.last >= first, LIMIT_S, "SQLite commits nothing")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT_S)
        self.acknowledged = max(self.acknowledged, self._lines.end())

    def found(self) -> dict[int, int]:
        with closing(sqlite3.connect(self._file, timeout=60)) as database:
            (said,) = database.execute("PRAGMA integrity_check").fetchone()
            assert said == "ok", f"SQLite says {said}"
            rows = database.execute("SELECT k, n, text FROM t").fetchall()
            assert all(text == str(n) * (n % 97) for _, n, text in rows), "a row is not what was written"
            return {k: n for k, n, _ in rows}


class Postgresql:
    """With checksums of its pages. Needs Debian's package postgresql, and its user."""

    def __init__(self, folder: Path) -> None:
        self.acknowledged = -1
        self._folder = folder
        self._programs = max(
            Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
        )
        shutil.chown(folder, "postgres", "postgres")
        self._data = folder / "data"
        run(*self._as_user("initdb", "-k", "-D", self._data, "--no-locale", "-E", "UTF8"))
        self._serve()
        self._ask(
            "CREATE EXTENSION amcheck; CREATE TABLE t (k integer PRIMARY KEY, n bigint, words text);"
            "CREATE INDEX by_n ON t (n)"
        )
        self._shut()

    def _as_user(self, program: str, *words: str | Path) -> list[str]:
        return ["runuser", "-u", "postgres", "--", str(self._programs / program), *map(str, words)]

    def _serve(self) -> None:
        options = ("-c", "listen_addresses=", "-c", "checkpoint_timeout=30s", "-c", "max_wal_size=48MB")
        words = self._as_user("postgres", "-D", self._data, "-k", self._folder, *options)
        with open(f"{self._folder.parent}.log", "ab") as log:
            self._server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd="/")
        ready = self._as_user("pg_isready", "-q", "-h", self._folder)
        wait_until(
            lambda: self._server.poll() is not None or subprocess.run(ready, timeout=LIMIT_S).returncode == 0,
            LIMIT_S,
            "PostgreSQL does not come up",
        )
        assert self._server.poll() is None, "PostgreSQL ended: see its log"

    def _psql(self, *words: str) -> list[str]:
        return self._as_user(
            "psql", "-h", str(self._folder), "-qAtX", "-v", "ON_ERROR_STOP=1", "postgres", *words
        )

    def _ask(self, sql: str) -> list[str]:
        return run(*self._psql("-c", sql)).splitlines()

    def _shut(self) -> None:
        run(*self._as_user("pg_ctl", "stop", "-D", self._data, "-m", "fast", "-t", str(int(LIMIT_S))))
        self._server.wait(LIMIT_S)

    def start(self, first: int) -> None:
        self._serve()
        self._client = subprocess.Popen(
            self._psql(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._lines = Lines(self._client.stdout)
        self._writer = threading.Thread(target=self._write, args=(first,), daemon=True)
        self._writer.start()
        wait_until(lambda: self._lines.last >= first, LIMIT_S, "PostgreSQL commits nothing")

    def _write(self, first: int) -> None:
        pipe, n = self._client.stdin, first
        assert pipe is not None
        with suppress(OSError, ValueError):
            while True:  # until nobody reads any more
                pipe.write(
                    f"INSERT INTO t VALUES ({n % KEYS}, {n}, repeat('{n}', {n % 97})) "
                    "ON CONFLICT (k) DO UPDATE SET n = excluded.n, words = excluded.words RETURNING n;\n"
                )
                pipe.flush()
                n += 1

    def kill(self) -> None:
        family = _family(self._server.pid)
        _killed([*family, self._client.pid, *_family(self._client.pid)])
        self._server.wait(LIMIT_S)
        self._client.wait(LIMIT_S)
        wait_until(lambda: all(map(_is_gone, family)), LIMIT_S, "a PostgreSQL process does not end")
        self._writer.join(LIMIT_S)
        with suppress(OSError):  # what is in it goes nowhere
            assert self._client.stdin is not None
            self._client.stdin.close()
        self.acknowledged = max(self.acknowledged, self._lines.end())

    def found(self) -> dict[int, int]:
        self._serve()
        try:
            self._ask(
                "SELECT bt_index_check(c.oid, true) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
                " JOIN pg_am m ON m.oid = c.relam WHERE m.amname = 'btree' AND c.relpersistence <> 't'"
            )
            wrong = self._ask("SELECT count(*) FROM t WHERE words <> repeat(n::text, (n % 97)::int)")
            assert wrong == ["0"], f"{wrong} rows are not what was written"
            rows = self._ask("SELECT k, n FROM t")
            return {int(k): int(n) for k, n in (row.split("|") for row in rows)}
        finally:
            self._shut()


def _family(pid: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


@contextmanager
def _ended(tierblk: Tierblk) -> Iterator[None]:
    """Whatever a round does to the daemon: none is left, and the run directory is what it was."""
    before = os.environ.get(RUN_DIR_VARIABLE)
    try:
        yield
    finally:
        with suppress(AssertionError):
            tierblk.run("stop")
        if before is None:
            os.environ.pop(RUN_DIR_VARIABLE, None)
        else:
            os.environ[RUN_DIR_VARIABLE] = before


def _cut_power(tierblk: Tierblk, database: Database, mount: Path, boot: int) -> None:
    """At one instant nobody serves the device any more; what the page cache has for it is lost, and so is
    /run. The database meets errors, if it has not been killed yet."""
    processes = sorted(tierblk_processes().items(), key=lambda item: "keeper.py" not in item[1])
    _killed([pid for pid, _ in processes])
    wait_until(lambda: all(_is_gone(pid) for pid, _ in processes), LIMIT_S, "a daemon does not end")
    tierblk.run("reap")
    database.kill()
    run("umount", mount)
    if old := os.environ.get(RUN_DIR_VARIABLE):
        shutil.rmtree(old, ignore_errors=True)
    os.environ[RUN_DIR_VARIABLE] = f"/run/tierblk-boot-{os.getpid()}-{boot}"


def _judge(found: dict[int, int], acknowledged: int) -> None:
    """Of each key the newest that was acknowledged, or one that came later and was on its way."""
    wrong = []
    for key in range(min(KEYS, acknowledged + 1)):
        newest, n = acknowledged - (acknowledged - key) % KEYS, found.get(key, -1)
        if n != newest and n <= acknowledged:
            wrong.append((n, newest))
    newest = max(found.values(), default=-1)
    assert not wrong, (
        f"{acknowledged} was committed, {newest} is the newest there is; (found, committed): {wrong[:9]}"
    )


def go(plan: Databases) -> dict[str, Any]:
    """The summary: rounds, transactions, and what was wrong."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    summary: dict[str, Any] = {"wrong": []}
    for name in plan.names:
        summary[name] = _of_one(plan, name, summary["wrong"])
    shutil.rmtree(plan.folder)
    return summary


def _of_one(plan: Databases, name: str, wrong: list[str]) -> dict[str, int]:
    chance = random.Random(plan.seed)
    tierblk = Tierblk(plan.folder / f"configs-{name}")
    keys: dict[str, Any] = {"volume__mode": "local", "volume__size": VOLUME, "device__plane": plan.plane}
    config = tierblk.config(name, None, plan.folder / f"cache-{name}", CACHE, **keys)
    mount = plan.folder / name
    deaths = dict.fromkeys(plan.kinds, 0)
    began_s = time.monotonic()
    with _ended(tierblk):
        device = tierblk.attach(config)
        run("mkfs.ext4", "-q", "-F", device)
        with mounted(device, mount):
            home = mount / "db"
            home.mkdir()
            database: Database = Sqlite(home) if name == "sqlite" else Postgresql(home)
        first = 0
        for number in range(plan.count):
            kind = plan.kinds[number % len(plan.kinds)]
            run("mount", device, mount)
            try:
                database.start(first)
                time.sleep(chance.uniform(*WORK_S))  # the moment of the blow is what is random
                if kind == "daemon":
                    _killed([pid for pid, words in tierblk_processes().items() if "keeper.py" not in words])
                    time.sleep(chance.uniform(0, 1.0))
                if kind == "power":
                    _cut_power(tierblk, database, mount, number)
                else:
                    database.kill()
                if kind == "power":
                    device = tierblk.attach(config)
                    run("mount", device, mount)
                _judge(database.found(), database.acknowledged)
            except (AssertionError, OSError, sqlite3.Error) as error:
                wrong.append(f"{name}, round {number}, {kind}: {error}")
                raise
            finally:
                run("umount", mount)
            run("e2fsck", "-f", "-n", device)
            deaths[kind] += 1
            first = database.acknowledged + 1
            say(f"{name}: {number + 1} of {plan.count} rounds, {database.acknowledged + 1} transactions")
    return {"transactions": database.acknowledged + 1, "seconds": round(time.monotonic() - began_s), **deaths}
