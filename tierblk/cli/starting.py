"""Starting a daemon for a cache directory, exactly one however many commands ask at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import tierblk
from tierblk.cli.client import Daemon, DeadSocket, find_daemon
from tierblk.errors import CacheError, DaemonError, TierblkError, from_dict
from tierblk.rundir import run_root

if TYPE_CHECKING:
    from tierblk.config import Config

# Making a cache directory reserves its space, which some filesystems do by writing.
READY_TIMEOUT_S = 600.0
HOLDER_TIMEOUT_S = 60.0  # how long a daemon may take to stop, or to begin
POLL_S = 0.05
START_TRIES = 3
LOG_BYTES_MAX = 1 << 20


def command(*arguments: str) -> list[str]:
    """This tierblk, with other arguments; nothing is imported from the current directory (-P)."""
    return [sys.executable, "-P", str(Path(tierblk.__file__).parent / "__main__.py"), *arguments]


def keeper_command(ready_fd: int, *arguments: str) -> list[str]:
    """The keeper in front of this tierblk with these arguments (keeper.py)."""
    keeper = Path(__file__).with_name("keeper.py")
    return [sys.executable, "-I", "-S", str(keeper), str(ready_fd), *command(*arguments)]


def running_or_started(config: Config, *, timeout_s: float, debug: bool) -> tuple[Daemon, bool]:
    """The daemon of the config's cache directory, and whether it was started here. TierblkError."""
    cache_dir = config.cache.dir
    found = find_daemon(cache_dir, timeout_s)
    if found:
        return found, False
    # One at a time: the second one waits for the first one's daemon, and finds it.
    with _only_starter(cache_dir):
        for _ in range(START_TRIES):
            found = find_daemon(cache_dir, timeout_s)
            if found:
                return found, False
            was_locked = _is_locked(cache_dir)
            try:
                _start(config, debug=debug)
            except CacheError:
                # Another daemon may have the lock: one that starts (a service, say), or one that stops.
                if not was_locked and not _is_locked(cache_dir):
                    raise
                _wait_for_holder(cache_dir, timeout_s)
                continue
            found = find_daemon(cache_dir, timeout_s)
            if found:
                return found, True
    hint = f"its log is {log_path(cache_dir)}"
    raise DaemonError(f"the daemon of {cache_dir} ends as soon as it is started", hint)


def _wait_for_holder(cache_dir: Path, timeout_s: float) -> None:
    """Until whoever holds the directory's lock can be asked, or has let go of it."""
    deadline = time.monotonic() + HOLDER_TIMEOUT_S
    while _is_locked(cache_dir) and not find_daemon(cache_dir, timeout_s):
        if time.monotonic() > deadline:
            raise CacheError(
                f"{cache_dir} is locked by a process that does not answer as a daemon",
                f"find it with: fuser -v {cache_dir / 'slots'}",
            )
        time.sleep(POLL_S)


def _is_locked(cache_dir: Path) -> bool:
    """Whether somebody holds the directory's flock (R8). Not by trying, which could make its owner fail."""
    inodes = set()
    for name in ("slots", "slots.new"):
        with suppress(OSError):
            inodes.add(str(os.stat(cache_dir / name).st_ino))
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any(
        fields[1] == "FLOCK" and fields[5].rpartition(":")[2] in inodes
        for fields in map(str.split, locks.splitlines())
        if len(fields) > 5
    )


def _file_name(cache_dir: Path) -> str:
    """A file name that says which directory it is for, and is different for different ones."""
    real = os.path.realpath(cache_dir)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", real).strip("-.")[:100]
    return f"{readable}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"


def _folder(name: str) -> Path:
    folder = run_root() / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DaemonError(f"cannot make {folder}: {error.strerror}", "run the command as root") from None
    return folder


def log_path(cache_dir: Path) -> Path:
    """The log of the daemon that `attach` starts for a cache directory."""
    return run_root() / "log" / f"{_file_name(cache_dir)}.log"


@contextmanager
def _only_starter(cache_dir: Path) -> Iterator[None]:
    path = _folder("starting") / f"{_file_name(cache_dir)}.lock"
    try:
        lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonError(f"cannot make {path}: {error.strerror}", "run the command as root") from None
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DaemonError(
                        f"another command has been starting a daemon for {cache_dir} for too long"
                    ) from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(lock_fd)


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        log_fd = os.open(path, flags, 0o600)
        if os.fstat(log_fd).st_size > LOG_BYTES_MAX:  # RUN is memory
            os.ftruncate(log_fd, 0)
    except OSError as error:
        raise DaemonError(f"cannot write the log {path}: {error.strerror}") from None
    return log_fd


def _start(config: Config, *, debug: bool) -> None:
    """Starts a daemon, with its keeper, in a session of its own; returns when it serves. Raises what it
    reports."""
    _folder("log")
    log_file = log_path(config.cache.dir)
    log_fd = _open_log(log_file)
    ready_read, ready_write = os.pipe()
    try:
        arguments = ["serve", "--config", str(config.path), *(["--debug"] if debug else [])]
        process = subprocess.Popen(
            keeper_command(ready_write, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
            pass_fds=(ready_write,),
        )
    except OSError as error:
        os.close(ready_read)
        raise DaemonError(f"cannot start a daemon: {error.strerror}") from None
    finally:
        os.close(ready_write)
        os.close(log_fd)
    try:
        await_ready(ready_read, READY_TIMEOUT_S, log_file)
    except BaseException as error:
        _end(process, grace_s=5.0 if isinstance(error, TierblkError) else 0.0)
        raise
    process.returncode = 0  # it stays, and init takes it over: Popen has nothing to warn about


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """A daemon that is not ready serves nobody. grace_s: to end by itself, and to write into its log why."""
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def await_ready(ready_fd: int, timeout_s: float, log_file: Path | None) -> None:
    """Until the daemon's line came through the pipe, which is closed. Raises the error that it holds."""
    hint = f"its log is {log_file}" if log_file else None
    poll = select.poll()
    poll.register(ready_fd, select.POLLIN)
    line = b""
    deadline = time.monotonic() + timeout_s
    with open(ready_fd, "rb", buffering=0) as pipe:
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise DaemonError(f"the daemon was not ready after {timeout_s:g} s", hint)
            piece = pipe.read(4096)
            if not piece:
                raise DaemonError("the daemon ended before it was ready", hint)
            line += piece
    try:
        report = json.loads(line)
    except ValueError:
        report = None
    if not isinstance(report, dict) or not report.get("ok"):
        raise from_dict(report.get("error") if isinstance(report, dict) else report)


def stop_if_idle(daemon: Daemon, *, wait: bool = True) -> None:
    """Take a daemon away that was started for nothing; whatever goes wrong, the first error counts."""
    with suppress(TierblkError, OSError, DeadSocket):
        process_fd = daemon.process()
        try:
            if daemon.request("POST", "/v1/stop", {"if_idle": True}).get("stopping") and wait:
                wait_for_end(process_fd, daemon.timeout_s)
        finally:
            os.close(process_fd)


def wait_for_end(process_fd: int, timeout_s: float) -> bool:
    """Whether the process of a pidfd ended within the time."""
    poll = select.poll()
    poll.register(process_fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
