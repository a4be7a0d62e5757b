"""Who may use the control socket, and what the log says of who did."""

from __future__ import annotations

import grp
import json
import logging
import os
import stat
from pathlib import Path

import pytest

from tests.unit.fake_daemon import FakeDaemon
from tests.unit.test_control import ask, attach, document
from tests.unit.test_records import RECORD
from tierblk import config, control, records, service
from tierblk.errors import ConfigError, DaemonError, DeviceError
from tierblk.ready import Ready
from tierblk.rundir import INFO_NAME, RUN_DIR_VARIABLE

GID = os.getgid()


def made(tmp_path: Path, gid: int | None) -> control.ControlServer:
    api = FakeDaemon(config.parse(document(tmp_path), tmp_path / "a.toml"))
    return control.ControlServer(api, tmp_path / "run", gid)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_a_group_may_use_the_socket_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append((Path(path).name, uid, gid)))
    server = made(tmp_path, GID)
    server.run_dir.mkdir(mode=0o755)  # as the block maps do, which are there first
    records.write(server.run_dir, RECORD)
    await server.start()
    assert (mode(server.run_dir), mode(server.socket_path)) == (0o750, 0o660)
    assert mode(server.run_dir / INFO_NAME) == 0o640
    assert given == [("run", -1, GID), (f"{INFO_NAME}.new", -1, GID), ("control.sock", -1, GID)]
    private = server.run_dir / records.FOLDER
    assert [mode(path) for path in (private, *private.iterdir())] == [0o700, 0o600]
    await server.close()
    # The next one, whose config names no group.
    alone = made(tmp_path, None)
    await alone.start()
    assert (mode(alone.run_dir), mode(alone.socket_path)) == (0o700, 0o600)
    assert mode(alone.run_dir / INFO_NAME) == 0o600
    assert len(given) == 3
    await alone.close()


async def test_the_files_really_get_the_group(tmp_path: Path) -> None:
    server = made(tmp_path, GID)
    await server.start()
    assert (await ask(server, "GET", "/v1/devices")) == {"devices": []}
    assert {path.stat().st_gid for path in (server.run_dir, server.socket_path)} == {GID}
    await server.close()


async def test_one_that_may_not_give_files_to_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(DaemonError, match=r"control\.sock: Operation not permitted") as caught:
        await made(tmp_path, GID).start()
    assert caught.value.hint == "daemon.group: only root, or a member of the group, can give it a file"


async def test_a_group_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is made."""
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    fields = {**document(tmp_path), "daemon": {"group": "no-such-group"}}
    with pytest.raises(
        ConfigError, match=r'daemon\.group: this machine has no group "no-such-group"'
    ) as caught:
        await service._serve(config.parse(fields, tmp_path / "a.toml"), Ready(None))
    assert caught.value.hint == "make it (groupadd --system no-such-group), or leave daemon.group out"
    assert list(tmp_path.iterdir()) == []
    assert control.group_id(grp.getgrgid(GID).gr_name) == GID
    assert control.group_id(None) is None


async def test_the_log_says_who_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = made(tmp_path, None)
    await server.start()
    await attach(server, document(tmp_path), "/etc/a\nb.toml")
    await ask(server, "GET", "/v1/devices")
    with pytest.raises(DeviceError):
        await ask(server, "POST", "/v1/devices/none/sync", {"wait": True})
    await ask(server, "DELETE", "/v1/devices/a")
    await ask(server, "POST", "/v1/stop", {})
    await server.close()
    who = f"asked for by uid {os.getuid()}, pid {os.getpid()}"
    assert [line for line in caplog.messages if "asked for" in line] == [
        f"attach /etc/a{json.dumps(chr(10))[1:-1]}b.toml, {who}",
        f"sync none, {who}",
        f"detach a, {who}",
        f"stop, {who}",
    ]
