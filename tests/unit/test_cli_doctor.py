"""The checks of `tierblk doctor`, each on its own, and the exit code of all together."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from tierblk.cli import checks, entry
from tierblk.cli.checks import Check


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("7.3.0-1-amd64", "ok"),
        ("6.12.107+deb13", "ok"),
        ("6.1.0", "warn"),
        ("5.19.0", "fail"),
        ("odd", "warn"),
    ],
)
def test_kernel(release: str, state: str) -> None:
    check = checks.kernel(release)
    assert check.state == state
    assert release in check.message


def test_permissions() -> None:
    assert checks.permissions(0).state == "ok"
    assert checks.permissions(1000).fix == "run tierblk as root"


def test_driver_there(tmp_path: Path) -> None:
    (tmp_path / "ublk-control").touch()
    assert checks.driver(tmp_path / "ublk-control").state == "ok"


@pytest.mark.parametrize(("loadable", "fix"), [(True, "modprobe ublk_drv"), (False, "CONFIG_BLK_DEV_UBLK")])
def test_driver_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loadable: bool, fix: str) -> None:
    monkeypatch.setattr(checks, "_can_load", lambda module: loadable)
    check = checks.driver(tmp_path / "none")
    assert check.state == "fail"
    assert fix in check.fix


@pytest.mark.parametrize(("status", "loadable"), [(0, True), (1, False)])
def test_a_module_is_asked_for_without_loading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, loadable: bool
) -> None:
    modprobe = tmp_path / "modprobe"
    modprobe.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "--dry-run --quiet ublk_drv" ] && exit {status}\nexit 9\n'
    )
    modprobe.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks._can_load("ublk_drv") is loadable


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierblk.core import ublk

    control = tmp_path / "ublk-control"
    assert checks.features(control).state == "warn"
    control.touch()
    monkeypatch.setattr(ublk, "features", lambda: ublk.F_USER_COPY | ublk.F_NO_AUTO_PART_SCAN)
    assert checks.features(control) == Check("features", "ok", "USER_COPY, NO_AUTO_PART_SCAN (0x40080)")

    def refuse() -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ublk, "features", refuse)
    check = checks.features(control)
    assert check.state == "fail"
    assert "Permission denied" in check.message


def test_a_core_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tierblk.core", None)
    check = checks.features(tmp_path)
    assert check.state == "fail"
    assert "make setup" in check.fix


def test_how_many_devices_there_may_be(tmp_path: Path) -> None:
    assert checks.devices_max(tmp_path).message == "0 ublk devices"
    parameters = tmp_path / "module" / "ublk_drv" / "parameters"
    parameters.mkdir(parents=True)
    (parameters / "ublks_max").write_text("2\n")
    (tmp_path / "class" / "ublk-char" / "ublkc0").mkdir(parents=True)
    assert checks.devices_max(tmp_path).state == "ok"
    (tmp_path / "class" / "ublk-char" / "ublkc1").mkdir()
    assert checks.devices_max(tmp_path).state == "warn"


@pytest.mark.parametrize(
    ("disabled", "uid", "state"), [("0", 1000, "ok"), ("1", 0, "ok"), ("1", 1000, "fail"), ("2", 0, "fail")]
)
def test_io_uring(tmp_path: Path, disabled: str, uid: int, state: str) -> None:
    assert checks.io_uring(tmp_path, uid).state == "ok"
    (tmp_path / "sys" / "kernel").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "io_uring_disabled").write_text(disabled)
    assert checks.io_uring(tmp_path, uid).state == state


@pytest.mark.parametrize(
    ("limit_bytes", "uid", "state"),
    [
        (8 << 20, 0, "ok"),
        (8 << 20, 1000, "warn"),
        (resource.RLIM_INFINITY, 1000, "ok"),
        (1 << 30, 1000, "ok"),
    ],
)
def test_memlock(limit_bytes: int, uid: int, state: str) -> None:
    assert checks.memlock(limit_bytes, uid).state == state


def test_run_directory(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        "1 0 254:0 / / rw - ext4 /dev/vda rw\n"
        "2 1 0:5 / /run rw - ext4 hidden rw\n"
        "3 1 0:6 / /run rw - tmpfs tmpfs rw\n"
        "4 1 0:7 / /runner rw - btrfs x rw\n"
        "5 1 0:8 / /with\\040space rw shared:1 - tmpfs x rw\n"
        "nonsense\n"
    )
    assert checks.filesystem(Path("/run/tierblk"), tmp_path) == "tmpfs"
    assert checks.filesystem(Path("/runner/x"), tmp_path) == "btrfs"
    assert checks.filesystem(Path("/with space/x"), tmp_path) == "tmpfs"
    assert checks.run_dir(Path("/run/tierblk"), tmp_path).state == "ok"
    assert checks.run_dir(Path("/var/tierblk"), tmp_path).state == "warn"


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 7)])
def test_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    monkeypatch.setattr("tierblk.cli.doctor.run_checks", lambda timeout_s: [Check("x", state, "m", "do it")])
    assert entry.main(["doctor"]) == code
    assert "fix: do it" in capsys.readouterr().out
    assert entry.main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "ok": code == 0,
        "checks": [{"name": "x", "state": state, "message": "m", "fix": "do it"}],
    }


def test_all_checks_run_on_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERBLK_RUN_DIR", str(tmp_path))
    names = [check.name for check in checks.run_checks(1.0)]
    assert names == [
        "kernel",
        "permissions",
        "driver",
        "features",
        "devices",
        "io_uring",
        "memory",
        "run directory",
        "daemons",
    ]
