"""Talks to running daemons over their control sockets, with nothing but the standard library.

`tierblk list` has to answer at once, so neither aiohttp nor pydantic is imported here. Every call has a
time-out: a daemon that hangs makes a command fail, never hang.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tierblk.errors import DaemonError, DeviceError, TierblkError, from_dict
from tierblk.rundir import INFO_NAME, SOCKET_NAME, run_root, socket_address

ANSWER_TIMEOUT_S = 10.0
ANSWER_BYTES_MAX = 64 * 2**20
_PIECE_BYTES = 1 << 18


class DeadSocket(Exception):
    """Nobody listens at a socket: its daemon was killed."""


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to run_dir/control.sock."""

    def __init__(self, run_dir: Path, timeout_s: float) -> None:
        super().__init__("tierblk", timeout=timeout_s)
        self._run_dir = run_dir

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with socket_address(self._run_dir) as address:
            self.sock.connect(address)


@dataclass(frozen=True)
class Daemon:
    """A daemon whose socket is at run_dir; info is its daemon.json (perhaps empty) until it was asked."""

    run_dir: Path
    info: dict[str, Any]
    timeout_s: float = ANSWER_TIMEOUT_S

    @property
    def cache_dir(self) -> str:
        """The cache directory that it serves."""
        return str(self.info.get("cache_dir", "?"))

    def __str__(self) -> str:
        return f"the daemon of {self.cache_dir} (pid {self.info.get('pid', '?')})"

    def get(self, path: str) -> dict[str, Any]:
        """GET; the answer's JSON object. TierblkError as `request`."""
        return self.request("GET", path)

    def devices(self) -> list[dict[str, Any]]:
        """All its devices."""
        devices = self.get("/v1/devices").get("devices")
        if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices):
            raise DaemonError(f"{self} gave an answer that is not understood")
        return devices

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """One call. Raises what the daemon reported, DaemonError when it does not answer, DeadSocket."""
        status, answer = self._call(method, path, None if body is None else json.dumps(body), timeout_s)
        return self._document(status, answer)

    def read(self, path: str, timeout_s: float | None = None) -> bytes:
        """GET of bytes. As `request`."""
        status, answer = self._call("GET", path, None, timeout_s)
        if status >= 400:
            self._document(status, answer)
        return answer

    def _document(self, status: int, answer: bytes) -> dict[str, Any]:
        try:
            document = json.loads(answer)
        except ValueError as error:
            raise DaemonError(f"{self} broke off: {error}") from None
        if not isinstance(document, dict):
            raise DaemonError(f"{self} gave an answer that is not understood")
        if status >= 400:
            raise from_dict(document.get("error"))
        return document

    def text(self, path: str) -> str:
        """GET of what is no JSON. Raises as `request`."""
        answer = self.read(path)
        try:
            return answer.decode()
        except ValueError:
            raise DaemonError(f"{self} gave an answer that is not understood") from None

    def _call(self, method: str, path: str, body: str | None, timeout_s: float | None) -> tuple[int, bytes]:
        timeout_s = timeout_s or self.timeout_s
        connection = _Connection(self.run_dir, timeout_s)
        try:
            with self._reported(timeout_s):
                connection.request(
                    method, path, body, {} if body is None else {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                return answer.status, answer.read(ANSWER_BYTES_MAX)
        finally:
            connection.close()

    @contextmanager
    def _reported(self, timeout_s: float) -> Iterator[None]:
        """What can go wrong with a connection, as an error of ours."""
        try:
            yield
        except (ConnectionRefusedError, FileNotFoundError):
            raise DeadSocket(str(self.run_dir / SOCKET_NAME)) from None
        except PermissionError:
            raise DaemonError(f"no permission to talk to {self}", "run the command as root") from None
        except (TimeoutError, BlockingIOError):
            raise DaemonError(
                f"{self} has not answered for {timeout_s:g} s",
                f"it may hang; if it does not recover, end it: kill -9 {self.info.get('pid', 'PID')}",
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DaemonError(f"{self} broke off: {error or type(error).__name__}") from None

    def stream(self, path: str, deadline_s: float = math.inf) -> Iterator[list[dict[str, Any]]]:
        """GET of lines of JSON that come one by one; the objects in them, as many at a time as came at once.
        Ends behind the one with "end", or at `deadline_s` on the monotonic clock. Raises as `request`; also
        when it breaks off before that."""
        connection = _Connection(self.run_dir, self.timeout_s)
        try:
            with self._reported(self.timeout_s):
                connection.request("GET", path)
                answer = connection.getresponse()
                if answer.status >= 400:
                    raise from_dict(json.loads(answer.read(ANSWER_BYTES_MAX)).get("error"))
            yield from self._lines(connection, answer, deadline_s)
        finally:
            connection.close()

    def _lines(
        self, connection: _Connection, answer: http.client.HTTPResponse, deadline_s: float
    ) -> Iterator[list[dict[str, Any]]]:
        rest = b""
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            connection.sock.settimeout(min(left_s, self.timeout_s))
            try:
                with self._reported(self.timeout_s):
                    came = answer.read1(_PIECE_BYTES)
            except DaemonError:
                if time.monotonic() >= deadline_s:
                    return
                raise
            if not came:
                raise DaemonError(f"{self} broke off: it may have been killed")
            *whole, rest = (rest + came).split(b"\n")
            with self._reported(self.timeout_s):
                found = [json.loads(line) for line in whole if line]
            yield found
            if found and "end" in found[-1]:
                return

    def process(self) -> int:
        """A pidfd of the process that listens at the socket (not of what daemon.json claims). DeadSocket."""
        connection = _Connection(self.run_dir, self.timeout_s)
        try:
            connection.connect()
            credentials = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return os.pidfd_open(struct.unpack("iII", credentials)[0])
        except (ConnectionRefusedError, FileNotFoundError, ProcessLookupError):
            raise DeadSocket(str(self.run_dir / SOCKET_NAME)) from None
        except OSError as error:
            raise DaemonError(f"cannot reach {self}: {error.strerror or error}") from None
        finally:
            connection.close()


def sockets() -> list[Path]:
    """Run directories that have a socket, alive or dead. DaemonError without permission to look."""
    root = run_root()
    try:
        names = sorted(os.listdir(root))
        return [root / name for name in names if os.path.lexists(root / name / SOCKET_NAME)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        raise DaemonError(f"no permission to look for daemons in {root}", "run the command as root") from None


def _info(run_dir: Path) -> dict[str, Any]:
    try:
        info = json.loads((run_dir / INFO_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def candidates(timeout_s: float = ANSWER_TIMEOUT_S) -> list[Daemon]:
    """A Daemon for every socket, not yet asked for anything: it may be dead or hang."""
    return [Daemon(run_dir, _info(run_dir), timeout_s) for run_dir in sockets()]


def ask_all(
    question: Callable[[Daemon], Any], timeout_s: float = ANSWER_TIMEOUT_S
) -> Iterator[tuple[Daemon, Any, TierblkError | None]]:
    """(daemon, answer, None) or (daemon, None, error) of every living daemon; passes over dead sockets."""
    for daemon in candidates(timeout_s):
        try:
            yield daemon, question(daemon), None
        except DeadSocket:
            continue
        except TierblkError as error:
            yield daemon, None, error


def same_directory(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths are one directory, also through links, bind mounts, and before it was made."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def find_daemon(cache_dir: str | os.PathLike[str], timeout_s: float = ANSWER_TIMEOUT_S) -> Daemon | None:
    """The living daemon of a cache directory, with its info. DaemonError when it hangs."""
    for daemon in candidates(timeout_s):
        try:
            # One whose daemon.json names another directory is not asked: if it hangs, so be it.
            if "cache_dir" in daemon.info and not same_directory(daemon.cache_dir, cache_dir):
                continue
            info = daemon.get("/v1/daemon")
        except DeadSocket:
            continue
        if same_directory(str(info.get("cache_dir")), cache_dir):
            return Daemon(daemon.run_dir, info, timeout_s)
    return None


def find_device(name: str, cache_dir: str | None, timeout_s: float) -> tuple[Daemon, dict[str, Any]]:
    """The device of a name, and its daemon. DeviceError: there is none. DaemonError: there are several."""
    found: list[tuple[Daemon, dict[str, Any]]] = []
    names: list[str] = []
    silent: TierblkError | None = None
    for daemon, devices, error in ask_all(Daemon.devices, timeout_s):
        if cache_dir is not None and not same_directory(daemon.cache_dir, cache_dir):
            continue
        silent = error or silent
        for device in devices or ():
            names.append(str(device.get("name")))
            if device.get("name") == name:
                found.append((daemon, device))
    if len(found) == 1:
        return found[0]
    if found:
        where = " and ".join(daemon.cache_dir for daemon, _ in found)
        raise DaemonError(
            f'there are {len(found)} devices called "{name}", with the caches {where}',
            "say which: --cache-dir DIR",
        )
    if silent:
        raise silent  # it may be the one that has the device
    known = f"attached are: {', '.join(sorted(names))}" if names else "no device is attached"
    raise DeviceError(f'there is no device called "{name}"', known)


def device_path(name: str) -> str:
    """The resource of a device."""
    return f"/v1/devices/{quote(name, safe='')}"
