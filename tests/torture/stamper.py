"""The process that consistency.py kills: a host that attaches a volume, puts what is on it into a file, and
writes stamped pages until it dies. What it does it says in lines (see stamps.History), and:

    A EPOCH    attached, the volume's head is at that epoch, and its content is in the file
    R TEXT     an attach failed and is tried again
    X TEXT     what must not be
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.far_rig import Host, config_of
from tests.integration.seaweed import CREDENTIALS
from tests.torture.stamps import PAGE_BYTES, stamp
from tierblk.claim import Wishes
from tierblk.core import Layer
from tierblk.errors import RemoteUnavailable
from tierblk.standing import Standing
from tierblk.units import MIB

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": CREDENTIALS.access_key,
    "AWS_SECRET_ACCESS_KEY": CREDENTIALS.secret_key,
    "AWS_EC2_METADATA_DISABLED": "true",
}
THREADS = 2
PART_BYTES = 1 * MIB


@dataclass(frozen=True)
class Order:
    """What the process is to do. how: "attach", "take-over", or "go-on" with a device that is there.
    settings: of [volume]. content: where what is there is put."""

    folder: str
    run_dir: str
    url: str
    endpoint: str
    content: str
    how: str
    seed: int
    first_seq: int
    settings: dict[str, Any]


def say(*words: object) -> None:
    """A line, at once: it is there whatever happens to this process then."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def tell_of_seals() -> None:
    """Each cut is told before and after it is made, and what it is for."""
    seal, intend = Layer.seal, Standing.intend

    def told_seal(layer: Layer) -> None:
        say("E")
        seal(layer)
        say("L")

    def told_intend(standing: Standing, epoch: int, attempt: bytes) -> Standing:
        say("N", epoch, attempt.hex())
        return intend(standing, epoch, attempt)

    Layer.seal = told_seal  # type: ignore[method-assign,assignment]
    Standing.intend = told_intend  # type: ignore[method-assign,assignment]


class Stamper:
    """Threads that write until the process dies."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop, order: Order) -> None:
        self._host = host
        self._loop = loop
        self._seqs = itertools.count(order.first_seq)
        self._numbers = itertools.count()
        self._pages = host.far.layer.size_bytes // PAGE_BYTES
        for thread in range(THREADS):
            chance = random.Random(f"{order.seed} {thread}")
            threading.Thread(target=self._run, args=(chance,), daemon=True).start()

    def _run(self, chance: random.Random) -> None:
        try:
            while True:
                self._one(chance)
        except BaseException as error:
            say("X", "writing:", repr(error))

    def _one(self, chance: random.Random) -> None:
        door = self._host.door
        kind = chance.choices("wzfs", [100, 10, 4, 0.5])[0]
        if kind == "f":
            self._told("F", "f", door.flush)
            return
        if kind == "s":
            sync = self._host.volumes.sync(self._host.far)
            self._told("S", "s", lambda: asyncio.run_coroutine_threadsafe(sync, self._loop).result())
            return
        seq = next(self._seqs)
        count = chance.choice([1, 1, 1, 2, 3, 16, 40])
        first = chance.randrange(self._pages - count)
        say("I", seq, first, count, kind)
        if kind == "w":
            door.write(first * PAGE_BYTES, b"".join(stamp(seq, page) for page in range(first, first + count)))
        else:
            door.discard(first * PAGE_BYTES, count * PAGE_BYTES)
        say("C", seq)

    def _told(self, begun: str, ended: str, call: Callable[[], object]) -> None:
        number = next(self._numbers)
        say(begun, number)
        call()
        say(ended, number)


async def serve(order: Order) -> None:
    """Until it is killed, or its standard input ends."""
    config = config_of(Path(order.folder), order.url, endpoint=order.endpoint, **order.settings)
    host = await Host.start(config, Path(order.run_dir))
    while True:
        try:
            await host.attach(Wishes(take_over=order.how == "take-over"), goes_on=order.how == "go-on")
            break
        except RemoteUnavailable as error:
            say("R", error)
    parts = [await host.read(at, PART_BYTES) for at in range(0, host.far.layer.size_bytes, PART_BYTES)]
    Path(order.content).write_bytes(b"".join(parts))
    if order.how == "go-on":
        await asyncio.wait(host.volumes._catching_up.values())
    if host.far.standing.fenced:
        say("X", "fenced:", host.far.standing.fenced)
    say("A", host.far.extents.head.epoch)
    Stamper(host, asyncio.get_running_loop(), order)
    await asyncio.Event().wait()


def main(order: Order, lines: Connection) -> None:
    """Of the process, which ends with its parent. lines: where what it says goes."""
    os.environ.update(ENVIRONMENT)
    os.dup2(lines.fileno(), 1)
    lines.close()
    errors = os.open(Path(order.folder) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tell_of_seals()
    try:
        asyncio.run(serve(order))
    except BaseException as error:
        say("X", repr(error), getattr(error, "hint", ""))
        raise


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
