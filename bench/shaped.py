"""A web server over a slow link (bench/server.py), as a process of its own, and what it was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.asked import Get
from bench.fio import BenchError
from bench.process import running, wait_until
from bench.server import MadeUp


def parse(lines: list[str]) -> list[Get]:
    """The server's log; what has no answer yet is left out."""
    found = []
    for line in lines:
        if line == "+":
            continue
        offset, sent, at = line.split()
        found.append(Get(int(offset), int(sent), float(at)))
    return found


class Shaped:
    """`url` is the image's; `log` is what was asked for since `forget`."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/image.raw"
        self._log = log
        self._forgotten = 0

    def forget(self) -> None:
        self._forgotten = len(self._settled())

    def log(self) -> list[Get]:
        """Every request; waits until the server has noticed the end of each."""
        return parse(self._settled()[self._forgotten :])

    def _settled(self) -> list[str]:
        lines: list[str] = []

        def settled() -> bool:
            nonlocal lines
            lines = self._log.read_text().splitlines()
            return 2 * lines.count("+") == len(lines)

        wait_until(settled, "the server is done with all requests")
        return lines


@contextmanager
def shaped(
    home: Path, image: Path | MadeUp, *, latency_s: float = 0, bytes_per_s: float = 0
) -> Iterator[Shaped]:
    """Serves the file, or what is made up: every answer begins after `latency_s`, all of them
    share `bytes_per_s` (0: no limit). `home`: a folder for its notes. Raises BenchError."""
    log, said = home / "asked", home / "server.out"
    said.unlink(missing_ok=True)
    what = [str(image)]
    if isinstance(image, MadeUp):
        what = [f"--made-up-bytes={image.size_bytes}", f"--zero-bytes={image.zero_bytes}"]
    words = [sys.executable, "-m", "bench.server", *what, "--log", str(log)]
    words += ["--latency-s", str(latency_s), "--bytes-per-s", str(bytes_per_s)]
    with running(words, said) as process:
        wait_until(
            lambda: process.poll() is not None or said.read_text().endswith("\n"), "the server listens"
        )
        first = said.read_text().splitlines()[0]
        if not first.isdigit():
            raise BenchError(f"the server ended: {said.read_text()[-300:]}")
        yield Shaped(int(first), log)
