"""What `ps` and the files of a daemon that `attach` starts say: real processes, with a stand-in inside."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tests.unit.cli_harness import Cli, cli
from tierblk.rundir import RUN_DIR_VARIABLE

__all__ = ["cli"]

SECRET = "s3cr3t"


def command_lines(harness: Cli) -> list[bytes]:
    """Of every process that was started for the test."""
    mark = f"{RUN_DIR_VARIABLE}={harness.env[RUN_DIR_VARIABLE]}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes())
    return found


def test_no_secret_in_a_process_list_a_log_or_an_answer(cli: Cli) -> None:
    config = cli.config("a", url=f"https://images.example/a.raw?X-Signature={SECRET}-query")
    config.write_text(
        f'{config.read_text()}[remote.headers]\nAuthorization = "Bearer {SECRET}-header"\n'
        '[volume]\nmode = "write-back"\nurl = "s3://bucket/one"\n'
    )
    environment = {"AWS_SECRET_ACCESS_KEY": f"{SECRET}-key", "AWS_SESSION_TOKEN": f"{SECRET}-token"}
    told = []
    attach = ("attach", config)
    for words in (("--debug", *attach), attach, ("status", "--json"), ("status",), ("list",)):
        result = cli(*words, **environment)
        told += [result.out, result.err]
    assert "is attached already" in told[3]
    lines = command_lines(cli)
    assert sorted(b"keeper.py" in line for line in lines) == [False, True], lines
    logs = list((cli.folder / "run").rglob("*.log"))
    assert logs
    files = [path.read_bytes() for path in (cli.folder / "run").rglob("*") if path.is_file()]
    assert cli("detach", "a").code == 0
    for said in (*(text.encode() for text in told), *lines, *files):
        assert SECRET.encode() not in said
