"""A host that writes to a volume in an S3 server dies at any moment, and loses its cache every other time:
what is there afterwards is what it wrote up to some moment, and nothing that was promised is missing."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.cache_rig import run_directory
from tests.integration.relay import Faults, Relay
from tests.integration.seaweed import SeaweedServer
from tests.torture import stamper
from tests.torture.rig import MIB, say
from tests.torture.stamper import Order
from tests.torture.stamps import PAGE_BYTES, History
from tierblk.remote import RECORD_BYTES_MAX, EpochName, Store, decode_record

VOLUME_BYTES = (8 * MIB, 8 * MIB, 8 * MIB, 20 * MIB)
"""In turn; the cache has 16 MiB."""
SECONDS = (0.05, 0.9)
"""How long a host writes before it is killed."""
EARLY = 0.15
"""So often one is killed while it attaches."""
ATTACH_LIMIT_S = 60.0
VOLUME_ROUNDS = 25
"""Then the next volume begins, with an empty cache."""
FAULTS = Faults(busy=0.02, reset=0.02, lost=0.02, broken=0.01, cut=0.01, late=0.2, late_s=0.03)


@dataclass(frozen=True)
class Consistency:
    """A run of `count` rounds. folder: made, and removed afterwards if nothing was wrong."""

    seed: int
    count: int
    folder: Path


@dataclass
class Tally:
    """What the rounds came to."""

    rounds: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    epochs: int = 0
    retried: int = 0
    wrong: list[str] = field(default_factory=list)


def run(plan: Consistency) -> dict[str, Any]:
    """Does it; a summary for JSON, of which `wrong` is a list of sentences, empty when all was right."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    tally, began_s = Tally(), time.monotonic()
    with run_directory(plan.folder) as run_dir:
        volumes = max(20, 2 * plan.count)
        with SeaweedServer(plan.folder / "seaweed", volumes=volumes) as server:
            asyncio.run(_all(plan, server, run_dir, tally))
    if not tally.wrong:
        shutil.rmtree(plan.folder)
    return {
        "run": "consistency",
        "seed": plan.seed,
        "rounds": dict(tally.rounds),
        "seconds": round(time.monotonic() - began_s, 1),
        "writes": tally.writes,
        "epochs": tally.epochs,
        "attaches_tried_again": tally.retried,
        "wrong": tally.wrong,
    }


async def _all(plan: Consistency, server: SeaweedServer, run_dir: Path, tally: Tally) -> None:
    field_: _Field | None = None
    async with Relay(server.port, faults=FAULTS, seed=plan.seed) as relay:
        for number in range(plan.count):
            if number % VOLUME_ROUNDS == 0:
                if field_ is not None:
                    await field_.aclose()
                name = f"{number // VOLUME_ROUNDS}"
                size_bytes = VOLUME_BYTES[int(name) % len(VOLUME_BYTES)]
                field_ = _Field(plan, name, size_bytes, run_dir / name, server, relay, tally)
            assert field_ is not None
            wrong = await field_.round(last=number == plan.count - 1)
            if wrong:
                field_.keep_lines()
                where = f"round {number} of seed {plan.seed}, see {field_.folder}"
                tally.wrong += [f"{where}: {sentence}" for sentence in wrong]
                break
            if number % 10 == 9:
                done = f"{tally.epochs} epochs, {tally.writes} writes"
                say(f"{number + 1}/{plan.count} rounds: {dict(tally.rounds)}, {done}")
        if field_ is not None:
            await field_.aclose()


async def _started(order: Order) -> tuple[BaseProcess, asyncio.StreamReader]:
    """The process, and what it says; forked from one that has loaded all that it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.torture.stamper", "botocore.session", "tierblk.remote.s3", "zstandard"]
    )
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=stamper.main, args=(order, theirs))
    await asyncio.to_thread(child.start)
    theirs.close()
    lines = asyncio.StreamReader()
    pipe = os.fdopen(os.dup(ours.fileno()), "rb")
    ours.close()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), pipe)
    return child, lines


class _Field:
    """One volume, and the host that dies."""

    def __init__(
        self,
        plan: Consistency,
        name: str,
        size_bytes: int,
        run_dir: Path,
        server: SeaweedServer,
        relay: Relay,
        tally: Tally,
    ) -> None:
        self.folder = plan.folder / name
        self._size_bytes = size_bytes
        self._run_dir = run_dir
        self.folder.mkdir()
        run_dir.mkdir()
        self._url = server.url(name)
        self._server = server
        self._relay = relay
        self._chance = random.Random(f"{plan.seed} {name}")
        self._tally = tally
        self._history = History.of(size_bytes // PAGE_BYTES)
        self._records: dict[int, str] = {}
        self._store: Store | None = None
        self._lines: list[str] = []
        self._seq = 1
        self._kept = "all"  # the worst that happened since the content was looked at
        self._served = False  # by the last host, all the way to its first write

    async def aclose(self) -> None:
        """Its store."""
        if self._store is not None:
            await self._store.aclose()

    def keep_lines(self) -> None:
        """What the hosts said goes to the folder."""
        (self.folder / "lines").write_text("\n".join(self._lines))

    async def round(self, *, last: bool) -> list[str]:
        """A host attaches, all is read, it writes, and is killed; then something is lost. What was wrong."""
        order = self._order()
        self._copy()
        is_early = not last and self._chance.random() < EARLY
        child, lines = await _started(order)
        wrong: list[str] = []
        try:
            if is_early:
                await self._lines_for(lines, self._chance.uniform(0.3, 1.5))
            else:
                wrong = await self._look(lines, order)
            if not wrong and not is_early:
                wrong = await self._lines_for(lines, self._chance.uniform(*SECONDS))
        finally:
            child.kill()
            wrong += await self._lines_for(lines, ATTACH_LIMIT_S)
            await asyncio.to_thread(child.join, ATTACH_LIMIT_S)
            child.close()
        self._history.died()
        self._served = not is_early
        self._tally.rounds["early" if is_early else "full"] += 1
        self._lose()
        return wrong

    def _order(self) -> Order:
        how = "take-over" if self._kept == "none" else "attach"
        if self._kept == "all" and self._served and self._chance.random() < 0.5:
            how = "go-on"
        settings = {
            "size": self._size_bytes,
            "epoch_interval": f"{self._chance.choice([100, 200, 500])}ms",
            "epoch_size": self._chance.choice([1, 4]) * MIB,
            "compression": self._chance.choice(["none", "zstd"]),
            "upload_requests": self._chance.choice([1, 4]),
        }
        self._tally.rounds[how] += 1
        return Order(
            str(self.folder),
            str(self._run_dir),
            self._url,
            self._relay.endpoint,
            str(self.folder / "content"),
            how,
            self._chance.randrange(1 << 30),
            self._seq,
            settings,
        )

    def _copy(self) -> None:
        """The cache as the host will find it, to look into should it not be right."""
        copy = self.folder / "found"
        shutil.rmtree(copy, ignore_errors=True)
        if (self.folder / "cache").exists():
            shutil.copytree(self.folder / "cache", copy)

    async def _lines_for(self, lines: asyncio.StreamReader, seconds: float) -> list[str]:
        """What it says until it ends, or for so long."""
        wrong: list[str] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while line := (await lines.readline()).decode():
                    self._take(line.rstrip(), wrong)
        return wrong

    def _take(self, line: str, wrong: list[str]) -> str:
        """Whether it is of the history. A line that was cut by the end says nothing."""
        self._lines.append(line)
        kind = line[:1]
        if kind == "X":
            wrong.append(line)
        elif kind == "R":
            self._tally.retried += 1
        elif kind != "A":
            self._history.tell(line)
            if kind == "I":
                self._seq = max(self._seq, int(line.split()[1]) + 1)
                self._tally.writes += 1
        return kind

    async def _look(self, lines: asyncio.StreamReader, order: Order) -> list[str]:
        """Until it has attached: what it found is judged."""
        wrong: list[str] = []
        kind = line = ""
        try:
            async with asyncio.timeout(ATTACH_LIMIT_S):
                while kind != "A" and (line := (await lines.readline()).decode().rstrip()):
                    kind = self._take(line, wrong)
        except TimeoutError:
            return [f"it did not attach ({order.how}) for {ATTACH_LIMIT_S} s"]
        if kind != "A":
            return wrong or ["it ended while it attached, see stderr"]
        await self._read_records(int(line.split()[1]))
        content = (self.folder / "content").read_bytes()
        wrong += self._history.verdict(content, self._kept, self._records)
        self._lines.append(f"- verdict {self._kept} {order.how}: {len(wrong)} wrong")
        self._tally.rounds[f"kept {self._kept}"] += 1
        self._kept = "all"
        return wrong

    async def _read_records(self, head: int) -> None:
        """Which of the epochs that were sealed there are."""
        if self._store is None:
            self._store = await self._server.store(self._url)
        for epoch in sorted(
            {epoch for epoch, _ in self._history.seals if epoch <= head} - self._records.keys()
        ):
            name = str(EpochName(epoch))
            data = await self._store.read(name, RECORD_BYTES_MAX)
            assert data is not None, name
            record = decode_record(data, name=name)
            self._records[epoch] = record.attempt.hex()
            self._tally.epochs += 1

    def _lose(self) -> None:
        """What goes with the host: half of the time its disk, in a quarter only its memory."""
        what = self._chance.choices(["none", "disk", "all"], [2, 1, 1])[0]
        if what != "all":
            shutil.rmtree(self._run_dir)
            self._run_dir.mkdir()
        if what == "none":
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        if what == "disk":
            self._history.lost_memory()
        worse = ["all", "disk", "none"]
        self._kept = max(self._kept, what, key=worse.index)
