"""A make-believe host for `tierblk top`: two daemons whose numbers move as those of real ones do.

    python3 -m bench.top picture FILE  draws the screen as it looks then (make picture: docs/top.svg)
    python3 -m bench.top serve DIR     answers on sockets below DIR until Ctrl-C, to try the screen with:
                                       TIERBLK_RUN_DIR=DIR tierblk top

Nothing is measured, and no device is made.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK_S = 1e-9
BUCKETS = 160
SLOT_BYTES = 65536
BEGAN_UNIX_S = 1_790_000_000.0
IMAGES = ("https://images.example.org/debian-13-generic-amd64.raw", "https://ci.example.net/runner.img")


@dataclass(frozen=True)
class Load:
    """Requests a second of a device, by kind; hit_us, miss_us, write_us: what half of them take."""

    name: str
    image: int | None
    hit: float
    miss: float
    write: float = 0.0
    hit_us: float = 90
    miss_us: float = 24_000
    write_us: float = 160
    far: str | None = None
    state: str = "ok"


LOADS: Sequence[Sequence[Load]] = (
    (
        Load("db-primary", None, 3100, 12, 2400, hit_us=110, far="s3://volumes/db-primary"),
        Load("web-frontend-eu-west-1", 0, 420, 3.0),
        Load("web-frontend-eu-west-2", 0, 390, 2.6),
    ),
    (
        Load("ci-runner-07", 1, 5200, 160, 640, hit_us=70, miss_us=38_000, far="s3://volumes/ci-runner-07"),
        Load("ci-runner-08", 1, 0.4, 0, state="degraded"),
    ),
)
AWAY = f"{IMAGES[1]} has not answered for 30 s: connection timed out"


def _grown(rate: float, at_s: float, phase: float) -> int:
    """What a rate that swings by half within 40 seconds has made so far."""
    wave = math.tau / 40
    return int(rate * (at_s - 0.5 * (math.cos(wave * at_s + phase) - math.cos(phase)) / wave))


def _spread(total: int, half_us: float) -> list[int]:
    """So many requests over the buckets around a latency, with a tail."""
    middle = 4 * math.log2(max(half_us * 1e-6 / TICK_S, 8)) - 8
    weights = [math.exp(-(((at - middle) / (2.2 if at < middle else 4.5)) ** 2)) for at in range(BUCKETS)]
    scale = sum(weights)
    return [int(total * weight / scale) for weight in weights]


def device(load: Load, number: int, at_s: float) -> dict[str, Any]:
    """As a sample has it (tierblk/sample.py)."""
    hit, miss, write = (_grown(rate, at_s, number) for rate in (load.hit, load.miss, load.write))
    flush = write // 40
    shown: dict[str, Any] = {
        "name": load.name,
        "path": f"/dev/ublkb{number}",
        "plane": "zero-copy",
        "size_bytes": 20 * 2**30,
        "state": load.state,
        "reason": AWAY if load.state != "ok" else None,
        "since": BEGAN_UNIX_S + at_s - 95 if load.state != "ok" else None,
        "url": None if load.image is None else IMAGES[load.image],
        "volume": "write-back" if load.far else None,
        "attached": BEGAN_UNIX_S,
        "recovered": None,
        "hit_requests": hit,
        "hit_bytes": hit * 18_000,
        "zero_requests": hit // 50,
        "zero_bytes": hit // 50 * 4096,
        "miss_requests": miss,
        "miss_bytes": miss * 40_000,
        "fetched_bytes": miss * 65_536,
        "write_requests": write,
        "write_bytes": write * 9_000,
        "flush_requests": flush,
        "discard_requests": 0,
        "errors": 0,
        "paced": 0,
        "space_waits": 0,
        "waiting": 7 if load.state != "ok" else int(load.miss / 20),
        "oldest_wait_ms": 64_000 if load.state != "ok" else 38,
        "tick_s": TICK_S,
        "latency_counts": {
            "hit": _spread(hit * 2 // 3, load.hit_us),
            "memory": _spread(hit // 3, load.hit_us / 8),
            "zero": _spread(hit // 50, 4),
            "miss": _spread(miss, load.miss_us),
            "write": _spread(write, load.write_us),
            "flush": _spread(flush, 2100),
        },
    }
    if load.far:
        shown["write_back"] = _upload(load, at_s)
    return shown


def _upload(load: Load, at_s: float) -> dict[str, Any]:
    """An epoch of ten seconds after the other."""
    epoch, begun_s = divmod(at_s, 10)
    speed = 38e6 if load.name == "db-primary" else 9e6
    sealed = int(speed * 9)
    sent = min(sealed, int(begun_s * speed) // 16_777_216 * 16_777_216)
    before = int(epoch) * sealed
    return {
        "url": load.far,
        "epoch": 1800 + int(epoch),
        "dirty_bytes": sealed + int(begun_s * 6e6),
        "dirty_since": BEGAN_UNIX_S + at_s - begun_s - 4,
        "uploading": True,
        "sealed_bytes": sealed,
        "sent_bytes": sent,
        "sending": 4,
        "uploaded_bytes": before + sent,
        "put_bytes": (before + sent) // 2,
        "fullness": 0.31 if load.name == "db-primary" else 0.82,
        "durability": "local",
        "trouble": None,
        "fenced": None,
    }


def sample(number: int, at_s: float, *, unix_s: float | None = None) -> dict[str, Any]:
    """What the daemon of that number says when it has run for so long."""
    first = sum(len(loads) for loads in LOADS[:number])
    devices = [device(load, first + at, at_s) for at, load in enumerate(LOADS[number])]
    shift_s = 0.0 if unix_s is None else unix_s - (BEGAN_UNIX_S + at_s)
    for each in devices:
        if each["since"] is not None:
            each["since"] += shift_s
        if "write_back" in each:
            each["write_back"]["dirty_since"] += shift_s
    slots = (512, 64)[number] * 2**30 // 1024 // SLOT_BYTES * 100
    away = {
        "state": "degraded",
        "since": BEGAN_UNIX_S + at_s - 95 + shift_s,
        "reason": AWAY,
        "next_try_s": 0.6,
    }
    fine = {"state": "ok", "since": None, "reason": None, "next_try_s": None}
    remotes: list[dict[str, Any]] = []
    for each in devices:
        fetched = {"fetched_bytes": each["fetched_bytes"], "requests": each["miss_requests"]}
        if each["url"] and each["url"] not in [remote["url"] for remote in remotes]:
            users = [other["name"] for other in devices if other["url"] == each["url"]]
            trouble = away | {"waiting": 7} if number else fine | {"waiting": 0}
            remotes.append(
                {"kind": "image", "url": each["url"], "devices": users, **fetched, **trouble}
                | {"retries": 0, "errors": 0}
            )
        if "write_back" in each:
            remotes.append(
                {"kind": "store", "url": each["write_back"]["url"], "devices": [each["name"]], **fetched}
                | fine
                | {"waiting": 0, "retries": 0, "errors": 0}
            )
    return {
        "unix_s": BEGAN_UNIX_S + at_s + shift_s,
        "monotonic_s": 1000.0 + at_s,
        "daemon": {
            "pid": 4100 + number,
            "started": BEGAN_UNIX_S,
            "cache_dir": ("/var/cache/tierblk", "/mnt/nvme1/tierblk-ci")[number],
        },
        "cache": {
            "slots": slots,
            "free": slots // 20,
            "dirty_slots": slots // 9,
            "quarantined": 40 + int(at_s) % 25,
            "bad": 0,
            "evicted": _grown((12, 420)[number], at_s, 1),
            "throttle": {"reason": "upload", "bytes_per_s": 21_000_000} if number else None,
            "commit_failure": None,
        },
        "devices": devices,
        "remotes": remotes,
    }


def picture(path: Path, width: int = 100, height: int = 30, rounds: int = 96) -> None:
    """The overview after so many rounds, as SVG."""
    from rich.console import Console

    from tierblk.cli.top_model import Answer, Model
    from tierblk.cli.top_rows import View, footer, overview, select
    from tierblk.cli.top_screen import Drawing

    model = Model()
    for second in range(1, rounds + 1):
        samples = [sample(number, float(second)) for number in range(len(LOADS))]
        answers = [
            Answer(str(number), said["daemon"]["cache_dir"], said["daemon"]["pid"], said)
            for number, said in enumerate(samples)
        ]
        shown = model.update(answers, now_s=float(second), unix_s=samples[0]["unix_s"])
    view = select(shown, View(width=width, height=height), 0)
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Drawing(overview(shown, view), footer(view), height), end="")
    svg = console.export_svg(title="tierblk top", unique_id="top")
    # Fonts of the reader's machine: nothing is fetched from elsewhere to show it.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


async def serve(folder: Path, ready: Callable[[], None] = lambda: None) -> None:
    """Answers GET /v1/top on a socket a daemon, until cancelled."""
    began_s = time.monotonic()
    servers = []
    for number in range(len(LOADS)):

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, n: int = number) -> None:
            import json

            await reader.readuntil(b"\r\n\r\n")
            body = json.dumps(sample(n, 60 + time.monotonic() - began_s, unix_s=time.time())).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            writer.close()

        run_dir = folder / str(number)
        run_dir.mkdir(parents=True, exist_ok=True)
        socket_path = run_dir / "control.sock"
        socket_path.unlink(missing_ok=True)
        servers.append(await asyncio.start_unix_server(answer, socket_path))
    ready()
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(
        prog="bench.top", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("picture", "serve"))
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    if args.what == "picture":
        os.environ["TZ"] = "UTC"  # the same picture everywhere
        time.tzset()
        picture(args.path)
        return
    try:
        asyncio.run(serve(args.path))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
