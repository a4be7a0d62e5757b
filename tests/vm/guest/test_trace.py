"""`tierblk trace` of a device of the kernel's: every request that the driver brought is there once, with the
tier that served it."""

from __future__ import annotations

import fcntl
import os
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.vm.guest.device_rig import KIB, MIB, read, wait_for_status
from tests.vm.guest.helpers import RunningCommand, Tierblk, WebServer, on_newest, run, wait_until
from tests.vm.guest.test_device_planes import PLANES
from tests.vm.guest.test_device_writes import Direct

BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
LIMIT_S = 60.0
COUNTERS = ("requests", "hit_requests", "zero_requests", "miss_requests", "write_requests", "flush_requests")


class Line(NamedTuple):
    """What a line says, in its words."""

    op: str
    offset: str
    tier: str
    error: str


def _parsed(text: str) -> list[Line]:
    found = []
    for line in text.splitlines()[1:]:
        assert "lost" not in line
        assert len(line) <= 80
        _, op, offset, length, *rest = line.split()
        tier, latency, unit, *error = rest[length != "-" :]
        assert float(latency) > 0
        assert unit in ("us", "ms", "s")
        found.append(Line(op, offset, tier, error[0] if error else ""))
    return found


def _begun(tierblk: Tierblk, *words: str) -> RunningCommand:
    """From its first line on everything is recorded."""
    command = tierblk.begin("trace", *words)
    wait_until(lambda: command.said, LIMIT_S, "no trace begins")
    return command


def _cold(device: Path) -> None:
    for at in (1 * MIB, 2 * MIB):
        read(device, at, 4 * KIB)


def _work(device: Path) -> None:
    """Reads of what is warm, also of a sector; writes whole and in part, a flush, a discard, zeros."""
    for at in (1 * MIB, 2 * MIB, 2 * MIB + 512):
        read(device, at, 4 * KIB if at % KIB == 0 else 512)
    direct = Direct(device)
    direct.write(3 * MIB, b"w" * 64 * KIB)
    direct.write(4 * MIB + 512, b"p" * 1024)
    direct.sync()
    assert direct.read(3 * MIB, 4 * KIB) == b"w" * 4 * KIB
    direct.close()
    fd = os.open(device, os.O_RDWR)
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", 5 * MIB, MIB))
    fcntl.ioctl(fd, BLKZEROOUT, struct.pack("=QQ", 7 * MIB + 512, 4 * KIB))
    os.close(fd)
    assert read(device, 5 * MIB, 4 * KIB) == bytes(4 * KIB)


def _settled(tierblk: Tierblk) -> bool:
    """Who reads what is on its way to the cache waits for that, and counts as a miss."""
    (daemon,) = tierblk.json("status")["daemons"]
    return bool(daemon["fills"] == 0)


@pytest.mark.parametrize("plane", PLANES)
def test_every_request_is_there_once_with_the_tier_that_served_it(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path], plane: str
) -> None:
    image = make_image("traced.raw", 8 * MIB, seed=71)
    config = tierblk.config(
        "traced",
        web.url_of(image),
        scratch / "cache",
        "32MiB",
        volume__mode="local",
        device__plane=plane,
        remote__readahead=False,
    )
    device = tierblk.attach(config)
    read(device, 0, 4 * KIB)  # what the kernel looks for in a new device is over
    before = wait_for_status(tierblk, "traced", lambda now: now["waiting"] == 0)
    trace = _begun(tierblk, "traced")
    _cold(device)
    wait_until(partial(_settled, tierblk), LIMIT_S, "what was missed does not come into the cache")
    _work(device)
    after = tierblk.status("traced")
    more = {key: after[key] - before[key] for key in COUNTERS}
    wait_until(lambda: len(_parsed(trace.said)) >= more["requests"], LIMIT_S, lambda: f"{more}: {trace.said}")
    run("sync")
    tierblk.run("detach", "traced")
    answer = trace.finish(LIMIT_S)
    assert answer.returncode == 0
    assert "traced was detached" in answer.stderr
    lines = _parsed(answer.stdout)[: more["requests"]]
    tiers = Counter(line.tier for line in lines)
    for tier in ("hit", "zero", "miss", "write", "flush"):
        assert tiers[tier] == more[f"{tier}_requests"], f"{tier}: {more} {answer.stdout}"
    assert not [line for line in lines if line.error]
    reads = [(line.offset, line.tier) for line in lines if line.op == "read"]
    first, second, odd = str(MIB), str(2 * MIB), str(2 * MIB + 512)
    cold, warm = [(first, "miss"), (second, "miss")], [(first, "hit"), (second, "hit"), (odd, "hit")]
    assert reads[:5] == cold + warm
    assert (str(3 * MIB), "hit") in reads[5:]
    assert (str(5 * MIB), "zero") in reads[5:]
    writes = [line.offset for line in lines if line.op == "write"]
    assert writes == [str(3 * MIB), str(4 * MIB + 512)]
    assert Counter(line.op for line in lines)["flush"] >= 1
    assert [line.offset for line in lines if line.op == "discard"] == [str(5 * MIB)]
    assert [line.offset for line in lines if line.op == "zeroes"] == [str(7 * MIB + 512)]


@on_newest
def test_only_misses_and_errors_of_a_server_that_is_gone(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Filters on a device under load; and a stop of the daemon ends the trace with a word."""
    image = make_image("gone.raw", 8 * MIB, seed=72)
    config = tierblk.config(
        "gone",
        web.url_of(image),
        scratch / "cache",
        "32MiB",
        device__on_outage="fail",
        remote__retries=1,
        remote__retry_delay="50ms",
    )
    device = tierblk.attach(config)
    read(device, 0, 4 * KIB)
    trace = _begun(tierblk, "gone", "--tier", "miss", "--range", "4MiB+4MiB")
    web.stop()
    for _ in range(300):
        read(device, 0, 4 * KIB)
    with pytest.raises(OSError, match="Input/output error"):
        read(device, 6 * MIB, 4 * KIB)
    wait_until(lambda: _parsed(trace.said), LIMIT_S, "the miss is not shown")
    tierblk.run("stop")
    answer = trace.finish(LIMIT_S)
    assert _parsed(answer.stdout)[0] == Line("read", str(6 * MIB), "miss", "EIO")
    assert {line.tier for line in _parsed(answer.stdout)} == {"miss"}
    assert answer.returncode == 8
    assert "was stopped" in answer.stderr
