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
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._folder = folder
        config = folder / "prometheus.yml"
        config.write_text(_CONFIG.format(rules=rules, targets=json.dumps(list(targets))))
        self._words = [
            str(program("prometheus")),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}",
            "--query.lookback-delta=10s",
            "--log.level=warn",
        ]

    def _start(self) -> None:
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=subprocess.STDOUT)

    async def __aenter__(self) -> Self:
        self._start()
        self._session = aiohttp.ClientSession(f"http://{self.address}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        self._process.kill()
        self._process.wait(LIMIT_S)

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
        """Until an expression gives something; also while it starts."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                try:
                    if await self.query(expression):
                        return
                except aiohttp.ClientError:
                    pass  # it starts
                await asyncio.sleep(0.1)
