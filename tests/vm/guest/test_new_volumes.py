"""Volumes where the kernel matters little: large ones, power cuts, and how scratch ones end."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.torture import databases
from tests.torture.cuts import Cuts, go
from tests.vm.guest.device_rig import MIB, DaemonProcess
from tests.vm.guest.helpers import Tierblk, run
from tests.vm.guest.test_device_writes import Direct

CUTS = 3
DATABASE_ROUNDS = int(os.environ.get("TIERBLK_DATABASE_ROUNDS", "3"))


def test_i2_what_was_flushed_is_there_after_a_power_cut(scratch: Path) -> None:
    """On a disk whose writes are logged (tests/torture/cuts.py)."""
    summary = go(Cuts(seed=3, count=CUTS, folder=scratch / "cuts"))
    assert summary["cuts"] == CUTS
    assert summary["between_marks"] > 0
    assert summary["wrong"] == []


def test_what_a_database_committed_is_there_after_every_death(scratch: Path) -> None:
    """SQLite's own promise, over ext4 (tests/torture/databases.py, which can do the same with PostgreSQL)."""
    plan = databases.Databases(seed=5, count=DATABASE_ROUNDS, folder=scratch / "databases", names=("sqlite",))
    summary = databases.go(plan)
    assert summary["wrong"] == []
    assert summary["sqlite"]["power"] == DATABASE_ROUNDS // 3


def test_a_volume_of_a_pebibyte_costs_nothing_before_it_is_written(scratch: Path, tierblk: Tierblk) -> None:
    config = tierblk.config(
        "huge", None, scratch / "cache", "64MiB", volume__mode="local", volume__size="1PiB"
    )
    tierblk.attach(
        tierblk.config("small", None, scratch / "cache", "64MiB", volume__mode="scratch", volume__size="1MiB")
    )
    status = Path(f"/proc/{DaemonProcess(scratch / 'cache').pid}/status")
    before = resident(status.read_text())
    began_s = time.monotonic()
    device = tierblk.attach(config)
    took_s = time.monotonic() - began_s
    direct = Direct(device)
    for at in (0, 2**49, 2**50 - 65536):
        direct.write(at, b"w" * 65536)
        assert direct.read(at, 65536) == b"w" * 65536
    direct.sync()
    direct.close()
    grown = resident(status.read_text()) - before
    assert grown < 12 * MIB, f"{grown / MIB:.1f} MiB for a volume of three blocks"
    assert took_s < 20, f"{took_s:.1f} s"  # an emulator on a loaded machine; a second on a processor
    tierblk.run("stop")
    device = tierblk.attach(config)
    direct = Direct(device)
    assert direct.read(2**50 - 65536, 65536) == b"w" * 65536
    direct.close()
    tierblk.run("stop")


def resident(status: str) -> int:
    """RssAnon and RssShmem, bytes."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


@pytest.mark.parametrize("tool", ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"])
def test_a_large_volume_takes_a_filesystem_in_seconds(tool: str, scratch: Path, tierblk: Tierblk) -> None:
    config = tierblk.config(
        "large", None, scratch / "cache", "512MiB", volume__mode="scratch", volume__size="1TiB"
    )
    device = tierblk.attach(config)
    began_s = time.monotonic()
    run(tool, *(["-F", "-q"] if tool == "mkfs.ext4" else ["-f", "-q"]), device)
    run("blkdiscard", "--force", device)
    took_s = time.monotonic() - began_s
    direct = Direct(device)
    assert direct.read(0, MIB) == bytes(MIB)
    direct.close()
    assert took_s < 60, f"{tool} and blkdiscard took {took_s:.1f} s"
    tierblk.run("stop")


def test_a_hand_over_keeps_a_scratch_volume(scratch: Path, tierblk: Tierblk) -> None:
    """SIGTERM leaves the device to the next daemon, and what was written to it."""
    cache = scratch / "cache"
    config = tierblk.config("handed", None, cache, "64MiB", volume__mode="scratch", volume__size="16MiB")
    device = tierblk.attach(config)
    data = random.Random(6).randbytes(MIB)
    with open(device, "r+b") as file:
        file.write(data)
        file.flush()
        daemon = DaemonProcess(cache)
        daemon.signal(signal.SIGTERM)
        daemon.ended(30)
        tierblk.attach(config)
        file.seek(0)
        assert file.read(MIB) == data
    run("blockdev", "--flushbufs", device)
    assert device.read_bytes()[:MIB] == data
    tierblk.run("stop")
    assert tierblk.attach(config).read_bytes()[:MIB] == bytes(MIB), "a stop is the end of it"
    tierblk.run("stop")


def test_a_scratch_volume_goes_with_a_device_that_dies_with_its_daemon(
    scratch: Path, tierblk: Tierblk
) -> None:
    cache = scratch / "cache"
    keys: dict[str, Any] = {"volume__mode": "scratch", "volume__size": "16MiB", "device__recovery": False}
    device = tierblk.attach(tierblk.config("dies", None, cache, "64MiB", **keys))
    device.write_bytes(b"x" * MIB)
    daemon = DaemonProcess(cache)
    daemon.signal(signal.SIGKILL)
    daemon.ended(30)
    tierblk.attach(tierblk.config("next", None, cache, "64MiB", **keys))
    (daemon_now,) = tierblk.json("status")["daemons"]
    assert [layer["name"] for layer in daemon_now["cache"]["layers"]] == ["next"]
    tierblk.run("stop")
