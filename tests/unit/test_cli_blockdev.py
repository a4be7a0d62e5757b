"""Partitions and users of a device, from trees like those of /sys and /proc."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from tierblk.cli import blockdev
from tierblk.errors import DeviceError


@pytest.fixture
def sys_tree(tmp_path: Path) -> Path:
    """ublkb0 with two partitions, the first one held by a device mapper, and ublkb01 with one."""
    for folder, number in (
        ("ublkb0", "259:1"),
        ("ublkb0/ublkb0p1", "259:2"),
        ("ublkb0/ublkb0p10", "259:3"),
        ("ublkb0/ublkb0p2", "259:4"),
        ("ublkb01/ublkb01p1", "259:9"),
    ):
        path = tmp_path / "sys" / "block" / folder
        path.mkdir(parents=True)
        (path / "dev").write_text(f"{number}\n")
        (path / "holders").mkdir()
        if "/" in folder:
            (path / "partition").write_text("1\n")
    (tmp_path / "sys/block/ublkb0/ublkb0p1/holders/dm-0").mkdir()
    return tmp_path / "sys"


def test_partitions_in_order_and_only_its_own(sys_tree: Path) -> None:
    assert blockdev.partitions("/dev/ublkb0", sys_tree) == ["ublkb0p1", "ublkb0p2", "ublkb0p10"]
    assert blockdev.partitions("/dev/none", sys_tree) == []
    assert blockdev.partitions("/dev/*", sys_tree) == []


def test_nodes_are_waited_for(sys_tree: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev"
    dev.mkdir()
    for name in ("ublkb0p1", "ublkb0p2"):
        (dev / name).touch()
    late = threading.Timer(0.15, (dev / "ublkb0p10").touch)
    late.start()
    assert blockdev.wait_for_nodes("/dev/ublkb0", timeout_s=20, sys=sys_tree, dev=dev) is None
    late.join()


def test_nodes_that_do_not_come_are_named(sys_tree: Path, tmp_path: Path) -> None:
    warning = blockdev.wait_for_nodes("/dev/ublkb01", timeout_s=0, sys=sys_tree, dev=tmp_path)
    assert warning == f"partitions without a device node in {tmp_path}: ublkb01p1"


def test_users(sys_tree: Path, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(
        "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "23 22 259:2 / /mnt/with\\040space ro,relatime shared:1 - ext4 /dev/ublkb0p1 ro\n"
        "24 22 0:44 / /mnt/btrfs rw - btrfs /dev/ublkb0p2 rw\n"
        "25 22 259:9 / /other rw - ext4 /dev/ublkb01p1 rw\n"
        "nonsense\n"
    )
    (proc / "swaps").write_text("Filename Type\n/dev/ublkb0p10   partition 1 0 -2\n")
    assert blockdev.users("/dev/ublkb0", sys_tree, proc) == [
        "mounted at /mnt/with space",
        "mounted at /mnt/btrfs",
        "swap on /dev/ublkb0p10",
        "held by dm-0",
    ]
    assert blockdev.users("/dev/ublkb01", sys_tree, proc) == ["mounted at /other"]
    assert blockdev.users("/dev/ublkb7", sys_tree, tmp_path / "none") == []


def test_a_busy_device_is_refused_with_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_open(monkeypatch, errno.EBUSY)
    monkeypatch.setattr(blockdev, "users", lambda path: ["mounted at /mnt", "held by dm-0"])
    with pytest.raises(DeviceError) as caught:
        blockdev.ensure_free("/dev/ublkb0")
    assert caught.value.message == "/dev/ublkb0 is in use: mounted at /mnt; held by dm-0"
    assert caught.value.hint == "umount /mnt"


def test_a_device_whose_open_waits_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes it may wait for a read that only the detach, which asks here first, will end."""
    told, tell = os.pipe()
    monkeypatch.setattr(blockdev, "is_block_device", lambda path: True)
    monkeypatch.setattr(blockdev, "users", lambda path: [])
    monkeypatch.setattr(blockdev, "OPEN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(os, "open", lambda *_: int(os.read(told, 1)))
    blockdev.ensure_free("/dev/ublkb0")
    os.write(tell, b"9")  # and now the child ends
    os.wait()
    os.close(told)
    os.close(tell)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENXIO, errno.ENODEV])
def test_a_device_that_is_gone_is_free(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    failing_open(monkeypatch, number)
    blockdev.ensure_free("/dev/ublkb0")


def test_a_device_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_open(monkeypatch, errno.EACCES)
    with pytest.raises(DeviceError, match="cannot open /dev/ublkb0: Permission denied"):
        blockdev.ensure_free("/dev/ublkb0")
    assert (
        blockdev.scan_partitions("/dev/ublkb0")
        == "cannot read the partition table of /dev/ublkb0: Permission denied"
    )


def failing_open(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(blockdev, "is_block_device", lambda path: True)
    monkeypatch.setattr(os, "open", fail)


def test_a_busy_scan_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "device").touch()
    answers = [OSError(errno.EBUSY, "busy"), OSError(errno.EBUSY, "busy"), None]

    def ioctl(fd: int, request: int) -> None:
        assert request == 0x125F
        answer = answers.pop(0)
        if answer:
            raise answer

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(blockdev, "POLL_S", 0)
    assert blockdev.scan_partitions(str(tmp_path / "device")) is None
    assert answers == []
    monkeypatch.setattr(blockdev, "RESCAN_TRIES", 2)
    answers += [OSError(errno.EBUSY, "busy")] * 2
    assert "the device is busy" in (blockdev.scan_partitions(str(tmp_path / "device")) or "")
    answers += [OSError(errno.EIO, "Input/output error")]
    assert "Input/output error" in (blockdev.scan_partitions(str(tmp_path / "device")) or "")


def test_a_file_has_no_partitions_and_no_users(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert not blockdev.is_block_device(str(path))
    assert blockdev.scan_partitions(str(path)) is None
    blockdev.ensure_free(str(path))
    assert not blockdev.is_block_device(str(tmp_path / "none"))
