"""Runs the command line as users do, in its own processes, with the fake daemon in place of the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tierblk.rundir import RUN_DIR_VARIABLE

SITE = """
import importlib.util
import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "tierblk.service":
            return importlib.util.spec_from_file_location(name, {fake!r})


sys.meta_path.insert(0, Finder)
"""


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, which must be one JSON document."""
        return json.loads(self.out)


class Cli:
    """The command line with a run directory, config files and caches below one temporary directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            SITE.format(fake=str(Path(__file__).with_name("fake_daemon.py")))
        )
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
            "PYTHONWARNINGS": "error",
            RUN_DIR_VARIABLE: str(folder / "run"),
        }

    def popen(
        self, *arguments: str | Path, stdout: int = subprocess.PIPE, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A command that runs. env comes on top of what all commands get."""
        return subprocess.Popen(
            [sys.executable, "-m", "tierblk", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.env | (env or {}),
        )

    def finish(self, process: subprocess.Popen[str]) -> Result:
        """What a running command did, waited for."""
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in err, err
        return Result(process.returncode, out, err)

    def __call__(self, *arguments: str | Path, **env: str) -> Result:
        return self.finish(self.popen(*arguments, env=env))

    def config(self, name: str, *, cache: str = "cache", url: str = "http://images.example/a.raw") -> Path:
        """A config file for a device."""
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'[device]\nname = "{name}"\n[base]\nurl = "{url}"\n'
            f'[cache]\ndir = "{self.folder / cache}"\nsize = "16MiB"\n'
        )
        return path

    def daemon_info(self) -> dict[str, Any]:
        """What the only daemon says about itself."""
        (daemon,) = self("status", "--json").json["daemons"]
        assert isinstance(daemon, dict)
        return daemon

    def kill_daemons(self) -> None:
        """Whatever a test left running: keepers before daemons, which they would start again. All have the
        test's run directory in their environment."""
        mark = f"{RUN_DIR_VARIABLE}={self.env[RUN_DIR_VARIABLE]}".encode()
        for what in (b"keeper.py", b"serve"):
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    words = (folder / "cmdline").read_bytes()
                    if what in words and mark in (folder / "environ").read_bytes().split(b"\0"):
                        os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """The command line; its daemons are killed at the end."""
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    harness = Cli(tmp_path)
    yield harness
    harness.kill_daemons()
