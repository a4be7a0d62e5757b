"""Inside the VM: reports to the host, the module, a web server, the CLI, and nothing left behind after a
test.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.helpers import (
    Tierblk,
    WebServer,
    clean_up,
    left_behind,
    wait_until,
    write_image,
)

WORDS_LENGTH_MAX = 20_000
LEFT_BEHIND_LIMIT_S = 30.0


def _tell_host(note: dict[str, Any]) -> None:
    """One line of JSON on the second serial line, which tests/vm/suite.py on the host reads."""
    path = os.environ.get("TIERBLK_VM_NOTES")
    if path:
        with open(path, "w") as line:
            line.write(json.dumps(note) + "\n")


def pytest_runtest_logstart(nodeid: str, location: object) -> None:
    """A test begins: if the VM dies in it, the host knows in which."""
    _tell_host({"began": nodeid})


_seconds: dict[str, float] = {}
_failures: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Set-up, call and tear-down are one verdict, told after the tear-down. A skip is a failure: we own this
    VM.
    """
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration
    if report.outcome != "passed":
        words = "\n".join(
            [f"in {report.when}:", str(report.longrepr), *(text for _, text in report.sections)]
        )
        _failures.setdefault(report.nodeid, []).append(words[-WORDS_LENGTH_MAX:])
    if report.when == "teardown":
        failures = _failures.get(report.nodeid, [])
        note = {
            "test": report.nodeid,
            "outcome": "failed" if failures else "passed",
            "words": "\n".join(failures),
        }
        _tell_host({**note, "seconds": round(_seconds[report.nodeid], 2)})


@pytest.fixture(scope="session", autouse=True)
def ublk_module() -> Path:
    """The driver is loaded; returns its control node."""
    subprocess.run(["modprobe", "ublk_drv"], check=True)
    control = Path("/dev/ublk-control")
    wait_until(control.exists, 10, "no /dev/ublk-control after modprobe ublk_drv")
    return control


@pytest.fixture(autouse=True)
def nothing_left_behind(ublk_module: Path) -> Iterator[None]:
    """After each test: no ublk device, no process in D state, no daemon. What is left fails the test, then
    is taken away.
    """
    yield
    try:
        wait_until(
            lambda: not left_behind(), LEFT_BEHIND_LIMIT_S, lambda: f"left behind: {'; '.join(left_behind())}"
        )
    finally:
        clean_up()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """nginx on loopback serving /srv (on the scratch disk), with a log of every request."""
    server = WebServer(Path("/srv"), tmp_path / "nginx")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def scratch(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty folder of this test on a real ext4 (the scratch disk); gone afterwards."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:60]
    folder = Path("/cache") / name
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture
def make_image() -> Iterator[Callable[..., Path]]:
    """Makes an image in /srv: make_image("name.raw", size_bytes, seed=1) -> path; its bytes follow from the
    seed.
    """
    made: list[Path] = []

    def make(name: str, size_bytes: int, seed: int = 1) -> Path:
        path = Path("/srv") / name
        write_image(path, size_bytes, seed)
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def tierblk(tmp_path: Path) -> Iterator[Tierblk]:
    """The command line as a user runs it; its daemons are stopped after the test."""
    command = Tierblk(tmp_path / "configs")
    yield command
    command.stop_all()
