"""`tierblk stop` and keepers between two daemons, against the fake daemon."""

from __future__ import annotations

import json
import os
import select
import signal

import pytest

from tests.unit.cli_harness import Cli, cli
from tierblk.cli import client, entry, kept, stop
from tierblk.rundir import SOCKET_NAME

__all__ = ["cli"]  # a fixture


def test_stop_waits_for_the_daemon_that_a_keeper_starts_again(cli: Cli) -> None:
    cli("attach", cli.config("a"))
    info = cli.daemon_info()
    (daemon,) = client.candidates()
    os.kill(info["pid"], signal.SIGKILL)
    assert cli("stop", "--json").json["stopped"] == [f"{cli.folder}/cache"]
    assert not kept.is_kept(daemon.run_dir)
    assert cli("status").err == "no daemon is running\n"


def test_stop_finds_a_keeper_whose_daemon_has_left_no_socket(cli: Cli) -> None:
    cli("attach", cli.config("a"))
    (daemon,) = client.candidates()
    pid = cli.daemon_info()["pid"]
    keeper_pid = os.getpgid(pid)
    os.kill(keeper_pid, signal.SIGSTOP)  # it pauses, as it were
    os.kill(pid, signal.SIGKILL)
    (daemon.run_dir / SOCKET_NAME).unlink()
    assert client.candidates() == []
    stopping = cli.popen("stop", "--json")
    os.kill(keeper_pid, signal.SIGCONT)
    assert cli.finish(stopping).json["stopped"] == [f"{cli.folder}/cache"]
    assert not kept.is_kept(daemon.run_dir)
    assert cli("status").err == "no daemon is running\n"


def test_stop_ends_a_keeper_whose_daemon_somebody_else_has_replaced(cli: Cli) -> None:
    """It would come back from its pause when the other daemon is gone, and start one."""
    cli("attach", cli.config("a"))
    (daemon,) = client.candidates()
    info = cli.daemon_info()
    keeper_pid = os.getpgid(info["pid"])
    os.kill(keeper_pid, signal.SIGSTOP)
    os.kill(info["pid"], signal.SIGKILL)
    assert cli("attach", cli.config("a")).code == 0
    (daemon,) = client.candidates()
    process_fd = daemon.process()
    stopping = cli.popen("stop")
    assert select.select([process_fd], [], [], 30)[0]
    os.close(process_fd)
    os.kill(keeper_pid, signal.SIGCONT)
    assert cli.finish(stopping).code == 0
    assert not kept.is_kept(daemon.run_dir)
    assert cli("status").err == "no daemon is running\n"


def test_stop_ends_a_keeper_whose_daemons_do_not_get_to_serve(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cli.config("a")
    cli("attach", config)
    (daemon,) = client.candidates()
    config.unlink()
    os.kill(cli.daemon_info()["pid"], signal.SIGKILL)
    monkeypatch.setattr(stop, "NEXT_DAEMON_S", 0.5)
    assert entry.main(["stop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] == [f"{cli.folder}/cache"]
    assert not kept.is_kept(daemon.run_dir)
