"""`tierblk trace` as users run it, and the control interface's side of it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from tests.unit.cli_harness import Cli, cli  # noqa: F401

LIMIT_S = 20.0
LINE = re.compile(
    r"\d\d:\d\d:\d\d\.\d{6}  (\w+) +(\S+)  +(\S+(?: [KMG]?i?B)?) +(\S+) +(\S+ (?:us|ms|s))(?:  (\w+))?"
)


@pytest.fixture
def traced(cli: Cli) -> Cli:  # noqa: F811
    """With a device "a", see fake_daemon.TRACED."""
    assert cli("attach", cli.config("a")).code == 0
    return cli


def begun(process: subprocess.Popen[str]) -> None:
    """Returns when the first requests were shown."""
    assert process.stdout is not None
    fd, text = process.stdout.fileno(), b""
    while b"lost" not in text:
        assert select.select([fd], [], [], LIMIT_S)[0], text
        text += os.read(fd, 4096)


def test_a_line_for_each_request_and_the_summary_apart(traced: Cli) -> None:
    result = traced("trace", "a", "--count", "12")
    assert result.code == 0
    header, lost, *lines = result.out.splitlines()
    assert header.split() == ["time", "op", "offset", "length", "tier", "latency", "error"]
    assert lost == "... 7 more were lost"
    assert all(len(line) <= 80 for line in [header, *lines])
    found = [match.groups() for line in lines if (match := LINE.fullmatch(line))]
    assert len(found) == len(lines) == 12
    assert sorted(found)[0] == ("discard", "1048576", "1 GiB", "-", "44 us", None)
    assert ("read", "16492674416640", "1.5 KiB", "miss", "3.1 s", "EIO") in found
    assert ("read", "1073741824", "64 KiB", "miss", "21.5 ms", None) in found
    assert ("write", "4096", "512 B", "write", "150 us", None) in found
    assert ("flush", "-", "-", "flush", "1.25 ms", None) in found
    assert "\x1b" not in result.out
    assert re.fullmatch(r"hit +6 +24 KiB +\d\d(\.\d)? us +85 us +85 us +85 us", result.err.splitlines()[1])
    table = [line.split("  ") for line in result.err.splitlines()]
    assert table[0][0] == "tier"
    assert [row[0].strip() for row in table[1:-1]] == ["hit", "miss", "zero", "discard", "write", "flush"]
    assert result.err.splitlines()[-1] == "12 requests, 1 with an error, 7 more were lost"


@pytest.mark.parametrize(
    ("options", "tiers"),
    [
        (("--tier", "miss", "--count", "2"), ["miss"] * 2),
        (("--tier", "miss", "--tier", "zero", "--count", "3"), ["zero", "miss", "miss"]),
        (("--op", "flush", "--count", "1"), ["flush"]),
        (("--slower", "10ms", "--count", "2"), ["miss"] * 2),
        (("--slower", "1250us", "--count", "3"), ["flush", "miss", "miss"]),
        (("--range", "1GiB+64KiB", "--count", "1"), ["miss"]),
        (("--range", "65536+131072", "--op", "read", "--count", "2"), ["hit", "hit"]),
    ],
)
def test_what_is_not_wanted_is_not_sent(traced: Cli, options: tuple[str, ...], tiers: list[str]) -> None:
    """More than the count would come if it were."""
    result = traced("trace", "a", "--json", *options)
    lost, *found = [json.loads(line) for line in result.out.splitlines()]
    assert lost == {"lost": 7}
    assert [each["tier"] for each in found] == tiers


def test_json_has_everything(traced: Cli) -> None:
    result = traced("trace", "a", "--json", "--op", "write", "--count", "1")
    _, write = [json.loads(line) for line in result.out.splitlines()]
    assert abs(write.pop("time") - time.time()) < 60
    assert write == {
        "op": "write",
        "offset_bytes": 4096,
        "length_bytes": 512,
        "tier": "write",
        "latency_us": 150.0,
        "error": None,
        "fua": True,
        "queue": 0,
        "tag": 3,
    }


def test_the_summary_alone(traced: Cli) -> None:
    result = traced("trace", "a", "--summary", "--count", "12")
    assert result.out.splitlines()[-1] == "12 requests, 1 with an error, 7 more were lost"
    assert result.err == ""
    shown = traced("trace", "a", "--summary", "--count", "12", "--json").json
    assert (shown["requests"], shown["errors"], shown["lost"]) == (12, 1, 7)
    assert shown["tiers"]["hit"]["requests"] == 6
    assert 80 <= shown["tiers"]["hit"]["p50_us"] <= 100
    assert shown["tiers"]["hit"]["max_us"] == 85
    assert shown["tiers"]["discard"]["bytes"] == 1 << 30


def test_it_ends_when_the_time_is_over(traced: Cli) -> None:
    result = traced("trace", "a", "--duration", "300ms")
    assert result.code == 0
    assert len(result.out.splitlines()) == 14


def test_ctrl_c_is_its_usual_end(traced: Cli) -> None:
    process = traced.popen("trace", "a", "--tier", "flush")
    begun(process)
    process.send_signal(signal.SIGINT)
    result = traced.finish(process)
    assert result.code == 0
    assert result.err.splitlines()[-1] == "1 requests, 7 more were lost"


def test_a_reader_that_went_away(traced: Cli) -> None:
    process = traced.popen("trace", "a")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(LIMIT_S) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_the_device_goes(traced: Cli) -> None:
    process = traced.popen("trace", "a")
    begun(process)
    assert traced("detach", "a").code == 0
    result = traced.finish(process)
    assert result.code == 0
    assert result.err.splitlines()[0] == "tierblk: a was detached"


def test_the_daemon_stops(traced: Cli) -> None:
    process = traced.popen("trace", "a")
    begun(process)
    assert traced("stop").code == 0
    result = traced.finish(process)
    assert result.code == 8
    assert "tierblk: the daemon of " in result.err
    assert " was stopped\n" in result.err


def test_the_daemon_is_killed(traced: Cli) -> None:
    process = traced.popen("trace", "a")
    begun(process)
    traced.kill_daemons()
    result = traced.finish(process)
    assert result.code == 8
    assert "broke off" in result.err


def test_the_daemon_hangs(traced: Cli) -> None:
    process = traced.popen("trace", "a", "--timeout", "2s")
    begun(process)
    pid = traced.daemon_info()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        result = traced.finish(process)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert result.code == 8
    assert "has not answered for 2 s" in result.err


def test_no_such_device(traced: Cli) -> None:
    result = traced("trace", "b")
    assert (result.code, result.out) == (7, "")
    assert 'there is no device called "b"' in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tier", "warm"), "invalid choice"),
        (("--op", "trim"), "invalid choice"),
        (("--slower", "10"), "a duration is a number with a unit"),
        (("--slower", "xus"), "a duration is a number with a unit"),
        (("--range", "4096"), "a range is OFFSET+LENGTH"),
        (("--range", "4096+0"), "a range has at least one byte"),
        (("--range", "0+8192PiB"), "ends below 8 EiB"),
        (("--range", "1+x"), "a size is a number"),
        (("--count", "0"), "must be a whole number from 1 on"),
        (("--count", "-1"), "must be a whole number from 1 on"),
        (("--duration", "0s"), "must be more than 0s"),
    ],
)
def test_wrong_usage(cli: Cli, options: tuple[str, ...], message: str) -> None:  # noqa: F811
    result = cli("trace", "a", *options)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("no_colour", [False, True])
def test_colours_on_a_terminal_only(traced: Cli, no_colour: bool) -> None:
    ours, theirs = pty.openpty()
    env = {"TERM": "xterm", **({"NO_COLOR": "1"} if no_colour else {})}
    process = traced.popen("trace", "a", "--tier", "miss", "--count", "2", stdout=theirs, env=env)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # EIO: it has ended
        while piece := os.read(ours, 4096):
            text += piece
    os.close(ours)
    assert traced.finish(process).code == 0
    assert (b"\x1b[33m" in text) is not no_colour
    assert (b"\x1b[31m" in text) is not no_colour
