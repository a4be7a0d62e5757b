"""A web server over a slow link, to the tenth of a millisecond: `python3 -m bench.server FILE [...]`.

A thread a connection, because a thread's sleep ends on time: event loops round their timers up by as much as
a millisecond, and at 16 requests in flight that alone is five per cent of what is measured."""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import re
import socket
import threading
import time

PIECE_BYTES = 64 * 1024
MADE_UP_BYTES = 1 << 20
CREDIT_S = 0.002
"""What may be caught up after a sleep that ended late."""
HEAD_MAX_BYTES = 64 * 1024
RANGE = re.compile(rb"(?im)^range: *bytes=(\d+)-(\d*)\r?$")


class Link:
    """What all bodies go through together, at `bytes_per_s` (0: as fast as it goes)."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def wait_s(self, count: int, now_s: float) -> float:
        """How long the next `count` bytes have to wait; they are counted as sent."""
        if not self._bytes_per_s:
            return 0.0
        with self._lock:
            self._free_at_s = max(self._free_at_s, now_s - CREDIT_S) + count / self._bytes_per_s
            return max(self._free_at_s - now_s, 0.0)


def parse_range(head: bytes, size_bytes: int) -> tuple[int, int, bool]:
    """(first byte, how many, whether a range was asked for) of a request's head; all of the file without
    one."""
    match = RANGE.search(head)
    if match is None:
        return 0, size_bytes, False
    first = min(int(match[1]), size_bytes)
    last = int(match[2]) if match[2] else size_bytes - 1
    return first, max(min(last, size_bytes - 1) + 1 - first, 0), True


def answer(first: int, count: int, ranged: bool, size_bytes: int) -> bytes:
    """The head of the answer."""
    lines = ["HTTP/1.1 206 Partial Content" if ranged else "HTTP/1.1 200 OK"]
    lines += [f"Content-Length: {count}", 'ETag: "bench"', "Accept-Ranges: bytes"]
    if ranged:
        lines.append(f"Content-Range: bytes {first}-{first + count - 1}/{size_bytes}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Stored:
    """The bytes of a file."""

    def __init__(self, file: str) -> None:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(fd).st_size
        self._bytes = memoryview(mmap.mmap(fd, self.size_bytes, prot=mmap.PROT_READ))
        os.close(fd)

    def piece(self, first: int, count: int) -> memoryview:
        """`count` bytes at most."""
        return self._bytes[first : first + count]


class MadeUp:
    """As many bytes as are wanted, which take no room: zeros first, then the same random ones over and over,
    so that no page of those is zero."""

    def __init__(self, size_bytes: int, zero_bytes: int = 0) -> None:
        self.size_bytes = size_bytes
        self.zero_bytes = zero_bytes
        self._zeros = memoryview(bytes(MADE_UP_BYTES))
        self._bytes = memoryview(random.Random(0).randbytes(MADE_UP_BYTES))

    def piece(self, first: int, count: int) -> memoryview:
        """`count` bytes at most, and no more than there are to the next repetition."""
        if first < self.zero_bytes:
            return self._zeros[: min(count, self.zero_bytes - first)]
        start = first % MADE_UP_BYTES
        return self._bytes[start : start + count]


class Server:
    """One image under every path. `log_fd` gets two lines a request: a plus when it comes, and when its
    answer is over the offset, how many bytes were sent, and when it came."""

    def __init__(self, image: Stored | MadeUp, latency_s: float, bytes_per_s: float, log_fd: int) -> None:
        self._image = image
        self._size = image.size_bytes
        self._latency_s = latency_s
        self._link = Link(bytes_per_s)
        self._log_fd = log_fd

    def serve(self, connection: socket.socket) -> None:
        """Until the client goes."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        rest = b""
        with connection, contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in rest:
                    data = connection.recv(HEAD_MAX_BYTES)
                    if not data or len(rest) > HEAD_MAX_BYTES:
                        return
                    rest += data
                asked_s = time.monotonic()
                head, _, rest = rest.partition(b"\r\n\r\n")
                os.write(self._log_fd, b"+\n")
                self._answer(connection, head, asked_s)

    def _answer(self, connection: socket.socket, head: bytes, asked_s: float) -> None:
        first, count, ranged = parse_range(head, self._size)
        begin = answer(first, count, ranged, self._size)
        if self._latency_s:
            time.sleep(max(asked_s + self._latency_s - time.monotonic(), 0))
        sent = 0
        try:
            if head.startswith(b"HEAD "):
                connection.sendall(begin)
                return
            while sent < count:
                piece = self._image.piece(first + sent, min(PIECE_BYTES, count - sent))
                if wait_s := self._link.wait_s(len(piece), time.monotonic()):
                    time.sleep(wait_s)
                self._send(connection, begin, piece)
                begin = b""
                sent += len(piece)
        finally:
            os.write(self._log_fd, f"{first} {sent} {asked_s:.6f}\n".encode())

    @staticmethod
    def _send(connection: socket.socket, begin: bytes, piece: memoryview) -> None:
        done = connection.sendmsg([begin, piece]) if begin else connection.send(piece)
        if done < len(begin) + len(piece):
            connection.sendall((begin + bytes(piece))[done:])


def main() -> None:
    """Serves until it is killed; the first line on stdout is the port."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.server", description=__doc__)
    image = parser.add_mutually_exclusive_group(required=True)
    image.add_argument("file", nargs="?")
    image.add_argument("--made-up-bytes", type=int, help="no file: an image of this size, made up")
    parser.add_argument(
        "--zero-bytes", type=int, default=0, help="how many of these, at the front, are zeros"
    )
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--bytes-per-s", type=float, default=0.0)
    parser.add_argument("--log", default=os.devnull)
    options = parser.parse_args()
    # A line is one appending write: threads share the file, and a buffered one is not made for that.
    log_fd = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    stored = Stored(options.file) if options.file else MadeUp(options.made_up_bytes, options.zero_bytes)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(stored, options.latency_s, options.bytes_per_s, log_fd)
        os.write(1, f"{listener.getsockname()[1]}\n".encode())
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=server.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
