"""A fault server beside a test, in a process of its own: it does not share the loop, or the core, with what
it serves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.control import Control

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_S = 10.0


@dataclass
class FaultProcess:
    """Where it listens, and the way to change it."""

    url: str
    control: Control
    pid: int


@contextmanager
def fault_process(image: Path, *options: str) -> Iterator[FaultProcess]:
    """options: those of `python3 -m tests.faults`. Raises RuntimeError when it does not start."""
    command = [sys.executable, "-m", "tests.faults", "--image", str(image), "--control", "0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()  # it says where it listens, or ends
            if len(line) != 3:
                raise RuntimeError(f"the fault server ended with {process.wait(STOP_S)}")
            with Control(line[2]) as control:
                yield FaultProcess(line[0], control, process.pid)
        finally:
            process.terminate()
            process.wait(STOP_S)
