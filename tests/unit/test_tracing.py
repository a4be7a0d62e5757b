"""What a client gets of a trace: filters, lines, what is lost, ends; and that a slow one holds up nobody."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_daemon import FakeDaemon
from tierblk import config, control
from tierblk.claim import Wishes
from tierblk.core import Traced, ticks_now
from tierblk.errors import DaemonError, DeviceError
from tierblk.latency import LATENCY_BUCKETS, bucket_of, lower_bound_ticks
from tierblk.rundir import RUN_DIR_VARIABLE, socket_address
from tierblk.tracing import BATCH, Reader, Readers, Wanted, document

LIMIT_S = 20.0
READ = Traced(1000, 250, 65536, 4096, 0, 0, 1, 0, False, 0)


class Source:
    """Gives READ again and again, `count` times; the reads at `lossy` have lost 5 before."""

    def __init__(self, count: int, lossy: tuple[int, ...] = ()) -> None:
        self.left, self.lossy, self.reads, self.closed = count, lossy, 0, 0

    def read(self, records_max: int) -> tuple[list[Traced], int]:
        self.reads += 1
        now = min(records_max, self.left)
        self.left -= now
        return [READ._replace(began=ticks_now())] * now, 5 if self.reads in self.lossy else 0

    def close(self) -> None:
        self.closed += 1


class Door:
    """Knows what it was asked for."""

    def __init__(self, source: Source | OSError) -> None:
        self.source, self.wanted = source, dict[str, Any]()

    def trace(self, **wanted: Any) -> Source:
        self.wanted = wanted
        if isinstance(self.source, OSError):
            raise self.source
        return self.source


def readers(source: Source | OSError) -> tuple[Readers, Door]:
    made, door = Readers(lambda: 1e-6), Door(source)
    made.begin(door)
    return made, door


async def lines_of(reader: Reader) -> list[dict[str, Any]]:
    """All that come until its end."""
    async with asyncio.timeout(LIMIT_S):
        text = b"".join([piece async for piece in reader.chunks()])
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.split(b"\n") if line]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"tier": "warm"}, "there is no tier 'warm'"),
        ({"tier": ""}, "there is no tier ''"),
        ({"op": "read,"}, "there is no op ''"),
        ({"op": "None"}, "there is no op 'None'"),
        ({"limit": "0"}, "limit must be a whole number from 1 on, not '0'"),
        ({"limit": "+1"}, "limit must be a whole number"),
        ({"limit": "1_0"}, "limit must be a whole number"),
        ({"limit": "٣"}, "limit must be a whole number"),
        ({"limit": "9" * 5000}, "limit must be a whole number"),
        ({"min_latency_us": "-1"}, "min_latency_us must be a whole number from 0 on"),
        ({"offset_bytes": "0"}, "offset_bytes and length_bytes belong together"),
        ({"length_bytes": "1"}, "offset_bytes and length_bytes belong together"),
        ({"offset_bytes": "0", "length_bytes": "0"}, "length_bytes must be a whole number from 1 on"),
        ({"offset_bytes": str(2**63), "length_bytes": "1"}, "offset_bytes must be a whole number"),
    ],
)
def test_wrong_parameters_are_named(query: dict[str, str], message: str) -> None:
    with pytest.raises(DaemonError) as caught:
        Wanted.parse(query)
    assert caught.value.message.startswith(message)


async def test_what_is_wanted_reaches_the_core() -> None:
    made, door = readers(Source(0))
    most = str(2**63 - 1)
    made.open(Wanted.parse({"op": "write,discard", "tier": "zero", "min_latency_us": "300"}))
    assert door.wanted == {"ops": 0b1010, "tiers": 0b10, "min_ticks": 300, "within": None}
    made.open(Wanted.parse({"offset_bytes": most, "length_bytes": most, "min_latency_us": most}))
    assert door.wanted == {
        "ops": 2**32 - 1,
        "tiers": 2**32 - 1,
        "min_ticks": 2**63,
        "within": (2**63 - 1, 2**64 - 2),
    }


def test_a_record_is_in_words() -> None:
    flush = Traced(5000, 1500, 0, 0, 2, 5, 9, 0, False, 1)
    assert document(flush, tick_s=1e-6, now_ticks=15_000, now_s=100.0) == {
        "time": 99.99,
        "op": "flush",
        "offset_bytes": 0,
        "length_bytes": 0,
        "tier": "flush",
        "latency_us": 1500.0,
        "error": None,
        "fua": False,
        "queue": 1,
        "tag": 9,
    }
    strange = document(Traced(0, 1, 0, 0, 7, 6, 0, 9999, True, 0), tick_s=1e-6, now_ticks=0, now_s=0)
    assert (strange["op"], strange["tier"], strange["error"]) == ("other", None, "9999")


def test_a_latency_counts_where_the_core_counts_it() -> None:
    for bucket in range(LATENCY_BUCKETS):
        assert bucket_of(lower_bound_ticks(bucket)) == bucket
        assert bucket_of(lower_bound_ticks(bucket + 1) - 1) == bucket


async def test_so_many_and_no_more() -> None:
    source = Source(10**6, lossy=(1, 2))
    made, _ = readers(source)
    found = await lines_of(made.open(Wanted(limit=BATCH + 1)))
    assert found[0] == found[BATCH + 1] == {"lost": 5}
    assert sum("op" in each for each in found) == BATCH + 1
    assert found[-1] == {"end": "limit"}
    assert source.closed == 0  # by whoever opened it


@pytest.mark.parametrize("left", [0, 3, BATCH, BATCH + 1, 5 * BATCH])
async def test_a_device_that_goes_gives_what_is_there_or_says_what_is_lost(left: int) -> None:
    source = Source(left)
    made, _ = readers(source)
    reader, other = made.open(Wanted()), made.open(Wanted())
    other.close()
    made.end("detached")
    assert source.closed == 2
    found = await lines_of(reader)
    assert found[-1] == {"end": "detached"}
    assert sum("op" in each or each.get("lost", 0) for each in found) == left
    assert sum("op" in each for each in found) == min(left, BATCH)
    with pytest.raises(DeviceError, match="nobody serves"):
        made.open(Wanted())


async def test_one_who_waits_is_told_of_the_end_at_once_and_only_once() -> None:
    made, _ = readers(Source(0))
    reading = asyncio.ensure_future(lines_of(made.open(Wanted())))
    await asyncio.sleep(0)
    made.end("stopping")
    made.end("detached")
    assert await reading == [{"end": "stopping"}]


async def test_an_idle_device_says_that_it_lives() -> None:
    made, _ = readers(Source(0))
    pieces = made.open(Wanted()).chunks()
    async with asyncio.timeout(LIMIT_S):
        assert [await anext(pieces) for _ in range(2)] == [b"\n", b"\n"]
    await pieces.aclose()  # type: ignore[attr-defined]


async def test_no_memory_for_it() -> None:
    made, _ = readers(OSError(12, "cannot trace requests"))
    with pytest.raises(DeviceError, match="cannot trace requests"):
        made.open(Wanted())


class Api(FakeDaemon):
    """With one device that has more requests than anybody can take."""

    def __init__(self, settings: config.Config) -> None:
        super().__init__(settings)
        self.source = Source(10**12)

    def trace(self, name: str, wanted: Wanted) -> Reader:
        if name not in self.readers:
            self.readers[name], _ = readers(self.source)
        return self.readers[name].open(wanted)


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[control.ControlServer]:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    settings = config.parse(
        {
            "device": {"name": "a"},
            "base": {"url": "http://h/x"},
            "cache": {"dir": str(tmp_path / "cache"), "size": "16MiB"},
        },
        tmp_path / "a.toml",
    )
    api = Api(settings)
    await api.attach(settings, Wishes())
    server = control.ControlServer(api, tmp_path / "run" / "x")
    await server.start()
    yield server
    await server.close()


async def connected(server: control.ControlServer, query: str = "", method: str = "GET") -> Any:
    """(reader, writer) of a client that has asked."""
    with socket_address(server.run_dir) as address:
        reader, writer = await asyncio.open_unix_connection(address, limit=4096)
    writer.write(f"{method} /v1/devices/a/trace{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return reader, writer


async def until(holds: Any) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


async def test_a_client_that_takes_nothing_is_not_read_for_and_one_that_hangs_up_ends_it(
    server: control.ControlServer,
) -> None:
    source: Source = server.api.source  # type: ignore[attr-defined]
    _, writer = await connected(server)
    history: list[int] = []

    def stands_still() -> bool:
        history.append(source.reads)
        return len(history) > 50 and history[-50] == history[-1] > 0

    await until(stands_still)
    assert source.reads < 100  # a record is some 200 bytes, and sockets keep some hundreds of KiB
    assert source.closed == 0
    writer.close()
    await until(lambda: source.closed == 1)


async def test_a_parameter_that_is_there_twice(server: control.ControlServer) -> None:
    reader, writer = await connected(server, "?tier=hit&tier=miss")
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()


async def test_only_the_head_of_it_cannot_be_asked_for(server: control.ControlServer) -> None:
    reader, writer = await connected(server, method="HEAD")
    assert (await reader.readline()).startswith(b"HTTP/1.1 405")
    writer.close()


async def test_a_stop_does_not_wait_for_a_client_that_takes_nothing(server: control.ControlServer) -> None:
    _, writer = await connected(server)
    source: Source = server.api.source  # type: ignore[attr-defined]
    await until(lambda: source.reads > 1)
    async with asyncio.timeout(LIMIT_S):
        await server.close()
    assert source.closed == 1
    writer.close()
