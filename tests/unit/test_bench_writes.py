"""What the benchmark of writes makes of fio's answer and of a device's counts, and what it may write to."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bench import fio, writes
from bench.fio import BenchError, FioJob, parse
from bench.inside import SECTIONS
from bench.plan import Plan
from bench.targets import MIB, Tierblk, make_image, read_all, write_all

NONE = {"total_ios": 0, "iops": 0.0, "bw_bytes": 0, "lat_ns": {"mean": 0.0}}
SOME = {
    "total_ios": 617,
    "iops": 1234.5,
    "bw_bytes": 5_000_000,
    "lat_ns": {"mean": 25_300.0, "percentile": {"99.000000": 81_000}},
}


def _fio(**jobs: dict[str, Any]) -> str:
    return json.dumps({"jobs": [{"jobname": name, "error": 0, **job} for name, job in jobs.items()]})


# -- fio ---


def test_a_job_says_what_it_wrote_or_what_it_read() -> None:
    jobs = parse(_fio(writes={"read": NONE, "write": SOME}, hits={"read": SOME, "write": NONE}))
    assert jobs["writes"] == jobs["hits"] == FioJob(617, 1234.5, 5_000_000, 25.3, 81.0)


def test_a_job_that_did_nothing_did_nothing() -> None:
    assert parse(_fio(writes={"read": NONE, "write": NONE}))["writes"].requests == 0


@pytest.mark.parametrize("allowed", [False, True])
def test_fio_writes_only_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, _fio(writes={"read": NONE, "write": SOME}), "")

    monkeypatch.setattr(subprocess, "run", run)
    fio.run("writes", writes=allowed, file="/dev/null")
    assert ("--readonly" in commands[0]) is not allowed


# -- targets ---


@pytest.mark.parametrize(
    ("url", "volume", "tables"),
    [
        ("http://host/image", "", {"device", "cache", "base"}),
        (None, "32MiB", {"device", "cache", "volume"}),
        ("http://host/image", "32MiB", {"device", "cache", "base", "volume"}),
    ],
)
def test_a_device_has_the_layers_it_is_told(
    tmp_path: Path, url: str | None, volume: str, tables: set[str]
) -> None:
    Tierblk(tmp_path / "home", tmp_path / "cache", url, 64, volume=volume, queue_depth=16)
    config = tomllib.loads((tmp_path / "home" / "tierblk.toml").read_text())
    assert config.keys() == tables
    assert config["device"] == {"name": "bench", "queue_depth": 16}
    assert config.get("volume", {"mode": "local", "size": volume}) == {"mode": "local", "size": volume}


def test_a_device_is_written_as_an_image_is(tmp_path: Path) -> None:
    image, device = tmp_path / "image", tmp_path / "device"
    make_image(image, 3 * MIB)
    device.write_bytes(bytes(3 * MIB))
    expected = hashlib.sha256(image.read_bytes()).hexdigest()
    assert write_all(str(device), 3 * MIB) == read_all(str(device)) == expected


# -- what was counted ---


def _status(**grown: int) -> dict[str, Any]:
    zeros = dict.fromkeys(("requests", "errors", *writes.COUNTED), 0)
    return {**zeros, "name": "bench", **grown}


def test_counts_are_what_grew() -> None:
    found = writes.counts(
        _status(requests=10, flush_records=7), _status(requests=30, enters=5, flush_records=9)
    )
    assert (found["requests"], found["enters_per_request"], found["flush_records"]) == (20, 0.25, 2)
    assert "errors" not in found
    assert writes.counts(_status(), _status())["enters_per_request"] == 0


def test_a_write_that_failed_is_no_figure() -> None:
    with pytest.raises(BenchError, match="2 requests failed"):
        writes.counts(_status(errors=1), _status(errors=3))


@pytest.mark.parametrize("plan", [Plan(), Plan.quick()])
def test_there_is_room_to_write_beside_what_is_hit(plan: Plan) -> None:
    assert plan.write_mib >= 2 * plan.hit_mib


def test_writes_are_sections() -> None:
    assert {"writes-tmpfs", "writes-disk"} <= set(SECTIONS)
