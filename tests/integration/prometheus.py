"""Debian's Prometheus on loopback, as `make test-native` unpacks it (Makefile), and its tool."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.conftest import ROOT

LIMIT_S = 50.0
_CONFIG = """\
global:
  scrape_interval: 1s
  evaluation_interval: 1s
rule_files: [{rules}]
scrape_configs:
  - job_name: tierblk
    static_configs: [{{targets: {targets}}}]
"""


def program(name: str) -> Path:
    """prometheus or promtool."""
    path = Path(os.environ.get("TIERBLK_BUILD_DIR") or ROOT / "build") / "prometheus" / "usr" / "bin" / name
    assert path.exists(), f"{path} is missing: `make test-native` unpacks it"
    return path


def promtool(*words: str | Path, stdin: bytes | None = None) -> str:
    """What it says when it finds nothing wrong."""
    done = subprocess.run(
        [program("promtool"), *words], input=stdin, capture_output=True, check=False, timeout=LIMIT_S
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


class Prometheus:
    """Scrapes addresses once a second, and answers queries."""

    def __init__(self, folder: Path, targets: Sequence[str], rules: Path) -> None:
        self._folder = folder
        config = folder / "prometheus.yml"
        config.write_text(_CONFIG.format(rules=rules, targets=json.dumps(list(targets))))
        self._words = [
            str(program("prometheus")),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--query.lookback-delta=10s",
            "--log.level=warn",
        ]

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        words = [*self._words, f"--web.listen-address={self.address}"]
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)

    async def __aenter__(self) -> Self:
        """It answers queries."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not await self._comes_up():
                    said = (self._folder / "log").read_text()
                    assert "address already in use" in said, said  # the port was somebody's in between
        except BaseException:
            self._kill()
            raise
        self._session = aiohttp.ClientSession(f"http://{self.address}")
        return self

    async def _comes_up(self) -> bool:
        """False: it ended."""
        self._start()
        async with aiohttp.ClientSession(f"http://{self.address}") as session:
            while self._process.poll() is None:
                try:
                    async with session.get("/-/ready") as answer:
                        if answer.status == 200:
                            return True
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)
        return False

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT_S)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        self._kill()

    async def ask(self, path: str, **query: str) -> Any:
        """The data of an answer; what is wrong with a question is an AssertionError."""
        async with self._session.get(f"/api/v1/{path}", params=query) as answer:
            said = await answer.json()
        assert said["status"] == "success", f"{query}: {said.get('error')}"
        return said["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        data = await self.ask("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        found: list[dict[str, Any]] = data["result"]
        return found

    async def until(self, expression: str) -> None:
        """Until an expression gives something."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                if await self.query(expression):
                    return
                await asyncio.sleep(0.1)
