"""The command line in processes of its own, against the fake daemon: finding, starting, racing, stopping."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tierblk
from tests.conftest import ROOT
from tests.unit.cli_harness import Cli, Result, cli
from tierblk.cli import client, entry, starting
from tierblk.cli import list as list_
from tierblk.errors import DaemonError, TierblkError
from tierblk.rundir import INFO_NAME, SOCKET_NAME

__all__ = ["cli"]  # a fixture


class TestAttach:
    def test_prints_the_path_alone_and_leaves_a_daemon(self, cli: Cli) -> None:
        done = cli("attach", cli.config("a"))
        assert (done.code, done.out, done.err) == (0, f"{cli.folder}/a.device\n", "")
        info = cli.daemon_info()
        assert info["cwd"] == "/"
        assert info["stdin"] == "/dev/null"
        assert info["session_of_keeper"]
        log = (cli.folder / "run" / "log").iterdir()
        assert re.fullmatch(r"[A-Za-z0-9._-]+-cache-[0-9a-f]{8}\.log", next(log).name)

    def test_the_second_device_goes_to_the_same_daemon(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        pid = cli.daemon_info()["pid"]
        (cli.folder / "link").symlink_to("cache")
        assert cli("attach", cli.config("b", cache="link")).code == 0
        assert cli.daemon_info()["pid"] == pid
        assert [device["name"] for device in cli("list", "--json").json["devices"]] == ["a", "b"]

    def test_another_cache_has_another_daemon(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("b", cache="other"))
        assert len(cli("status", "--json").json["daemons"]) == 2

    def test_racing_attaches_start_one_daemon(self, cli: Cli) -> None:
        racing = [cli.popen("attach", cli.config(f"d{n}")) for n in range(4)]
        results = [cli.finish(process) for process in racing]
        assert [(result.code, result.err) for result in results] == [(0, "")] * 4
        status = cli("status", "--json").json
        assert len(status["daemons"]) == 1
        assert len(status["devices"]) == 4

    def test_json(self, cli: Cli) -> None:
        device = cli("attach", cli.config("cut"), "--json").json
        assert device["path"] == f"{cli.folder}/cut.device"
        assert device["warnings"] == ["the image was cut off"]

    def test_warnings_go_to_stderr(self, cli: Cli) -> None:
        done = cli("attach", cli.config("cut"))
        assert done.out == f"{cli.folder}/cut.device\n"
        assert done.err == "tierblk: warning: the image was cut off\n"

    def test_a_name_that_is_taken(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        done = cli("attach", cli.config("a"))
        assert (done.code, done.out) == (8, "")
        assert done.err == "tierblk: a is attached already\nhint: use it\n"

    def test_a_daemon_that_was_started_for_nothing_does_not_stay(self, cli: Cli) -> None:
        done = cli("attach", cli.config("a", url="http://unreachable/x"))
        assert (done.code, done.out) == (4, "")
        assert done.err == "tierblk: http://unreachable/x does not answer\nhint: is it up?\n"
        assert cli("status").err == "no daemon is running\n"

    def test_one_that_others_use_does(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        assert cli("attach", cli.config("b", url="http://unreachable/x")).code == 4
        assert len(cli("list", "--json").json["devices"]) == 1

    def test_what_the_daemon_says_when_it_cannot_start(self, cli: Cli) -> None:
        done = cli("attach", cli.config("a"), FAKE_DAEMON="refuse")
        assert done.code == 6
        assert done.err == f"tierblk: {cli.folder}/cache was made by a newer tierblk\nhint: update tierblk\n"

    def test_a_daemon_that_ends_without_a_word(self, cli: Cli) -> None:
        done = cli("attach", cli.config("a"), FAKE_DAEMON="crash")
        assert done.code == 8
        assert "the daemon ended before it was ready\nhint: its log is" in done.err

    def test_nothing_is_imported_from_where_the_user_is(self, cli: Cli) -> None:
        (cli.folder / "json.py").write_text("raise SystemExit('imported from the current directory')")
        installed = [sys.executable, "-P", str(ROOT / "tierblk" / "__main__.py")]
        run = subprocess.run(
            [*installed, "attach", str(cli.config("a"))],
            cwd=cli.folder,
            env=cli.env,
            capture_output=True,
            timeout=30,
        )
        assert (run.returncode, run.stderr) == (0, b"")

    def test_a_killed_daemon_is_replaced(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli.kill_daemons()
        assert cli("list").err == "no device is attached\n"
        assert cli("attach", cli.config("b")).code == 0

    def test_a_lock_that_no_daemon_holds(self, cli: Cli) -> None:
        (cli.folder / "cache").mkdir()
        slots = cli.folder / "cache" / "slots"
        holder = subprocess.Popen(
            ["flock", str(slots), "sh", "-c", "echo locked; cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"locked\n"
        waiting = cli.popen("attach", cli.config("a"))
        log = starting.log_path(cli.folder / "cache")
        wait_for_text(log, "is locked by another daemon")
        holder.stdin.close()
        assert cli.finish(waiting).code == 0
        holder.stdout.close()
        holder.wait()


def wait_for_text(path: Path, text: str) -> None:
    """Until a log exists and holds the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    follow = ["timeout", "20", "sh", "-c", 'tail -n +1 -f "$0" | grep -q -m 1 "$1"', str(path), text]
    subprocess.run(follow, check=True, stdin=subprocess.DEVNULL)


class TestForeground:
    @pytest.fixture
    def running(self, cli: Cli) -> Iterator[subprocess.Popen[str]]:
        process = cli.popen("attach", cli.config("a"), "--foreground")
        assert process.stdout is not None
        assert process.stdout.readline() == f"{cli.folder}/a.device\n"
        yield process
        process.kill()
        process.communicate()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_stays_until_it_is_told_to_end(
        self, cli: Cli, running: subprocess.Popen[str], number: signal.Signals
    ) -> None:
        assert cli.daemon_info()["pid"] == running.pid
        running.send_signal(number)
        assert cli.finish(running).code == 0
        assert not (cli.folder / "a.device").exists()
        assert cli("status").err == "no daemon is running\n"

    def test_a_second_one_is_refused(self, cli: Cli, running: subprocess.Popen[str]) -> None:
        done = cli("attach", cli.config("b"), "--foreground")
        assert done.code == 8
        assert "already runs\nhint: leave out --foreground" in done.err

    def test_others_attach_to_it(self, cli: Cli, running: subprocess.Popen[str]) -> None:
        assert cli("attach", cli.config("b")).code == 0
        assert cli.daemon_info()["pid"] == running.pid

    def test_its_failure_to_attach_is_its_exit_code(self, cli: Cli) -> None:
        done = cli("attach", cli.config("a", url="http://unreachable/x"), "--foreground")
        assert done.code == 4
        assert done.err.count("does not answer") >= 1
        assert cli("status").err == "no daemon is running\n"

    def test_its_failure_to_start_is_told_once(self, cli: Cli) -> None:
        done = cli("attach", cli.config("a"), "--foreground", FAKE_DAEMON="refuse")
        assert done.code == 6
        assert done.err.count("made by a newer tierblk") == 1

    def test_ctrl_c_before_it_serves_ends_both_processes(self, cli: Cli) -> None:
        """The child waits for a line that never comes. Only its parent got the signal."""
        done = cli("attach", cli.config("a"), "--foreground", FAKE_DAEMON="interrupted")
        assert (done.code, done.out) == (130, "")


class TestDetachAndStop:
    def test_detach(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        assert (cli("detach", "a").code, (cli.folder / "a.device").exists()) == (0, False)
        done = cli("detach", "a")
        assert done.code == 7
        assert done.err == 'tierblk: there is no device called "a"\nhint: no device is attached\n'

    def test_a_name_that_two_caches_have(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("a", cache="other"))
        done = cli("detach", "a")
        assert done.code == 8
        assert done.err.startswith('tierblk: there are 2 devices called "a"')
        assert cli("detach", "a", "--cache-dir", cli.folder / "other").code == 0
        assert len(cli("list", "--json").json["devices"]) == 1

    def test_stop_ends_all(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("b", cache="other"))
        stopped = cli("stop", "--json").json["stopped"]
        assert sorted(stopped) == [f"{cli.folder}/cache", f"{cli.folder}/other"]
        assert cli("status").err == "no daemon is running\n"
        assert cli("stop").code == 0

    def test_stop_ends_one(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("b", cache="other"))
        assert cli("stop", "--cache-dir", cli.folder / "other").code == 0
        assert cli.daemon_info()["cache_dir"] == f"{cli.folder}/cache"

    def test_stop_says_what_went_wrong_with_the_end(self, cli: Cli) -> None:
        cli("attach", cli.config("a"), FAKE_DAEMON="unclean")
        pid = cli.daemon_info()["pid"]
        done = cli("stop", "--json")
        said = (
            f"the daemon of {cli.folder}/cache (pid {pid}) has stopped, but its cache did not end clean: "
            "the disk takes no writes"
        )
        assert (done.code, done.err) == (0, f"tierblk: warning: {said}\n")
        assert done.json == {"stopped": [f"{cli.folder}/cache"], "warnings": [said]}
        cli("attach", cli.config("a"))
        assert (cli("stop").err, cli("status").err) == ("", "no daemon is running\n")

    def test_stop_when_the_process_has_ended_the_daemon_is_gone(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        (daemon,) = client.candidates()
        process_fd = daemon.process()
        assert cli("stop").code == 0
        assert select.select([process_fd], [], [], 0)[0]
        os.close(process_fd)


class TestListAndStatus:
    def test_tables(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("longer"))
        lines = cli("list").out.splitlines()
        assert lines[0].split() == ["NAME", "PATH", "SIZE", "STATE", "IMAGE"]
        assert lines[1].split() == [
            "a",
            f"{cli.folder}/a.device",
            "2",
            "GiB",
            "ok",
            "http://images.example/a.raw",
        ]
        assert lines[1].index("ok") == lines[2].index("ok")

    def test_status_of_one(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        text = cli("status", "a").out
        assert " in 70 requests, hits 75.0 % of what is not zero\n" in text
        assert max(map(len, text.splitlines())) <= 80
        assert "2 GiB at http://images.example/a.raw" in text
        assert "copy, 2 queues, each 64 requests deep" in text
        assert "half within 81.2 us, 99 % within 640 us" in text
        assert "half within 21.5 ms, 99 % within 1.25 s" in text
        assert "hot blocks" not in text
        device = cli("status", "a", "--json").json
        assert {"name", "path", "plane", "size_bytes", "hit_bytes", "miss_bytes", "fetched_bytes"} <= set(
            device
        )
        assert {"requests", "errors", "state", "reason"} <= set(device)

    def test_status_of_one_with_a_memory_tier(self, cli: Cli) -> None:
        config = cli.config("a")
        config.write_text(config.read_text().replace('"a"\n', '"a"\nhot_memory = "16MiB"\n', 1))
        cli("attach", config)
        assert "16 MiB for hot blocks, 25 % of the requests among them" in cli("status", "a").out

    def test_a_reason_is_shown_and_cannot_steer_the_terminal(self, cli: Cli) -> None:
        cli("attach", cli.config("ill"))
        assert r"because   the server\x1b[31m is away" in cli("status").out

    def test_nothing(self, cli: Cli) -> None:
        assert (cli("list").err, cli("status").err) == ("no device is attached\n", "no daemon is running\n")
        assert cli("list", "--json").json == {"devices": []}
        assert cli("status", "--json").json == {"daemons": [], "devices": []}

    def test_a_daemon_that_hangs_is_an_error_and_the_others_are_shown(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("b", cache="other"))
        pid = next(
            d["pid"] for d in cli("status", "--json").json["daemons"] if d["cache_dir"].endswith("other")
        )
        os.kill(pid, signal.SIGSTOP)
        for verb in ("list", "status"):
            done = cli(verb, "--timeout", "2s")
            assert done.code == 8
            assert f"the daemon of {cli.folder}/other (pid {pid}) has not answered for 2 s" in done.err
            assert "a.device" in done.out
            assert "b.device" not in done.out
        assert cli("detach", "b", "--timeout", "2s").code == 8
        assert cli("stop", "--timeout", "200ms", "--cache-dir", cli.folder / "other").code == 8
        assert cli("attach", cli.config("c", cache="other"), "--timeout", "200ms").code == 8
        assert cli("attach", cli.config("c"), "--timeout", "5s").code == 0
        assert "FAIL  daemon: the daemon of" in cli("doctor", "--timeout", "2s").out

    def test_doctor_reports_a_dead_socket(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli.kill_daemons()
        checks = cli("doctor", "--json").json["checks"]
        (daemon,) = [check for check in checks if check["name"] == "daemon"]
        assert daemon["state"] == "warn"
        assert "was killed and left" in daemon["message"]


class TestCheck:
    def test_a_right_config(self, cli: Cli) -> None:
        done = cli("check", cli.config("a"))
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"{cli.folder}/a.toml is right: a from http://images.example/a.raw")
        assert not (cli.folder / "run").exists()
        assert not (cli.folder / "cache").exists()

    def test_secrets_are_not_shown(self, cli: Cli) -> None:
        done = cli("check", "--json", ROOT / "configs" / "https.toml")
        assert done.json["config"]["remote"]["headers"] == {"Authorization": "..."}
        config = cli.config("a", url="https://images.example/a.raw?signature=s3cr3t")
        for done in (cli("check", config), cli("check", "--json", config)):
            assert done.code == 0
            assert "s3cr3t" not in done.out

    def test_connect_reads_the_image(self, cli: Cli) -> None:
        image = cli.folder / "disk.raw"
        image.write_bytes(bytes(2**20))
        done = cli("check", "--connect", cli.config("a", url=f"file://{image}"))
        assert (done.code, done.err) == (0, "")
        assert "the image can be read: 1 MiB (1048576 bytes), stat:" in done.out

    def test_connect_and_the_image_is_not_there(self, cli: Cli) -> None:
        done = cli("check", "--connect", "--json", cli.config("a", url="file:///nowhere/disk.raw"))
        assert done.code == 5
        assert done.json["error"]["kind"] == "RemoteRefused"

    @pytest.mark.parametrize("verb", ["check", "attach", "serve"])
    def test_a_wrong_config_is_a_sentence(self, cli: Cli, verb: str) -> None:
        path = cli.folder / "a.toml"
        path.write_text('[device]\nname = "a"\n')
        arguments = ["serve", "--config", str(path)] if verb == "serve" else [verb, str(path)]
        done = cli(*arguments)
        assert (done.code, done.out) == (3, "")
        assert done.err == (
            f"tierblk: {path} has 3 errors:\n  base.url: is required\n  cache.dir: is required\n"
            "  cache.size: is required\n"
        )


class TestServe:
    def test_its_log_goes_where_it_is_told(self, cli: Cli) -> None:
        done = cli("serve", "--config", cli.config("a"), "--log", cli.folder / "log", FAKE_DAEMON="refuse")
        assert (done.code, done.err) == (6, "")
        assert "made by a newer tierblk" in (cli.folder / "log").read_text()

    def test_a_log_that_cannot_be_written(self, cli: Cli) -> None:
        done = cli("serve", "--config", cli.config("a"), "--log", cli.folder)
        assert done.code == 3
        assert "cannot write the log" in done.err


class TestMain:
    """Whatever happens, there is a sentence and an exit code."""

    def test_version_and_help(self, cli: Cli) -> None:
        assert cli("--version").out == f"tierblk {tierblk.__version__}\n"
        out = cli("--help").out
        for verb in entry.VERBS:
            assert verb.NAME in out
            assert cli(verb.NAME, "--help").code == 0

    @pytest.mark.parametrize(
        "arguments", [(), ("fly",), ("attach",), ("list", "--timeout", "0s"), ("list", "x")]
    )
    def test_wrong_usage(self, cli: Cli, arguments: tuple[str, ...]) -> None:
        assert cli(*arguments).code == 2

    def test_a_reader_that_went_away(self, cli: Cli) -> None:
        read_fd, write_fd = os.pipe()
        os.close(read_fd)
        process = cli.popen("list", "--json", stdout=write_fd)
        os.close(write_fd)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 1

    def test_ctrl_c(self, cli: Cli) -> None:
        listener = socket.socket(socket.AF_UNIX)
        run_dir = cli.folder / "run" / "x"
        run_dir.mkdir(parents=True)
        fd = os.open(run_dir, os.O_PATH)
        listener.bind(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
        os.close(fd)
        (run_dir / INFO_NAME).write_text(json.dumps({"cache_dir": "/c", "pid": 1}))
        listener.listen()
        process = cli.popen("list")
        connection, _ = listener.accept()
        process.send_signal(signal.SIGINT)
        assert cli.finish(process) == Result(130, "", "")
        connection.close()
        listener.close()

    def test_what_nobody_expected(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> int:
            raise ZeroDivisionError("by a bug")

        monkeypatch.setattr(list_, "run", fail)
        assert entry.main(["list"]) == 1
        err = capsys.readouterr().err
        assert err.startswith(
            "tierblk: unexpected: ZeroDivisionError: by a bug\nhint: run it again with --debug"
        )
        assert entry.main(["list", "--debug"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_completion(self, cli: Cli) -> None:
        assert "doctor" in cli("completion", "bash").out

    @pytest.mark.parametrize("verb", [("list",), ("status",), ("detach", "x"), ("stop",)])
    def test_the_quick_verbs_import_nothing_heavy(self, cli: Cli, verb: tuple[str, ...]) -> None:
        program = (
            "import sys; from tierblk.cli import main; main(sys.argv[1:]); "
            "print(sorted({'aiohttp', 'pydantic', 'lmdb', 'asyncio', 'cffi', 'rich'} & sys.modules.keys()))"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, *verb],
            cwd=ROOT,
            env=cli.env,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert run.stdout.splitlines()[-1] == "[]", run.stderr


def test_readiness_times_out() -> None:
    read_fd, write_fd = os.pipe()
    with pytest.raises(DaemonError, match=r"not ready after 0\.01 s"):
        starting.await_ready(read_fd, 0.01, None)
    os.close(write_fd)


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b"{}\n", b'{"error": 5}\n'])
def test_readiness_in_a_strange_shape(line: bytes) -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, line)
    os.close(write_fd)
    with pytest.raises(TierblkError, match="unknown shape"):
        starting.await_ready(read_fd, 10, None)
