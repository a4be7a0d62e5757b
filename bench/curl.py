"""curl, the peer of every miss: what it takes to have the same bytes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fio import BenchError


@dataclass(frozen=True)
class Spent:
    """What a download took: seconds, and CPU-seconds of who did it."""

    took_s: float
    cpu_s: float


def curl(url: str, file: Path) -> Spent:
    """`curl -o FILE URL`. Raises BenchError."""
    return _timed(["-f", "-o", str(file), url])


def curl_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> Spent:
    """One curl that fetches (offset, length) pieces one after the other over one connection, and keeps
    nothing. Raises BenchError."""
    jobs = [
        f'url = "{url}"\nrange = "{offset}-{offset + length - 1}"\noutput = "/dev/null"\nfail\n'
        for offset, length in ranges
    ]
    return _timed(["-K", "-"], "next\n".join(jobs))


def _timed(words: list[str], said: str = "") -> Spent:
    """`said`: on its stdin."""
    began_s = time.monotonic()
    process = subprocess.Popen(["curl", "-sS", *words], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(said)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"curl ended with status {process.returncode}")
    return Spent(time.monotonic() - began_s, usage.ru_utime + usage.ru_stime)
