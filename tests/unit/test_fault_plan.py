"""Which request gets which fault, how often bytes went out, and the fault server as a process of its own."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import CONNECTION_FAULTS, REQUEST_FAULTS, FaultServer, Plan, coverage
from tests.faults import __doc__ as table
from tests.faults.content import Content
from tests.faults.control import ControlServer
from tests.faults.process import fault_process

CONTENT = random.Random(3).randbytes(300_000)
FIRST, COUNT = 4096, 100_000
RIGHT = CONTENT[FIRST : FIRST + COUNT]
DEADLINE_S = 10.0
ETAG = Content(CONTENT).etag


# -- plans ---


def test_the_table_names_every_fault() -> None:
    assert table is not None
    begins = [line.split()[0] for line in table.splitlines() if line.startswith("    ") and line.strip()]
    assert [name for name in begins if name in REQUEST_FAULTS] == list(REQUEST_FAULTS)
    assert [name for name in begins if name in CONNECTION_FAULTS] == list(CONNECTION_FAULTS)


def test_a_decision_depends_on_seed_and_number_only() -> None:
    text = "truncate=0.2,stall=0.1:5,busy=0.1,mute=0.3"
    one, other = Plan.parse(text, 7), Plan.parse(text, 7)
    ahead = [one.request(n) for n in range(300)]
    back = [other.request(n) for n in reversed(range(300))][::-1]
    assert [d.name for d in ahead] == [d.name for d in back]
    assert [d.rng.random() for d in ahead] == [d.rng.random() for d in back]
    assert {d.name for d in ahead} == {"truncate", "stall", "busy", None}
    assert {d.value for d in ahead if d.name == "stall"} == {5.0}
    assert {one.connection(n).name for n in range(50)} == {"mute", None}
    assert [d.name for d in ahead] != [Plan.parse(text, 8).request(n).name for n in range(300)]


def test_what_a_plan_leaves_alone_stays_where_it_was() -> None:
    """A cut is at the same place whether or not other faults are in the plan."""
    alone, mixed = Plan.parse("stall"), Plan.parse("truncate=0.5,stall=0.5")
    assert [alone.request(n).rng.random() for n in range(20)] == [
        mixed.request(n).rng.random() for n in range(20)
    ]


def test_healthy_requests_come_first() -> None:
    plan = Plan.parse("reset", 1, healthy_requests=3)
    assert [plan.request(n).name for n in range(5)] == [None, None, None, "reset", "reset"]


def test_probabilities_are_kept() -> None:
    plan = Plan.parse("truncate=0.05,error=0.2,hangup=0.5", 1)
    names = [plan.request(n).name for n in range(4000)]
    for fault in plan.faults:
        assert abs(names.count(fault.name) / 4000 - fault.probability) < 0.03


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truncat=1", "'truncat' is no fault; there are truncate, whole"),
        ("truncate=2", "not between 0 and 1"),
        ("truncate=-1", "not between 0 and 1"),
        ("truncate=nan", "not between 0 and 1"),
        ("truncate=x", "is not NAME, NAME=PROBABILITY"),
        ("stall=1:", "is not NAME"),
        ("stall=1:0", "not above 0"),
        ("truncate=0.7,stall=0.7", "add up to 1.4"),
        ("stall=0.1,stall=0.1", "named twice"),
    ],
)
def test_plans_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.parse(text)


# -- how often bytes went out ---


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=12))
def test_coverage(ranges: list[tuple[int, int]]) -> None:
    times = [sum(first <= at < first + count for first, count in ranges) for at in range(50)]
    cover = coverage(ranges, shown=50)
    assert cover.total_bytes == sum(times)
    assert cover.distinct_bytes == sum(1 for each in times if each)
    assert cover.repeated_bytes == sum(each - 1 for each in times if each)
    assert cover.most_often == max(times)
    assert {at: n for a, b, n in cover.repeated for at in range(a, b + 1)} == {
        at: n for at, n in enumerate(times) if n > 1
    }


# -- in another process ---


def test_a_process_and_its_control_channel(tmp_path: Path) -> None:
    image, port_file = tmp_path / "image", tmp_path / "port"
    image.write_bytes(CONTENT)
    options = ("--port-file", str(port_file), "--latency", "1ms", "--bandwidth", "125MB", "--seed", "7")
    with fault_process(image, *options, "--faults", "error=1:503") as server:
        control = server.control
        assert port_file.read_text().split()[0] in server.url

        def curl(*options: str) -> bytes:
            command = ["curl", "-s", "-r", f"{FIRST}-{FIRST + COUNT - 1}", *options, server.url]
            return subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE_S).stdout

        status = ("-o", "/dev/null", "-w", "%{http_code}")
        assert curl(*status) == b"503"
        control.ask("faults", faults="", seed=3)
        assert curl() == RIGHT
        control.ask("force", faults=["busy"])
        assert curl(*status) == b"429"
        stats = control.ask("stats")
        assert (stats["state"], stats["requests"], stats["faults"]) == ("up", 3, {"error": 1, "busy": 1})
        assert stats["served"]["total_bytes"] == COUNT
        log = control.ask("log", since=1)["log"]
        assert [(line["n"], line["status"], line["sent_bytes"]) for line in log] == [
            (1, 206, COUNT),
            (2, 429, 0),
        ]
        image.with_name("new").write_bytes(CONTENT[::-1])
        control.ask("replace", image=str(image.with_name("new")), etag='"two"')
        assert control.ask("stats")["etag"] == '"two"'
        assert curl("-H", f"If-Match: {ETAG}", *status) == b"412"
        for command in ("gone", "back", "blackhole", "back", "release", "expire", "forget"):
            control.ask(command)
        control.ask("shape", latency_s=0, bytes_per_s=0)
        assert curl() == CONTENT[::-1][FIRST : FIRST + COUNT]
        for wrong in ({"do": "dance"}, {"do": "faults", "faults": "x"}, {"do": "shape", "colour": 1}):
            with pytest.raises(RuntimeError):
                control.ask(**wrong)


async def test_a_control_socket(tmp_path: Path) -> None:
    async with FaultServer(CONTENT) as server:
        control = ControlServer(server)
        path = await control.start(str(tmp_path / "control"))
        command = [sys.executable, "-m", "tests.faults.control", path]
        process = await asyncio.create_subprocess_exec(*command, "stats", stdout=subprocess.PIPE)
        said, _ = await process.communicate()
        assert json.loads(said)["state"] == "up"
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'[]\n{"do": "stop"}\n')
        assert json.loads(await reader.readline())["ok"] is False
        assert json.loads(await reader.readline())["ok"] is True
        await control.done.wait()
        await control.aclose()
        writer.close()


@pytest.mark.parametrize(
    "options",
    [["--faults", "dance"], ["--latency", "fast"], ["--bandwidth", "0"], ["--faults", "stranger"]],
)
def test_bad_options_end_in_one_sentence(options: list[str], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    command = [sys.executable, "-m", "tests.faults", "--image", str(image), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
