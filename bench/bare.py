"""What a client without any work of its own gets from a server: `python3 -m bench.bare PORT [...]` reads
random pages over plain sockets and prints IOPS. The ceiling of the machine, the server and its delay."""

from __future__ import annotations

import argparse
import random
import selectors
import socket
import time

from bench.asked import PAGE_BYTES

RECEIVE_BYTES = 64 * 1024


def request(offset_bytes: int) -> bytes:
    """A GET of one page."""
    last = offset_bytes + PAGE_BYTES - 1
    return f"GET /image.raw HTTP/1.1\r\nHost: bench\r\nRange: bytes={offset_bytes}-{last}\r\n\r\n".encode()


def complete(received: bytes) -> bool:
    """Whether a whole page has come behind its head."""
    _, found, body = received.partition(b"\r\n\r\n")
    return bool(found) and len(body) >= PAGE_BYTES


def iops(port: int, depth: int, pages: int, seconds: float) -> float:
    """`depth` connections, each with one request under way, for so long."""
    places = random.Random(port)
    selector = selectors.DefaultSelector()
    for _ in range(depth):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.send(request(places.randrange(pages) * PAGE_BYTES))
        selector.register(connection, selectors.EVENT_READ, bytearray())
    began_s = now_s = time.monotonic()
    done = 0
    while now_s - began_s < seconds:
        for key, _ in selector.select(1):
            assert isinstance(key.fileobj, socket.socket)
            key.data.extend(key.fileobj.recv(RECEIVE_BYTES))
            if complete(bytes(key.data)):
                key.data.clear()
                done += 1
                key.fileobj.send(request(places.randrange(pages) * PAGE_BYTES))
        now_s = time.monotonic()
    return done / (now_s - began_s)


def main() -> None:
    """One figure on stdout."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.bare", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--pages", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    print(iops(options.port, options.depth, options.pages, options.seconds))  # noqa: T201


if __name__ == "__main__":
    main()
