"""What the tests of devices share: reading a device in many ways, a server that stalls on command, daemons
seen from outside.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.vm.guest.helpers import Tierblk, wait_until

KIB = 1 << 10
MIB = 1 << 20
SECTOR_BYTES = 512
BLOCK_BYTES = 64 * KIB
RUN = Path("/run/tierblk")
BLKGETSIZE64 = 0x80081272

# How a config says that one wants to see an error soon: a test of an outage takes seconds, not minutes.
IMPATIENT: dict[str, str | int] = {
    "device__on_outage": "fail",
    "remote__connect_timeout": "2s",
    "remote__read_timeout": "4s",
    "remote__retries": 1,
    "remote__retry_delay": "50ms",
}
# With these settings a read that meets an outage has ended by then, also in an emulator under load.
IMPATIENT_LIMIT_S = 45.0


def image_bytes(path: Path) -> mmap.mmap:
    """The file's content, to compare with, without a copy of it in memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def device_bytes(path: Path) -> int:
    """How large the kernel says the device is."""
    with open(path, "rb") as file:
        return int.from_bytes(fcntl.ioctl(file, BLKGETSIZE64, bytes(8)), "little")


def read(path: Path, offset_bytes: int, length_bytes: int, *, direct: bool = True) -> bytes:
    """One pread of a device. direct: past the kernel's page cache; then offset and length are in sectors.

    A buffered read is of the device too: the kernel forgets its pages when the last one closes it. OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, max(length_bytes, 1)) as buffer:
            count = os.preadv(fd, [buffer], offset_bytes)
            return buffer[: min(count, length_bytes)]
    finally:
        os.close(fd)


def extents(size_bytes: int, count: int, seed: int, *, direct: bool) -> Iterator[tuple[int, int]]:
    """Seeded (offset, length) of 512 bytes to 1 MiB, every size as likely as every other by magnitude.

    direct: in whole sectors; else any byte. The first ones are the disk's ends, where mistakes like to be.
    """
    grain = SECTOR_BYTES if direct else 1
    chance = random.Random(seed)
    yield from (
        (0, SECTOR_BYTES),
        (size_bytes - SECTOR_BYTES, SECTOR_BYTES),
        (size_bytes - BLOCK_BYTES, BLOCK_BYTES),
    )
    for _ in range(count):
        length = int(SECTOR_BYTES * 2048 ** chance.random()) // grain * grain
        length = min(length, size_bytes)
        yield chance.randrange((size_bytes - length) // grain + 1) * grain, length


def compare_at_random(device: Path, image: Path, *, count: int, seed: int, limit_bytes: int = 0) -> None:
    """Seeded reads of every size and alignment, half of them buffered, half O_DIRECT, by four threads at
    once, against the image. limit_bytes: only so much of its beginning, if given. AssertionError names a
    difference.
    """
    wanted = image_bytes(image)
    size = limit_bytes or len(wanted)

    def worker(number: int) -> None:
        direct = bool(number % 2)
        for offset, length in extents(size, count, seed * 4 + number, direct=direct):
            got = read(device, offset, length, direct=direct)
            assert got == wanted[offset : offset + length], f"wrong bytes: {offset=} {length=} {direct=}"

    with wanted, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(worker, number) for number in range(4)]:
            done.result()


def compare_whole(device: Path, image: Path, *, limit_bytes: int = 0) -> None:
    """Every byte of the device, and its size, against the image. limit_bytes: only of so much of it."""
    with image_bytes(image) as wanted:
        assert device_bytes(device) == len(wanted)
        size = limit_bytes or len(wanted)

        def piece(offset: int) -> None:
            length = min(MIB, size - offset)
            assert read(device, offset, length) == wanted[offset : offset + length], f"wrong bytes: {offset=}"

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(piece, offset) for offset in range(0, size, MIB)]:
                done.result()


class WaitingReader:
    """A thread that reads once and keeps what became of it."""

    def __init__(self, device: Path, offset_bytes: int, length_bytes: int = 4 * KIB) -> None:
        self._data = b""
        self._errno: int | None = None
        self._thread = threading.Thread(
            target=self._run, args=(device, offset_bytes, length_bytes), daemon=True
        )
        self._thread.start()

    def _run(self, device: Path, offset_bytes: int, length_bytes: int) -> None:
        try:
            self._data = read(device, offset_bytes, length_bytes)
        except OSError as error:
            self._errno = error.errno

    @property
    def waits(self) -> bool:
        """Whether it has not come back yet."""
        return self._thread.is_alive()

    def result(self, limit_s: float) -> bytes | int:
        """What it read, or the errno. AssertionError when it is still waiting after `limit_s`."""
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), f"a reader still waits after {limit_s} s"
        return self._data if self._errno is None else self._errno


class MoodyServer:
    """An HTTP server of one file that answers as its `mood` says, from one request to the next.

    "right"; "silent": takes a request and says nothing; "half": stops in the middle of the body; "whole":
    ignores ranges, as servers do that have none. `gone()`: nobody listens any more. `held`: how many
    requests wait for that. `broken_from`: hangs up on whoever asks for bytes from there on.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.mood = "right"
        self.held = 0
        self.broken_from = len(content)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with suppress(OSError):
                    outer._answer(self)

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/moody.raw"

    def gone(self) -> None:
        """Nobody listens any more, connections are reset."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._over.set()
        with self._lock:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _hold(self) -> None:
        with self._lock:
            self.held += 1
        self._over.wait()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self._sockets.add(request.connection)
        mood = self.mood
        begin, end = 0, len(self.content)
        asked = request.headers.get("Range")
        if asked and mood != "whole":
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) + 1, end)
        if mood == "silent":
            self._hold()
        if mood == "silent" or begin >= self.broken_from:
            request.close_connection = True
            return
        request.send_response(200 if mood == "whole" else 206)
        if mood != "whole":
            request.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(end - begin))
        request.send_header("ETag", '"moody"')
        request.end_headers()
        if mood == "half":
            request.wfile.write(self.content[begin : begin + (end - begin) // 2])
            self._hold()
            request.close_connection = True
            return
        request.wfile.write(self.content[begin:end])


@contextmanager
def moody(content: bytes) -> Iterator[MoodyServer]:
    """A MoodyServer for the length of a block."""
    server = MoodyServer(content)
    try:
        yield server
    finally:
        server.gone()


class DaemonProcess:
    """The daemon of a cache directory, as ps and kill see it."""

    def __init__(self, cache_dir: Path) -> None:
        found = []
        for path in RUN.glob("*/daemon.json"):
            info: dict[str, Any] = json.loads(path.read_text())
            if info["cache_dir"] == str(cache_dir):
                found.append(int(info["pid"]))
        assert len(found) == 1, f"daemons of {cache_dir}: {found}"
        self.pid = found[0]
        self._process_fd = os.pidfd_open(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Sends it."""
        signal.pidfd_send_signal(self._process_fd, number)

    def ended(self, limit_s: float) -> None:
        """Returns when it has ended; AssertionError when that is not within `limit_s`."""
        poll = select.poll()
        poll.register(self._process_fd, select.POLLIN)
        assert poll.poll(limit_s * 1000), f"daemon {self.pid} still runs after {limit_s} s"
        os.close(self._process_fd)

    def fds(self) -> list[str]:
        """What it has open."""
        return sorted(_link(path) for path in Path(f"/proc/{self.pid}/fd").iterdir())

    def threads(self) -> list[str]:
        """The names of its threads."""
        return sorted(path.read_text().strip() for path in Path(f"/proc/{self.pid}/task").glob("*/comm"))


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "closed meanwhile"


def devices() -> list[str]:
    """Names of all ublk nodes, char and block, partitions too."""
    return sorted(path.name for path in Path("/dev").glob("ublk[bc]*"))


def log_of(cache_dir: Path) -> str:
    """What the daemons of a cache directory logged."""
    from tierblk.cli.starting import log_path

    return log_path(cache_dir).read_text()


def wait_for_status(
    tierblk: Tierblk, name: str, holds: Callable[[dict[str, Any]], object], limit_s: float = 30.0
) -> dict[str, Any]:
    """The status of a device as soon as it is such that `holds`. AssertionError with the last one."""
    last: dict[str, Any] = {}

    def now() -> object:
        last.clear()
        last.update(tierblk.status(name))
        return holds(last)

    wait_until(now, limit_s, lambda: f"status {name} stays {last}")
    return last
