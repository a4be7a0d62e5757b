"""A volume in object storage beside a model of it: threads that read and write, a store that answers late and
in pieces, seals, uploads, evictions. Every sector that is read was current at some time of its read (I1), an
epoch is the volume at its seal (I9), and the masks agree with each other whenever nothing is under way.

TIERBLK_PROPERTY_STEPS=N: so many operations, from another seed each time."""

from __future__ import annotations

import itertools
import os
import random
import secrets
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.core_far_rig import ALL, BASE, VOLUME, FarRig
from tests.property.effort import STEPS_VARIABLE
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, PREFETCH, LocalDoor, Record, Sealed

SECTOR = 512
BLOCKS, BASE_BLOCKS, SLOTS, RESERVE = 12, 5, 15, 2
PINNED_MAX = 3
SECTORS = (BLOCKS - 1) * BLOCK_BYTES // SECTOR  # the last block is nobody's, see FarRig.looked_up
PAGES = SECTORS * SECTOR // PAGE_BYTES
WORKERS, ROUND = 5, 40
OF_BASE, OF_STORE = 1 << 40, 1 << 41


def sectors(value: int, count: int) -> bytes:
    return value.to_bytes(8, "little") * (SECTOR // 8) * count


def values(sector: bytes) -> set[int]:
    """One, but for a sector that was read while it was written."""
    if sector == sector[:8] * (SECTOR // 8):
        return {int.from_bytes(sector[:8], "little")}
    return {int.from_bytes(sector[at : at + 8], "little") for at in range(0, SECTOR, 8)}


class History:
    """What was written to each sector, (begun, ended, value), and what was seen of it."""

    def __init__(self) -> None:
        self.clock = itertools.count(1)
        self.writes: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.seen: list[tuple[str, int, int, int, bytes]] = []

    def now(self) -> int:
        return next(self.clock)

    def wrote(self, begun: int, first: int, count: int, value: int) -> None:
        ended = self.now()
        for sector in range(first, first + count):
            self.writes[sector].append((begun, ended, value))

    def saw(self, what: str, begun: int, first: int, data: bytes, ended: int | None = None) -> None:
        self.seen.append((what, begun, self.now() if ended is None else ended, first, data))

    def wrong(self) -> list[str]:
        """What was seen and was no state of its sector between begin and end. Calls may not be under way."""
        found = []
        for what, begun, ended, first, data in self.seen:
            for at in range(0, len(data), SECTOR):
                sector = first + at // SECTOR
                writes = self.writes[sector]
                newest = max((w[0] for w in writes if w[1] < begun), default=0)
                allowed = {value for start, end, value in writes if start < ended and end >= newest}
                if not values(data[at : at + SECTOR]) <= allowed:
                    found.append(
                        f"{what} {begun}..{ended} sector {sector} has {values(data[at : at + SECTOR])}, "
                        f"not {allowed}: {writes[-6:]}"
                    )
        self.seen.clear()
        return found

    def forget(self, since: int) -> None:
        """What nobody can see any more who begins then or later."""
        for sector, writes in self.writes.items():
            newest = max((w[0] for w in writes if w[1] < since), default=0)
            self.writes[sector] = [w for w in writes if w[1] >= newest]


class World:
    def __init__(self, folder: Path, seed: int, with_base: bool) -> None:
        self.random = random.Random(seed)
        base = (
            b"".join(sectors(OF_BASE + n, 1) for n in range(BASE_BLOCKS * BLOCK_BYTES // SECTOR))
            if with_base
            else b""
        )
        self.rig = FarRig(folder, blocks=BLOCKS, slots=SLOTS, base=base, depth=12)
        self.rig.engine.set_reserve(RESERVE)
        other = LocalDoor(self.rig.engine, self.rig.base, volume=self.rig.volume, queue_depth=4)
        self.doors = [self.rig.door, other]
        self.history = History()
        self.value = itertools.count(1)
        self.snapshots: dict[int, bytes] = {}
        self.todo: dict[int, list[int]] = {}
        self.sealed: list[Sealed] | None = None
        self.sealed_at = (0, 0)
        self.pinned: set[tuple[int, int]] = set()
        stored = {
            page: b"".join(sectors(OF_STORE + page * 8 + n, 1) for n in range(8))
            for page in self.random.sample(range(PAGES), PAGES // 2)
        }
        for sector in range(SECTORS):
            page = sector * SECTOR // PAGE_BYTES
            value = OF_BASE + sector if sector * SECTOR < len(base) else 0
            self.history.writes[sector].append((0, 0, OF_STORE + sector if page in stored else value))
        self.rig.stored(stored)

    # -- the threads ---

    def work(self, seed: int, operations: int) -> None:
        chance, door, history = random.Random(seed), self.doors[seed % 2], self.history
        for _ in range(operations):
            first = chance.randrange(SECTORS)
            count = min(chance.choice((1, 3, 8, 8, 8, 16, 40)), SECTORS - first)
            if chance.random() < 0.6:
                first -= first % 8
                count = min(-(-count // 8) * 8, SECTORS - first)
            begun, kind = history.now(), chance.random()
            if kind < 0.45:
                history.saw("read", begun, first, door.read(first * SECTOR, count * SECTOR))
            elif kind < 0.9:
                value = next(self.value)
                door.write(first * SECTOR, sectors(value, count))
                history.wrote(begun, first, count, value)
            elif kind < 0.95:
                door.write_zeroes(first * SECTOR, count * SECTOR)
                history.wrote(begun, first, count, 0)
            else:
                first, count = first // 8 * 8, -(-count // 8) * 8
                count = min(count, SECTORS - first)
                door.discard(first * SECTOR, count * SECTOR)
                history.wrote(begun, first, count, 0)

    # -- the event loop ---

    def answer(self, patient: bool) -> None:
        """A piece of some of the misses, with what the store had when they came."""
        for (layer, block), event in list(self.rig.asked.items()):
            token = event.token
            if token not in self.todo:
                mask = event.pages if self.random.random() < 0.3 else ALL
                pieces = [mask]
                if self.random.random() < 0.5:
                    cut = self.random.randrange(1, 16)
                    pieces = [mask & ((1 << cut) - 1), mask & ~((1 << cut) - 1)]
                self.todo[token] = pieces
                self.snapshots[token] = self.rig.bytes_of(block, layer)
            elif self.todo[token] and (not patient or self.random.random() < 0.3):
                piece = self.todo[token].pop(0)
                final = not self.todo[token]
                self.rig.fill(block, piece, final=final, layer=layer, data=self.snapshots[token])

    def uploader(self) -> None:
        """One step: seal, collect, or upload, clean and end; sometimes it gives the epoch up."""
        volume, history = self.rig.volume, self.history
        if self.sealed is None:
            before = history.now()
            volume.seal()
            self.sealed_at = before, history.now()
            self.sealed = []
        elif self.random.random() < 0.1:
            volume.end_epoch()
            self.sealed = None
        elif volume.collect(self.random.choice((1, 4))):
            blocks = []
            while some := volume.sealed(5):
                blocks += some
            sums = self.rig.upload(blocks)
            for page in range(PAGES):
                data = self.rig.store.get(page)
                if data is not None:
                    history.saw("store", self.sealed_at[0], page * 8, data, self.sealed_at[1])
            volume.clean(blocks, sums)
            volume.end_epoch()
            self.sealed = None

    def step(self) -> None:
        rig, chance = self.rig, self.random.random()
        rig.poll()
        self.answer(patient=True)
        short = rig.engine.stats()["needy"] > 0
        if short or chance < 0.2:
            self.uploader()
        if short or chance > 0.8:
            rig.evict(self.random.randrange(1, 4))
            rig.commit()
        if 0.5 < chance < 0.6:
            self.tend()
        if 0.4 < chance < 0.42:
            first = self.random.randrange(BLOCKS)
            rig.engine.push(
                [Record(PREFETCH, layer=VOLUME, block=first, value=2, pages=self.random.choice((0, 64)))]
            )

    def tend(self) -> None:
        """What a user may want of a block: that it goes, or that it stays (forget.c)."""
        of_base = self.rig.base is not None and self.random.random() < 0.4
        layer = self.rig.base if of_base and self.rig.base is not None else self.rig.volume
        block = self.random.randrange(layer.blocks)
        if self.random.random() < 0.7:
            layer.drop(block, self.random.choice((ALL, self.random.randrange(1, ALL))))
            return
        key = BASE if of_base else VOLUME, block
        pinned = key not in self.pinned and len(self.pinned) < PINNED_MAX
        layer.pin(block, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    def run(self, until: Callable[[], bool]) -> None:
        def holds() -> bool:
            self.step()
            return until()

        self.rig.until(holds)

    def close(self) -> None:
        for door in self.doors:
            door.drain()
        self.rig.engine.no_space(5)  # a test that failed left writes behind
        self.doors[1].quit()
        self.doors[1].close()
        self.rig.close()

    def quiet(self) -> None:
        """Nothing is under way."""

        def holds() -> bool:
            self.answer(patient=False)
            return not self.rig.asked and not self.rig.engine.stats()["fills"]

        self.rig.obeyed()
        self.rig.until(holds)
        self.rig.consistent()
        self.rig.counted()
        assert self.history.wrong() == []
        self.history.forget(self.history.now() if self.sealed is None else self.sealed_at[0])


@pytest.mark.parametrize("with_base", [False, True])
def test_reads_are_current_and_epochs_are_cuts(tmp_path: Path, with_base: bool) -> None:
    asked = int(os.environ.get(STEPS_VARIABLE, "0"))
    seed = secrets.randbelow(1 << 32) if asked else 7
    print(f"seed {seed}")
    world = World(tmp_path, seed, with_base)
    rig = world.rig
    try:
        for round_ in range(max(1, (asked or 3000) // (WORKERS * ROUND))):
            works: list[Future[None]] = [
                rig.pool.submit(world.work, seed + round_ * WORKERS + n, ROUND) for n in range(WORKERS)
            ]
            world.run(lambda works=works: all(work.done() for work in works))  # type: ignore[misc]
            for work in works:
                work.result()
            world.quiet()
        begun = world.history.now()
        whole = rig.pool.submit(rig.door.read, 0, SECTORS * SECTOR)
        world.run(whole.done)
        world.history.saw("read", begun, 0, whole.result())
        world.quiet()
        stats = rig.door.stats()
        assert min(stats["moved"], stats["partial_writes"], rig.engine.stats()["evicted"]) > 0
        assert rig.misses > 100
    finally:
        world.close()
