"""Devices whose daemon has ended, as commands without a daemon see them."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.test_records import RECORD
from tierblk import driver, records
from tierblk.cli import kept, main, orphans, status
from tierblk.core import ublk
from tierblk.errors import DaemonError, DeviceError
from tierblk.rundir import RUN_DIR_VARIABLE

UUIDS = [str(UUID(int=number << 96)) for number in (1, 2)]


class Machine:
    """Run directories with a record each, cache directories, and a driver that has these devices."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.devices: dict[int, ublk.DeviceInfo] = {}
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder / "run"))
        monkeypatch.setattr(driver, "devices", lambda: list(self.devices.values()))
        monkeypatch.setattr(driver, "info_of", self.devices.get)
        monkeypatch.setattr(driver, "take_away", lambda dev_id, **_: self.devices.pop(dev_id, None))
        monkeypatch.setattr(os.path, "exists", self.exists(os.path.exists))

    def exists(self, real: object) -> object:
        def exists(path: str) -> bool:
            if str(path).startswith("/dev/ublkc"):
                return int(str(path).removeprefix("/dev/ublkc")) in self.devices
            return bool(real(path))  # type: ignore[operator]

        return exists

    def orphan(self, dev_id: int, name: str) -> Path:
        """Its run directory."""
        cache = self.folder / f"cache{dev_id}"
        cache.mkdir()
        (cache / "slots").touch()
        stamp = driver.stamp_of(UUID(UUIDS[dev_id]).bytes)
        run_dir = self.folder / "run" / UUIDS[dev_id]
        run_dir.mkdir(parents=True)
        record = replace(RECORD, dev_id=dev_id, name=name, stamp=stamp, config={"cache": {"dir": str(cache)}})
        records.write(run_dir, record)
        self.add(dev_id, stamp)
        return run_dir

    def add(self, dev_id: int, stamp: int) -> None:
        self.devices[dev_id] = ublk.DeviceInfo(dev_id, 1, 64, ublk.STATE_QUIESCED, 65536, -1, 0x18, stamp)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_they_are_listed_with_the_way_out(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.orphan(0, "lost")
    assert main(["list", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert (device["name"], device["path"], device["state"]) == ("lost", "/dev/ublkb0", "no daemon")
    assert device["reason"].endswith("tierblk attach /etc/disk.toml")
    assert main(["status", "lost"]) == 0
    assert "lost: /dev/ublkb0, no daemon" in capsys.readouterr().out
    assert main(["status"]) == 0
    assert "lost: /dev/ublkb0, no daemon" in capsys.readouterr().out


def test_detach_needs_force_for_them(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = machine.orphan(0, "lost")
    assert main(["detach", "lost"]) == DeviceError.exit_code
    assert "waits for a daemon" in capsys.readouterr().err
    assert 0 in machine.devices
    assert main(["detach", "--force", "lost"]) == 0
    assert (machine.devices, records.read_all(run_dir)) == ({}, ([], {}))


def test_a_daemon_that_begins_meanwhile_keeps_its_device(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the lock and no socket yet."""
    monkeypatch.setattr(orphans, "LOCK_WAIT_S", 0.0)
    machine.orphan(0, "lost")
    with open(machine.folder / "cache0" / "slots") as slots:
        fcntl.flock(slots, fcntl.LOCK_EX)
        assert main(["detach", "--force", "lost"]) == DaemonError.exit_code
        assert main(["reap"]) == DaemonError.exit_code
    assert "is starting or ending" in capsys.readouterr().err
    assert 0 in machine.devices


def test_reap_says_each_and_leaves_what_is_not_ours(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.orphan(0, "lost")
    machine.add(5, 0)
    machine.add(6, driver.stamp_of(bytes(16)))  # ours, of a cache whose run directory is gone
    assert main(["reap", "--dry-run"]) == 0
    assert (
        "would delete /dev/ublkb0: left behind by a daemon that has ended (lost)" in capsys.readouterr().out
    )
    assert sorted(machine.devices) == [0, 5, 6]
    assert main(["reap", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [device["path"] for device in done["reaped"]] == ["/dev/ublkb0", "/dev/ublkb6"]
    assert list(machine.devices) == [5]


def test_reap_leaves_what_a_keeper_is_about_to_serve(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = machine.orphan(0, "kept")
    with open(run_dir / "keeper", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert main(["reap"]) == 0
        assert "left alone /dev/ublkb0: its keeper" in capsys.readouterr().err
    assert list(machine.devices) == [0]
    assert not kept.is_kept(run_dir)


def test_two_of_one_name(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.orphan(0, "lost")
    machine.orphan(1, "lost")
    assert main(["detach", "--force", "lost"]) == DeviceError.exit_code
    assert "--cache-dir" in capsys.readouterr().err
    assert main(["detach", "--force", "lost", "--cache-dir", str(machine.folder / "cache1")]) == 0
    assert list(machine.devices) == [0]


def test_a_time_and_how_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert status.ago(970.0).endswith(", 30s ago")
    assert status.ago(1002.0).endswith(", 0s ago")
    assert [status.age(1000.0 - s) for s in (119, 120, 7199, 7200, 172799, 172800)] == [
        "119s ago",
        "2m ago",
        "119m ago",
        "2h ago",
        "47h ago",
        "2d ago",
    ]
