"""The fault server as a process of its own; it says on one line where it listens and runs until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import ssl
import sys
from pathlib import Path

from tests.faults.content import Content
from tests.faults.control import ControlServer
from tests.faults.plan import Plan
from tests.faults.server import FaultServer

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def duration_s(text: str) -> float:
    """Seconds of "20ms", "1.5s" or "2"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 20ms or 1.5s")
    return float(match[1]) * (0.001 if match[2] == "ms" else 1)


def rate_bytes_per_s(text: str) -> float:
    """Bytes per second of "125MB", "10MiB" or "64000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]I?)?B?(/S)?", text.upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate, such as 125MB or 10MiB")
    return float(match[1]) * UNITS[match[2] or ""]


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m tests.faults", description=__doc__)
    parser.add_argument("--image", required=True, type=Path, help="the file that every path serves")
    parser.add_argument("--etag", help="without quotes; else made of the file's size and time")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--port-file", type=Path, help="gets the port, and in a second line that of --control"
    )
    parser.add_argument(
        "--faults", default="", help="NAME[=PROBABILITY[:VALUE]],..., see tests/faults/__init__.py"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--healthy-requests", type=int, default=0, help="so many in the beginning get no fault"
    )
    parser.add_argument("--latency", type=duration_s, default=0.0, help="before each answer, such as 20ms")
    parser.add_argument(
        "--bandwidth", type=rate_bytes_per_s, help="of all connections together, such as 125MB"
    )
    parser.add_argument("--tls", nargs=2, type=Path, metavar=("CERT", "KEY"))
    parser.add_argument(
        "--stranger", nargs=2, type=Path, metavar=("CERT", "KEY"), help="for the fault stranger"
    )
    parser.add_argument(
        "--control", metavar="PORT|PATH", help="where to listen for commands; 0: any free port"
    )
    return parser.parse_args(words)


def context(pair: list[Path] | None) -> ssl.SSLContext | None:
    """Of a server with this certificate and key."""
    if pair is None:
        return None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.load_cert_chain(pair[0], pair[1])
    return made


async def run(options: argparse.Namespace) -> None:
    etag = None if options.etag is None else f'"{options.etag}"'
    server = FaultServer(
        Content(options.image, etag),
        Plan.parse(options.faults, options.seed, options.healthy_requests),
        latency_s=options.latency,
        bytes_per_s=options.bandwidth,
        tls=context(options.tls),
        stranger=context(options.stranger),
        host=options.host,
        port=options.port,
    )
    async with server:
        control = ControlServer(server)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, control.done.set)
        where = "" if options.control is None else await control.start(options.control)
        if options.port_file is not None:
            fresh = options.port_file.with_name(f"{options.port_file.name}.new")
            fresh.write_text(f"{server.port}\n{where}\n")
            os.replace(fresh, options.port_file)  # whoever sees the file sees all of it
        print(f"{server.url()} control {where or '-'}", flush=True)
        await control.done.wait()
        if where:
            await control.aclose()


def main() -> int:
    options = arguments(sys.argv[1:])
    try:
        asyncio.run(run(options))
    except (OSError, ValueError) as error:
        print(f"fault server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
