"""What tests inside the VM use: waiting for events, a web server, the command line, and what a test left
behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Test = TypeVar("Test")

POLL_S = 0.05
PAGE_BYTES = 4096
CHUNK_BYTES = 1 << 20
COMMAND_LIMIT_S = 120.0


def on_oldest(test: Test) -> Test:
    """What no kernel could do otherwise than the other: tests/vm/suite.py runs it on the oldest only."""
    return test


def on_newest(test: Test) -> Test:
    """And on the newest only."""
    return test


def wait_until(holds: Callable[[], object], limit_s: float, complaint: str | Callable[[], str]) -> None:
    """Returns when `holds()` is true. Raises AssertionError with the complaint when it is not within
    `limit_s`.
    """
    deadline_s = time.monotonic() + limit_s
    clock = threading.Event()
    while not holds():
        if time.monotonic() > deadline_s:
            raise AssertionError(complaint if isinstance(complaint, str) else complaint())
        clock.wait(POLL_S)


def left_behind() -> list[str]:
    """Sentences about what no test may leave: ublk devices, processes in D state, tierblk daemons."""
    found = [f"device {path}" for path in sorted(Path("/dev").glob("ublk[bc]*"))]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
            command = (
                (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            )
        except OSError:
            continue
        if rest.split()[0] == "D" and not _is_of_kernel(stat.parent):
            found.append(f"process {name.split()[0]} in D state: {command or name}")
    return found + [f"process {pid} still runs: {command}" for pid, command in tierblk_processes().items()]


def tierblk_processes() -> dict[int, str]:
    """Daemons and commands of ours, pid -> command line: a word of it is "tierblk", ".../tierblk" or its
    __main__.py.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").strip("\0").split("\0")
        except OSError:
            continue
        paths = [Path(word) for word in words if not word.startswith("-")]
        if any(path.name == "tierblk" or path.parts[-2:] == ("tierblk", "__main__.py") for path in paths):
            found[int(path.parent.name)] = " ".join(words)
    return found


def clean_up() -> None:
    """The last resort after a test that left something: processes are killed, keepers before their daemons,
    and then the devices that wait for a daemon are deleted.
    """
    found = sorted(tierblk_processes().items(), key=lambda item: "keeper.py" not in item[1])
    for pid, _ in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if list(Path("/dev").glob("ublkc*")):
        RunningCommand(("reap",)).finish(COMMAND_LIMIT_S)


def _is_of_kernel(process: Path) -> bool:
    """A thread of the kernel itself (a flusher, say) waits for disks as its job."""
    try:
        return not (process / "cmdline").read_bytes()
    except OSError:
        return True


def write_image(path: Path, size_bytes: int, seed: int) -> None:
    """A file of which no two pages are equal: noise that repeats every MiB, each page stamped with seed and
    offset.

    Quick on purpose: a generator in an emulator makes a few MB/s.
    """
    noise = bytearray(random.Random(seed).randbytes(CHUNK_BYTES))
    with open(path, "wb") as file:
        for start in range(0, size_bytes, CHUNK_BYTES):
            for offset in range(0, CHUNK_BYTES, PAGE_BYTES):
                noise[offset : offset + 16] = struct.pack("<QQ", seed, start + offset)
            file.write(noise[: size_bytes - start])


@dataclass(frozen=True)
class Request:
    """A line of the web server's log. `range_` is what the client asked for, "" = everything."""

    method: str
    path: str
    status: int
    sent_bytes: int
    range_: str


class WebServer:
    """nginx on a port of loopback. It may be stopped and started again within a test."""

    def __init__(self, root: Path, folder: Path, port: int = 8080) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "access.log"
        self._folder = folder
        folder.mkdir(parents=True)
        (folder / "nginx.conf").write_text(
            f"worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log; user root;\n"
            "events { worker_connections 512; }\n"
            "http {\n"
            "  log_format ranges '$request_method $uri $status $body_bytes_sent \"$http_range\"';\n"
            f"  access_log {self._log} ranges; sendfile on; keepalive_requests 1000000;\n"
            f"  server {{ listen 127.0.0.1:{port}; root {root}; }}\n"
            "}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self._process = subprocess.Popen(
            ["nginx", "-c", str(self._folder / "nginx.conf"), "-p", str(self._folder)]
        )
        probe = ["curl", "-s", "-o", "/dev/null", f"{self.url}/"]
        wait_until(lambda: subprocess.run(probe, check=False).returncode == 0, 20, "nginx does not answer")

    def stop(self) -> None:
        """Ends it at once, connections included; stopped already is fine."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10)
            self._process = None

    def requests(self, path: str = "/") -> list[Request]:
        """What was asked so far of paths that begin with `path`."""
        found = []
        for line in self._log.read_text().splitlines():
            method, uri, status, sent, range_ = line.split(" ", 4)
            if uri.startswith(path) and uri != "/":
                found.append(
                    Request(method, uri, int(status), int(sent), range_.strip('"').removeprefix("-"))
                )
        return found

    def url_of(self, image: Path) -> str:
        """The address of a file in the served folder."""
        return f"{self.url}/{image.name}"


@dataclass
class Answer:
    """What a command said and how it ended."""

    returncode: int
    stdout: str
    stderr: str


class RunningCommand:
    """`tierblk WORDS` in a process of its own.

    Forked from this one, which has the modules already: a fresh interpreter takes seconds in an emulator.
    Daemons are not forked: what the command starts is started as for any user.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        import tierblk.cli
        import tierblk.config

        self._words = words
        self._said_fds = [os.memfd_create(name) for name in ("stdout", "stderr")]
        self.pid = os.fork()
        if self.pid == 0:
            _become(tierblk.cli.main, words, self._said_fds)
        self._process_fd = os.pidfd_open(self.pid)

    @property
    def said(self) -> str:
        """What is on its stdout so far."""
        return os.pread(self._said_fds[0], 1 << 26, 0).decode(errors="replace")

    def finish(self, limit_s: float) -> Answer:
        """Its answer. Raises AssertionError, and kills it, when it takes longer than `limit_s`."""
        poll = select.poll()
        poll.register(self._process_fd, select.POLLIN)
        in_time = bool(poll.poll(limit_s * 1000))
        if not in_time:
            os.kill(self.pid, signal.SIGKILL)
        # One that the kernel holds in D state cannot be waited for.
        status = os.waitpid(self.pid, 0)[1] if poll.poll(5000) else 0
        os.close(self._process_fd)
        texts = []
        for fd in self._said_fds:
            with open(fd, "rb") as file:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        if not in_time:
            raise AssertionError(f"tierblk {' '.join(self._words)} took over {limit_s} s\n{''.join(texts)}")
        return Answer(os.waitstatus_to_exitcode(status), *texts)


def _become(
    main: Callable[[tuple[str, ...]], int], words: tuple[str, ...], said_fds: Sequence[int]
) -> NoReturn:
    """The forked child's life."""
    code = 70
    try:
        for caught in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
            signal.signal(caught, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, said_fd in enumerate(said_fds, 1):
            os.dup2(said_fd, number)
        os.closerange(3, 4096)  # a command has nothing open of what this process has, a device for example
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), "utf-8") for number in (1, 2))
        try:
            code = main(words)
        except SystemExit as ended:  # --help, wrong usage
            code = ended.code if isinstance(ended.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Tierblk:
    """Runs `tierblk ...` and makes the TOML files that it is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)

    def begin(self, *words: str | Path) -> RunningCommand:
        """Starts a verb; more than one may run."""
        return RunningCommand(tuple(map(str, words)))

    def run(self, *words: str | Path, check: bool = True, limit_s: float = COMMAND_LIMIT_S) -> Answer:
        """Runs a verb. Raises AssertionError with everything it printed when it should have succeeded and
        did not.
        """
        done = self.begin(*words).finish(limit_s)
        if check and done.returncode != 0:
            command = " ".join(map(str, words))
            raise AssertionError(f"tierblk {command}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def json(self, *words: str | Path) -> Any:
        """Runs a verb with --json; returns what it printed."""
        return json.loads(self.run(*words, "--json").stdout)

    def config(
        self, name: str, url: str | None, cache_dir: Path, cache_size: str, **settings: str | int | float
    ) -> Path:
        """Writes a config file. `settings`: table__key=value, e.g. device__plane="copy". url: None for a
        volume without a base."""
        tables: dict[str, dict[str, str | int | float]] = {
            "device": {"name": name},
            "base": {"url": url} if url else {},
            "cache": {"dir": str(cache_dir), "size": cache_size},
        }
        for key, value in settings.items():
            table, _, setting = key.partition("__")
            tables.setdefault(table, {})[setting] = value
        lines = []
        for table, values in tables.items():
            if not values:
                continue
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        path = self._folder / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def attach(self, config: Path) -> Path:
        """Attaches a device; returns its path, which is all that the command prints on stdout."""
        words = self.run("attach", config).stdout.split()
        assert len(words) == 1, f"attach printed {words}"
        return Path(words[0])

    def status(self, name: str) -> dict[str, Any]:
        """The fields of one device."""
        answer = self.json("status", name)
        devices = answer if isinstance(answer, list) else answer.get("devices", [answer])
        assert isinstance(devices, list)
        assert len(devices) == 1, f"status {name} says {answer}"
        assert isinstance(devices[0], dict)
        return devices[0]

    def stop_all(self) -> None:
        """Stops whatever daemon runs."""
        self.run("stop", check=False)


def run(*words: str | Path) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@contextmanager
def mounted(device: Path, folder: Path) -> Iterator[None]:
    """A filesystem, for the length of a block; the folder is made."""
    folder.mkdir(exist_ok=True)
    run("mount", device, folder)
    try:
        yield
    finally:
        run("umount", folder)
