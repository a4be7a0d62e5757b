"""A fault server in another process: one JSON object per line, over TCP on 127.0.0.1 or a unix socket.

    {"do": "faults", "faults": "truncate=0.05", "seed": 7}    from the next request on; seed is optional
    {"do": "force", "faults": ["truncate", "stall"]}          the next requests get these
    {"do": "shape", "latency_s": 0.02, "bytes_per_s": 125e6}  each optional; bytes_per_s 0: no limit
    {"do": "gone"} {"do": "blackhole"} {"do": "back"}
    {"do": "replace", "image": PATH, "etag": "\\"two\\""}       another version; etag is optional
    {"do": "release"} {"do": "expire"}                        see FaultServer
    {"do": "stats"}                                           counters, and how often bytes went out
    {"do": "log", "since": 0}                                 requests, from that number on
    {"do": "forget"}                                          log and counters begin anew
    {"do": "stop"}                                            the server ends

The answer is {"ok": true, ...} or {"ok": false, "error": "one sentence"}. From a shell, with the same words:

    python3 -m tests.faults.control ADDRESS faults faults=truncate=0.05 seed=7

ADDRESS is a port, or the path of a socket. The answer is printed; the exit code says whether it was ok.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import Any, Self

from tests.faults.content import Content
from tests.faults.server import FaultServer

LINE_MAX_BYTES = 64 * 1024
TIMEOUT_S = 20.0
LOG_LINES_MAX = 10_000


class ControlServer:
    """The channel of one server. done: set when somebody said stop."""

    def __init__(self, server: FaultServer) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[Any]] = set()
        self.done = asyncio.Event()

    async def start(self, address: str) -> str:
        """Listens at a port (0: any free one) or socket path; returns which. Raises OSError."""
        if address.isdigit():
            self._listener = await asyncio.start_server(
                self._serve, "127.0.0.1", int(address), limit=LINE_MAX_BYTES
            )
            return str(self._listener.sockets[0].getsockname()[1])
        self._listener = await asyncio.start_unix_server(self._serve, address, limit=LINE_MAX_BYTES)
        return address

    async def aclose(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, ValueError):  # ValueError: an endless line
                while line := await reader.readline():
                    writer.write(json.dumps(await self._obey(line)).encode() + b"\n")
                    await writer.drain()
        except asyncio.CancelledError:
            pass  # the server ends
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _obey(self, line: bytes) -> dict[str, Any]:
        try:
            command = json.loads(line)
            return {"ok": True, **await self._do(command.pop("do"), **command)}
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}

    async def _do(self, do: str, **keys: Any) -> dict[str, Any]:
        server = self._server
        match do:
            case "faults":
                server.set_faults(
                    str(keys["faults"]), None if keys.get("seed") is None else int(keys["seed"])
                )
            case "force":
                names = keys["faults"]
                server.force(*(names.split(",") if isinstance(names, str) else names))
            case "shape":
                server.shape(**{name: float(value) for name, value in keys.items()})
            case "gone":
                await server.gone()
            case "blackhole" | "back" | "release" | "expire":
                getattr(server, do)()
            case "replace":
                server.replace(Content(keys["image"], keys.get("etag")))
            case "stats":
                return stats(server)
            case "log":
                return {"log": server.ledger.log(int(keys.get("since", 0)))[:LOG_LINES_MAX]}
            case "forget":
                server.ledger.forget()
            case "stop":
                self.done.set()
            case _:
                raise ValueError(f"{do!r} is no command")
        return {}


def stats(server: FaultServer) -> dict[str, Any]:
    """What `stats` answers."""
    return {
        "state": server.state,
        "etag": server.content.etag,
        "connections": server.connections,
        "open_connections": server.open_connections,
        "stalled": server.stalled,
        **server.ledger.summary(),
    }


class Control:
    """The other end of the channel, for tests; blocks."""

    def __init__(self, address: str | int) -> None:
        """A port of 127.0.0.1, or the path of a socket. Raises OSError."""
        if str(address).isdigit():
            self._socket = socket.create_connection(("127.0.0.1", int(address)), TIMEOUT_S)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(TIMEOUT_S)
            self._socket.connect(str(address))
        self._lines = self._socket.makefile("rb")

    def ask(self, do: str, **keys: Any) -> dict[str, Any]:
        """One command of the table above; its answer. RuntimeError: the server refused. Raises OSError."""
        self._socket.sendall(json.dumps({"do": do, **keys}).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the fault server has ended")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def main(words: list[str]) -> int:
    """The shell's way."""
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        print("usage: python3 -m tests.faults.control ADDRESS COMMAND [NAME=VALUE...]", file=sys.stderr)
        return 2
    try:
        with Control(words[0]) as control:
            keys = dict(word.split("=", 1) for word in words[2:])
            print(json.dumps(control.ask(words[1], **keys), indent=1))
    except (OSError, RuntimeError) as error:
        print(f"fault server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
