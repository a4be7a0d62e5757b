"""Which version of its image a device gets from the daemon, and when; bases and devices are stand-ins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.test_control import document
from tests.unit.test_records import RECORD
from tierblk import config as configs
from tierblk.daemon import Daemon
from tierblk.errors import DeviceError, RemoteUnavailable, TierblkError
from tierblk.layer import Base, Stack
from tierblk.remote import Identity


class Versions:
    """Stacks: `opened` has how each one was asked for, `used` who uses one."""

    def __init__(self, refuses: TierblkError | None = None) -> None:
        self.opened: list[tuple[Identity | None, bool]] = []
        self.used: list[str] = []
        self.refuses = refuses

    async def open(
        self,
        config: object,
        user: str,
        *,
        pin: Identity | None = None,
        fresh: bool = False,
        goes_on: bool = False,
    ) -> Any:
        self.opened.append((pin, fresh))
        if self.refuses is not None:
            raise self.refuses
        self.used.append(user)
        return Stack(cast(Base, object()), None, 0)

    async def release(self, stack: object, user: str, *, goes_on: bool = False) -> None:
        self.used.remove(user)

    async def partition_warning(self, stack: object) -> None:
        return None


class Held:
    """A live device that somebody has open."""

    name, path, dev_id, config, stack = "a", "/dev/ublkb0", 0, None, Stack(cast(Base, object()), None, 0)

    def __init__(self) -> None:
        self.stops = 0

    async def stop(self, *, force: bool) -> None:
        self.stops += 1
        if not force:
            raise DeviceError("in use")


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(configs.parse(document(tmp_path), tmp_path / "a.toml"))


def put_in(daemon: Daemon, versions: Versions, held: Held) -> None:
    daemon._stacks = versions  # type: ignore[assignment]
    daemon._devices["a"] = held  # type: ignore[assignment]


async def test_r22_a_device_in_use_keeps_its_version(daemon: Daemon) -> None:
    versions = Versions()
    held: Any = Held()
    put_in(daemon, versions, held)
    with pytest.raises(DeviceError, match="in use"):
        await daemon.repin("a")
    assert versions.opened == [(None, True)]
    assert versions.used == []
    assert daemon._devices == {"a": held}


async def test_r22_the_new_version_is_looked_at_before_the_device_is_touched(daemon: Daemon) -> None:
    held: Any = Held()
    put_in(daemon, Versions(RemoteUnavailable("nobody answers")), held)
    with pytest.raises(RemoteUnavailable, match="nobody answers"):
        await daemon.repin("a")
    assert held.stops == 0
    assert daemon._devices == {"a": held}


async def test_a_take_over_pins_the_version_that_the_device_has(daemon: Daemon, tmp_path: Path) -> None:
    versions = Versions(RemoteUnavailable("enough"))
    daemon._stacks, daemon._home = versions, object()  # type: ignore[assignment]
    record = replace(RECORD, config=document(tmp_path), config_path=str(tmp_path / "a.toml"))
    with pytest.raises(RemoteUnavailable, match="enough"):
        await daemon._serve_again(record)
    assert versions.opened == [(Identity(RECORD.url, RECORD.size_bytes, RECORD.validator), False)]
