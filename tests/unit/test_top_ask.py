"""Rounds of questions: who hangs holds nobody up."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tierblk.cli.client import Daemon, DeadSocket
from tierblk.cli.top_ask import Rounds
from tierblk.errors import DaemonError

LIMIT_S = 20.0


class Daemons:
    """Of which each answers as the test says."""

    def __init__(self) -> None:
        self.names = ["quick", "slow"]
        self.may_answer = threading.Event()
        self.asked: list[str] = []
        self.raises: dict[str, Exception] = {}
        self.says: Any = None

    def find(self, _: float) -> list[Daemon]:
        return [Daemon(Path("/run") / name, {"cache_dir": f"/cache/{name}", "pid": 5}) for name in self.names]

    def ask(self, daemon: Daemon) -> dict[str, Any]:
        name = daemon.run_dir.name
        self.asked.append(name)
        if name in self.raises:
            raise self.raises[name]
        if name == "slow":
            assert self.may_answer.wait(LIMIT_S)
        if self.says is not None:
            return self.says  # type: ignore[no-any-return]
        return {"daemon": {"cache_dir": f"/cache/{name}", "pid": 6}, "devices": []}

    def orphans(self, _: str | None) -> list[dict[str, Any]]:
        return [{"name": "left"}]


@pytest.fixture
def daemons() -> Iterator[Daemons]:
    made = Daemons()
    yield made
    made.may_answer.set()


@pytest.fixture
def rounds(daemons: Daemons) -> Iterator[Rounds]:
    made = Rounds(find=daemons.find, ask=daemons.ask, find_orphans=daemons.orphans)
    yield made
    made.end()


def test_all_are_asked_at_once(daemons: Daemons, rounds: Rounds) -> None:
    daemons.may_answer.set()
    rounds.begin()
    rounds.wait(LIMIT_S)
    answers, orphans = rounds.close()
    assert [(each.run_dir, each.cache_dir, each.pid, each.error) for each in answers] == [
        ("/run/quick", "/cache/quick", 6, ""),
        ("/run/slow", "/cache/slow", 6, ""),
    ]
    assert orphans == [{"name": "left"}]


def test_one_that_hangs_holds_nobody_up_and_may_answer_later(daemons: Daemons, rounds: Rounds) -> None:
    rounds.begin()
    while len(rounds._results) < 2:  # the quick one, and the look for orphans
        assert select.select([rounds.fd], [], [], LIMIT_S)[0]
        assert not rounds.is_complete
    answers, _ = rounds.close()
    assert [(each.sample is not None, each.error) for each in answers] == [
        (True, ""),
        (False, "its daemon (pid 5) does not answer"),
    ]
    rounds.begin()
    rounds.wait(LIMIT_S)  # complete without the slow one, who missed the last round
    assert daemons.asked == ["quick", "slow", "quick"]
    assert [each.sample is not None for each in rounds.close()[0]] == [True, False]
    daemons.may_answer.set()
    errors = [""]
    end_s = time.monotonic() + LIMIT_S
    while errors != ["", ""]:  # its thread ends at some moment behind its answer
        assert time.monotonic() < end_s, errors
        rounds.begin()
        rounds.wait(LIMIT_S)
        errors = [each.error for each in rounds.close()[0]]


def test_a_dead_socket_is_nobody(daemons: Daemons, rounds: Rounds) -> None:
    daemons.may_answer.set()
    daemons.raises["quick"] = DeadSocket("x")
    rounds.begin()
    rounds.wait(LIMIT_S)
    assert [each.cache_dir for each in rounds.close()[0]] == ["/cache/slow"]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (DaemonError("no permission to talk to it"), "no permission to talk to it"),
        (DaemonError("GET /v1/top: not found"), "is of an older version"),
        (ValueError("x"), "not understood"),
        (OSError(5, "x"), "not understood"),
    ],
)
def test_why_one_says_nothing(daemons: Daemons, rounds: Rounds, error: Exception, shown: str) -> None:
    daemons.names = ["quick"]
    daemons.raises["quick"] = error
    rounds.begin()
    rounds.wait(LIMIT_S)
    (answer,) = rounds.close()[0]
    assert answer.sample is None
    assert shown in answer.error


def test_an_answer_without_devices_is_not_understood(daemons: Daemons, rounds: Rounds) -> None:
    daemons.names, daemons.says = ["quick"], {"daemon": "x"}
    rounds.begin()
    rounds.wait(LIMIT_S)
    (answer,) = rounds.close()[0]
    assert "not understood" in answer.error


def test_only_the_daemon_of_a_cache_directory(daemons: Daemons) -> None:
    rounds = Rounds("/cache/quick", find=daemons.find, ask=daemons.ask, find_orphans=daemons.orphans)
    rounds.begin()
    rounds.wait(LIMIT_S)
    assert [each.cache_dir for each in rounds.close()[0]] == ["/cache/quick"]
    assert daemons.asked == ["quick"]
    rounds.end()


def test_a_thread_that_outlives_the_rounds_does_no_harm(daemons: Daemons) -> None:
    rounds = Rounds(find=daemons.find, ask=daemons.ask, find_orphans=daemons.orphans)
    rounds.begin()
    slow = next(thread for thread in threading.enumerate() if thread.name == "ask /run/slow")
    rounds.end()
    daemons.may_answer.set()
    slow.join(LIMIT_S)
    assert not slow.is_alive()
