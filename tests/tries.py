"""Schemathesis tries a control interface by its own description: what fits it, what does not, at the edges
and at random, from a fixed seed, with devices that one request makes and the next one uses."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tierblk.rundir import socket_address

LIMIT_S = 120.0
EXAMPLES = os.environ.get("TIERBLK_TRIES", "12")
"""Random cases for each operation, beside those at the edges: TIERBLK_TRIES=1000 for a long run."""

# A config has rules between its keys, and ranges of sizes with units, which no schema says.
SETTINGS = """
[[operations]]
include-operation-id = "attach"
checks.positive_data_acceptance.enabled = false

# Its answer ends when its client hangs up.
[[operations]]
include-operation-id = "trace"
enabled = false
"""


async def tried(run_dir: Path, folder: Path, settings: str = "") -> tuple[int, str]:
    """(cases that were tried, what was found), of the interface in run_dir. settings: more of Schemathesis's.
    AssertionError: it found something wrong."""
    config = folder / "schemathesis.toml"
    config.write_text(SETTINGS + settings)
    async with reachable(run_dir) as origin, asyncio.timeout(LIMIT_S):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "schemathesis.cli", "--config-file", str(config), "--no-color"),
            *("run", f"{origin}/v1/openapi.json", "--max-examples", EXAMPLES),
            *("--generation-deterministic", "--continue-on-failure"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=folder,
        )
        try:
            said = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0, said
    found = re.search(r"(\d+) generated", said)
    assert found, said
    return int(found[1]), said


@asynccontextmanager
async def reachable(run_dir: Path) -> AsyncIterator[str]:
    """The control socket behind a port of loopback, for clients that know no other address; its origin."""
    running: set[asyncio.Task[None]] = set()

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with socket_address(run_dir) as address:
            far_reader, far_writer = await asyncio.open_unix_connection(address)
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        task.add_done_callback(running.discard)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
