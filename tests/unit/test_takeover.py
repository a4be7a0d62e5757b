"""What a daemon makes of what it finds in the driver; the driver is a table here."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_records import RECORD
from tierblk import driver, records, takeover
from tierblk.core import ublk
from tierblk.device import Device
from tierblk.errors import DeviceError
from tierblk.records import DeviceRecord

STAMP = driver.stamp_of(bytes(range(16)))


class Table:
    """The driver: devices by number. `refuses`: numbers whose STOP_DEV fails."""

    def __init__(self) -> None:
        self.devices: dict[int, ublk.DeviceInfo] = {}
        self.stopped: list[int] = []
        self.refuses: set[int] = set()

    def add(self, dev_id: int, state: int, *, stamp: int = STAMP, pid: int = -1) -> None:
        self.devices[dev_id] = ublk.DeviceInfo(dev_id, 1, 64, state, 65536, pid, ublk.F_RECOVERY, stamp)

    def info(self, dev_id: int) -> ublk.DeviceInfo:
        if dev_id not in self.devices:
            raise OSError(errno.ENODEV, "no such device")
        return self.devices[dev_id]

    def stop(self, dev_id: int, *, timeout_ms: int) -> None:
        if dev_id in self.refuses:
            raise OSError(errno.EIO, "the driver is in a bad mood")
        self.stopped.append(dev_id)

    def delete(self, dev_id: int, *, timeout_ms: int) -> None:
        self.info(dev_id)
        del self.devices[dev_id]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table()
    monkeypatch.setattr(driver, "devices", lambda: list(table.devices.values()))
    monkeypatch.setattr(ublk, "dev_info", table.info)
    monkeypatch.setattr(ublk, "stop_dev", table.stop)
    monkeypatch.setattr(ublk, "del_dev", table.delete)
    return table


def ours(dev_id: int, name: str = "disk") -> DeviceRecord:
    return replace(RECORD, dev_id=dev_id, name=name, stamp=STAMP)


def test_a_device_with_a_record_waits_whatever_state_it_is_in(table: Table, tmp_path: Path) -> None:
    """LIVE for a moment after its daemon's death."""
    for dev_id, state in ((0, ublk.STATE_QUIESCED), (1, ublk.STATE_LIVE)):
        table.add(dev_id, state)
        records.write(tmp_path, ours(dev_id))
    assert takeover.look(tmp_path, STAMP).waiting == [ours(0), ours(1)]
    assert table.stopped == []


def test_what_has_no_record_or_was_never_started_is_deleted(table: Table, tmp_path: Path) -> None:
    table.add(0, ublk.STATE_QUIESCED)
    table.add(1, ublk.STATE_DEAD)
    records.write(tmp_path, ours(1))
    found = takeover.look(tmp_path, STAMP)
    assert (found.waiting, found.unusable, table.devices) == ([], {}, {})
    assert records.read_all(tmp_path) == ([], {})


def test_a_record_without_a_device_is_deleted(table: Table, tmp_path: Path) -> None:
    records.write(tmp_path, ours(0))
    table.add(0, ublk.STATE_QUIESCED, stamp=STAMP + 1)  # the number is somebody else's now
    assert takeover.look(tmp_path, STAMP).waiting == []
    assert records.read_all(tmp_path) == ([], {})
    assert 0 in table.devices


def test_devices_of_others_are_left_alone(table: Table, tmp_path: Path) -> None:
    table.add(0, ublk.STATE_QUIESCED, stamp=0)
    table.add(1, ublk.STATE_DEAD, stamp=driver.stamp_of(bytes(16)))
    takeover.look(tmp_path, STAMP)
    assert sorted(table.devices) == [0, 1]


def test_a_device_that_somebody_serves_is_not_stopped(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop of a served device waits for its requests."""
    monkeypatch.setattr(driver, "wait_for_rest", lambda dev_id, timeout_s: table.info(dev_id))
    table.add(0, ublk.STATE_LIVE, pid=os.getppid())
    takeover.look(tmp_path, STAMP)
    assert (table.stopped, list(table.devices)) == ([], [0])


def test_a_record_that_cannot_be_used_keeps_its_device(table: Table, tmp_path: Path) -> None:
    table.add(0, ublk.STATE_QUIESCED)
    for dev_id in (0, 1):
        records.write(tmp_path, ours(dev_id))
        (tmp_path / records.FOLDER / f"{dev_id}.json").write_text("{}")
    found = takeover.look(tmp_path, STAMP)
    assert list(found.unusable) == [0]
    assert table.stopped == []


def test_one_that_cannot_be_deleted_does_not_keep_the_others(table: Table, tmp_path: Path) -> None:
    for dev_id in range(3):
        table.add(dev_id, ublk.STATE_QUIESCED)
    table.refuses.add(1)
    takeover.look(tmp_path, STAMP)
    assert list(table.devices) == [1]


def test_without_a_driver_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> list[ublk.DeviceInfo]:
        raise OSError(errno.ENOENT, "no /dev/ublk-control")

    monkeypatch.setattr(driver, "devices", no_driver)
    assert takeover.look(tmp_path, STAMP).waiting == []


def refusing(count: int) -> Callable[[DeviceRecord], object]:
    """Fails so often; what comes then is no device, but nobody looks."""
    left = [count]

    async def serve(record: DeviceRecord) -> Device:
        left[0] -= 1
        if left[0] >= 0:
            raise DeviceError("still held")
        return Device.__new__(Device)

    return serve


async def test_a_take_over_that_fails_says_why_and_can_be_tried_again() -> None:
    waiting = takeover.TakeOver(ours(0), refusing(1))  # type: ignore[arg-type]
    assert waiting.to_dict()["state"] == "recovering"
    assert await waiting.begin() is None
    assert (waiting.to_dict()["state"], waiting.to_dict()["reason"]) == ("failed", "still held")
    assert isinstance(await waiting.begin(), Device)


async def test_one_that_was_deleted_meanwhile_is_forgotten(table: Table, tmp_path: Path) -> None:
    records.write(tmp_path, ours(0))
    waiting = takeover.TakeOver(ours(0), refusing(1))  # type: ignore[arg-type]
    assert await waiting.begin() is None
    table.add(0, ublk.STATE_QUIESCED)
    assert not waiting.is_gone(tmp_path)
    del table.devices[0]
    assert waiting.is_gone(tmp_path)
    assert records.read_all(tmp_path) == ([], {})


async def test_who_asks_meanwhile_joins_the_try_that_runs() -> None:
    waiting = takeover.TakeOver(ours(0), refusing(1))  # type: ignore[arg-type]
    assert waiting.begin() is waiting.begin()
    await waiting.end()
    assert waiting.state == "failed"


async def test_a_device_that_waits_can_be_taken_away(table: Table, tmp_path: Path) -> None:
    table.add(0, ublk.STATE_QUIESCED)
    records.write(tmp_path, ours(0))
    waiting = takeover.unusable(0, "another version wrote it")
    assert await waiting.begin() is None
    with ThreadPoolExecutor(1) as executor:
        await waiting.take_away(tmp_path, executor)
        await waiting.take_away(tmp_path, executor)
    assert (table.stopped, table.devices) == ([0], {})
    assert records.read_all(tmp_path) == ([], {})
    await asyncio.sleep(0)
