"""Two hosts that share a store in a folder, and what must hold of all they do (test_writeback.py).

The store is read by an independent reader; what an epoch has to have is the model's content at its seal.
Everything runs in one event loop that stands still between two steps. What is held is let go when something
would wait for it for ever.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from errno import EROFS
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import zstandard

from tests.far_rig import NAME
from tests.property.far_front import Front, Late
from tests.property.far_host import TIMEOUT_S, FarHost, watch_layers
from tests.property.far_log import FarLog
from tests.property.far_model import SECTOR, VOLUME_BYTES, Line, Op, sector_bytes
from tests.unit import volume_reader
from tierblk import claim, sending, upload, volumes, writeback
from tierblk import config as configs
from tierblk.cache import journal
from tierblk.cache.directory import JOURNAL
from tierblk.claim import Wishes
from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Layer, crc32c
from tierblk.errors import CacheError, Fenced, RemoteRefused, RemoteUnavailable
from tierblk.remote import decode_record, patient
from tierblk.units import KIB, MIB

T = TypeVar("T")

BASE_BYTES = 9 * BLOCK_BYTES + 3 * PAGE_BYTES + 5 * SECTOR
_IMAGE = random.Random(12).randbytes(BASE_BYTES)
_STEP_S = 0.02
NO_WISHES = Wishes()


class FarWorld(FarLog):
    """slots: of each cache, the superblock's included."""

    def __init__(self, slots: int, *, has_base: bool, durability: str, compression: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tierblk-test-"))
        shm = Path("/dev/shm")
        self._memory = Path(tempfile.mkdtemp(prefix="tierblk-test-", dir=shm if shm.is_dir() else None))
        self._base = self._folder / "base.raw" if has_base else None
        if self._base:
            self._base.write_bytes(_IMAGE)
        self._slots = slots
        self.durability, self._compression = durability, compression
        self._loop = asyncio.new_event_loop()
        self._fronts: dict[int, Front] = {}
        self._root = self._memory / "store"
        self.late: list[Late] = []
        self._sent_bytes: dict[bytes, bytes] = {}
        super().__init__(self._root, (_IMAGE if has_base else b"").ljust(VOLUME_BYTES, b"\0"))
        self.values = 0
        self.hosts = [FarHost(name, self._folder, self._memory, self._config) for name in "ab"]
        self._patches = ExitStack()
        for each in self._patched():
            self._patches.enter_context(each)

    def _patched(self) -> list[Any]:
        async def open_store(_: str, __: object, remote: object) -> Front:
            return self._fronts[id(remote)]

        ring_bytes = 256 * KIB
        unzstd = zstandard.ZstdDecompressor().decompress
        return [
            patch.object(claim, "open_store", open_store),
            patch.object(patient, "DELAYS_S", (0.0, 0.0)),
            patch.multiple(sending, _DELAY_S=0.001, DELAY_MOST_S=0.004),
            patch.object(writeback, "DELAY_MOST_S", 0.004),
            patch.object(volumes, "FINISH_S", 0.2),
            # Small, so that all kinds of epochs come.
            patch.multiple(upload, INLINE_PAGES=8, OBJECT_PAGES=24),
            patch.multiple(journal, RING_BYTES=ring_bytes, JOURNAL_BYTES=journal.RING_AT_BYTES + ring_bytes),
            patch.multiple(volume_reader, crc32c=crc32c, unzstd=unzstd),  # fast ones
            *watch_layers(self._host_of),
        ]

    def _config(self, directory: Path) -> Config:
        document: dict[str, Any] = {
            "device": {"name": NAME},
            "cache": {"dir": str(directory), "size": 16 * MIB, "commit_interval": "600s"},
            "volume": {
                "mode": "write-back",
                "url": f"file://{self._root}",
                "size": VOLUME_BYTES,
                "epoch_interval": "3600s",
                "durability": self.durability,
                "compression": self._compression,
            },
        }
        if self._base:
            document["base"] = {"url": f"file://{self._base}"}
        config = configs.parse(document, self._folder / "vol.toml")
        cache = config.cache.model_copy(update={"size": self._slots * BLOCK_BYTES})
        config = config.model_copy(update={"cache": cache})
        self._fronts[id(config.remote)] = Front(f"file://{self._root}", self._sent, self._created)
        self._kept = [*getattr(self, "_kept", []), config]  # so that no id comes again
        return config

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 3 * TIMEOUT_S))

    def close(self) -> None:
        try:
            self.run(self._end())
        finally:
            self._patches.close()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            shutil.rmtree(self._folder)
            shutil.rmtree(self._memory, ignore_errors=True)

    async def _end(self) -> None:
        try:
            for host in self.hosts:
                await self.end_sync(host)
                if host.is_attached:
                    await self.verify(host)
            await self.check()
        finally:
            for host in self.hosts:
                await host.bury()

    def _host_of(self, layer: Layer) -> FarHost | None:
        for host in self.hosts:
            if host.rig and layer in host.rig.cache.engine.layers.values() and not host.front.dead:
                return host
        return None

    # -- what the store is told ---

    def _created(self, name: str) -> None:
        self.take_name(name)

    def _sent(self, front: Front, name: str, data: bytes) -> None:
        """A record is about to be created."""
        record = decode_record(data, name=name)
        host = next(host for host in self.hosts if host.rig and host.front is front)
        attempt = record.attempt
        assert self._sent_bytes.setdefault(attempt, data) == data, "R16: the same attempt with other bytes"
        assert host.standing().is_ours(record.epoch, attempt), "R12: no intent of it is durable"
        if attempt in self.cuts:
            return
        if host.sealed is None:
            assert not record.runs, "a claim that writes"
            assert not record.zeroes, "a claim that writes"
            host.writer = record.writer
            self.cuts[attempt] = None
            return
        host.check_durable()
        self.cuts[attempt] = host.sealed
        host.sent = (name, data)

    # -- operations ---

    async def do(self, host: FarHost, op: Op) -> None:
        assert host.rig is not None
        assert host.line is not None
        line, door, at, length = host.line, host.rig.door, op.at * SECTOR, len(op.sectors) * SECTOR
        data = b""
        if op.kind == "write":
            self.values += 1
            data = b"".join(sector_bytes(self.values, sector) for sector in op.changed)
        elif op.kind in ("discard", "zeroes"):
            data = bytes(SECTOR * len(op.changed))
        line.begin(op, data)
        for sector in op.changed:
            host.inflight[sector] = data[(sector - op.changed.start) * SECTOR :][:SECTOR]
        is_fenced, quiet = bool(host.far.standing.fenced), host.syncing is None
        slots = host.disk.content("slots") if op.kind == "flush" else b""
        calls = {
            "read": lambda: door.read(at, length),
            "write": lambda: door.write(at, data, fua=op.flag),
            "discard": lambda: door.discard(at, length),
            "zeroes": lambda: door.write_zeroes(at, length, fua=op.flag),
            "flush": door.flush,
        }
        call = asyncio.create_task(asyncio.to_thread(calls[op.kind]))
        await self._wait(host, call, is_flush=op.kind == "flush" or op.flag)
        for sector in op.changed:
            host.inflight.pop(sector, None)
        error = call.exception()
        if error is not None:
            assert op.kind != "read", error
            assert isinstance(error, OSError), error
            assert error.errno == EROFS, f"{op}: {error!r}"
            assert host.far.standing.fenced, f"{op}: refused without a reason"
            line.refuse(op, data)
            return
        assert op.kind == "read" or not is_fenced, f"I10: {op} is acknowledged"
        if op.kind == "read":
            line.judge(call.result() or b"", op.at)
            return
        line.end(op, data)
        if op.flag:
            slots = host.disk.content("slots")
        if slots and (op.flag or self.durability == "local"):
            host.disk.durable["slots"] = slots  # C has synced them, where no gate sees it
        host.disk.durable[JOURNAL] = host.disk.content(JOURNAL)
        if op.kind == "flush":
            line.flushed()
            if self.durability == "remote" and quiet:
                self.read_log()
                # At its own head: another host may have gone on from there, which who has nothing to send
                # has no way to learn.
                epoch = host.far.extents.head.epoch
                assert self.contents[epoch] == line.now, "R14: a FLUSH that the store does not have"

    async def _wait(self, host: FarHost, call: asyncio.Task[Any], *, is_flush: bool = False) -> None:
        """Whatever would make it wait for ever is let go."""
        assert host.rig is not None
        if is_flush and self.durability == "remote":
            self.let_go(host)
        waited_s = 0.0
        while not call.done():
            await asyncio.wait([call], timeout=_STEP_S)
            waited_s += _STEP_S
            host.look()
            if not call.done() and (host.rig.cache.engine.stats()["needy"] or waited_s > 10 * _STEP_S):
                self.let_go(host)
            assert waited_s < TIMEOUT_S, f"a hang: {host.rig.cache.engine.stats()} {host.rig.door.stats()}"

    def let_go(self, host: FarHost) -> None:
        host.front.down = host.front.late = False
        host.front.let_go()
        host.gate.let_go()

    async def together(self, host: FarHost, ops: Sequence[Op]) -> None:
        """Those that touch no sector of an earlier one, at once."""
        taken, chosen = set[int](), list[Op]()
        for op in ops:
            if not taken & set(op.sectors):
                taken |= set(op.sectors)
                chosen.append(op)
        await asyncio.gather(*(self.do(host, op) for op in chosen))

    async def verify(self, host: FarHost) -> None:
        """All of it is read."""
        assert host.line is not None
        host.line.judge(await self._content(host))

    async def _content(self, host: FarHost) -> bytes:
        assert host.rig is not None
        call = asyncio.create_task(host.rig.content())
        await self._wait(host, call)
        return call.result()

    async def evict(self, host: FarHost) -> None:
        assert host.rig is not None
        await host.rig.evict()

    # -- epochs ---

    async def sync(self, host: FarHost) -> None:
        await self.begin_sync(host, None)
        await self.end_sync(host)

    async def begin_sync(self, host: FarHost, point: str | None, commit: str | None = None) -> bool:
        """Until the epoch is held at a point of the store or of the commit cycle. Whether it is."""
        assert host.rig is not None
        front = host.front
        front.hold, host.gate.hold = point, commit
        host.syncing = asyncio.create_task(host.rig.volumes.sync(host.far))
        host.syncing.add_done_callback(lambda task: task.cancelled() or task.exception())
        while not (host.syncing.done() or front.held.is_set() or host.gate.held.is_set()):
            host.look()
            if front.down or front.late:
                if host.rig.volumes.trouble is not None:
                    return True
                await asyncio.sleep(0.0005)
            elif point is None and commit is None:
                await asyncio.wait([host.syncing], timeout=_STEP_S)
            else:
                await asyncio.sleep(0.0005)
        front.hold = host.gate.hold = None
        return not host.syncing.done()

    async def end_sync(self, host: FarHost) -> None:
        if host.syncing is None:
            return
        self.let_go(host)
        syncing = host.syncing
        for _ in range(round(TIMEOUT_S / _STEP_S)):
            if (await asyncio.wait([syncing], timeout=_STEP_S))[0]:
                break
            host.look()
        assert syncing.done(), "an epoch without end"
        host.syncing = None
        await host.quiet()
        self.read_log()
        error = syncing.exception()
        if error is not None:
            assert isinstance(error, Fenced), repr(error)
            assert not self.is_head_of(host), "fenced by nobody"
            assert host.far.standing.fenced
        elif self.is_head_of(host) and not host.inflight and host.far.layer.dirty_pages() == 0:
            assert host.line is not None
            assert self.contents[-1] == host.line.now, "nothing is dirty, and the store has something else"

    # -- sessions ---

    async def attach(
        self, host: FarHost, wishes: Wishes = NO_WISHES, *, lose: int = 0, late: bool = False
    ) -> bool:
        """As the rules say that it may (R17, R18); false when it is refused."""
        assert not host.is_attached
        await self._start(host)
        self.read_log()
        head, line = self.head, host.line
        is_ours = self.is_head_of(host)
        is_foreign = line is not None and head > 0 and not is_ours
        known = max((n for n in range(head + 1) if self.writers[n] == host.writer), default=0)
        would_lose = is_foreign and not wishes.discard_local
        has_more = would_lose and line is not None and line.promises_more_than(self.contents[known])
        is_held = not (self.released[head] or is_ours or wishes.take_over)
        must_refuse = late or is_held or has_more
        host.front.lose, host.front.late = lose, late
        try:
            await host.attach(wishes)
        except (RemoteRefused, CacheError, RemoteUnavailable) as error:
            if not (must_refuse or (would_lose and not host.is_exact)):
                raise AssertionError("refused for nothing") from error
            if is_foreign and isinstance(error, RemoteUnavailable):
                host.line = None  # the claim was sent: what the cache has is the head's by now
            host.front.lose, host.front.late = 0, False
            self._takes_late(host)
            self.read_log()
            return False
        host.front.lose = 0
        assert not must_refuse, f"attached: held {is_held}, epoch {head}, known {known}"
        self.read_log()
        assert host.far.extents.head.epoch == self.head, "I14: the head is not ours"
        assert host.far.standing.writer == self.writers[-1], "I14: the claim is not ours"
        host.writer = self.writers[-1]
        if line is None or is_foreign or wishes.discard_local:
            host.line = Line.of(self.contents[-1])
        assert host.line is not None
        host.line.settle(await self._content(host))
        host.is_exact = False
        return True

    async def _start(self, host: FarHost) -> None:
        if host.rig is None:
            seen = set(self._fronts)
            await host.start(None)  # type: ignore[arg-type]  # known in a moment
            (number,) = set(self._fronts) - seen
            host.front = self._fronts[number]

    def _takes_late(self, host: FarHost) -> None:
        self.late += host.front.underway.values()
        host.front.underway.clear()

    async def go_on(self, host: FarHost) -> None:
        """A device that a killed daemon has left is served at once, and catches up."""
        await self._start(host)
        await host.attach(NO_WISHES, goes_on=True)
        assert host.line is not None
        async with asyncio.timeout(TIMEOUT_S):
            while host.far.lineage is None:  # noqa: ASYNC110
                await asyncio.sleep(0.0005)
        await host.quiet()
        self.read_log()
        if not self.is_head_of(host):
            assert host.far.standing.fenced, "R19: it goes on, and another host has the volume"
        await self.verify(host)

    async def crash(self, host: FarHost, *, kill: bool, seed: int = 0, leaves_late: bool = False) -> None:
        if host.rig is None:
            return
        if not host.gate.held.is_set():
            await host.quiet()
        if leaves_late:
            self._takes_late(host)
        await host.end(kill=kill, seed=seed)
        self.read_log()

    async def arrive(self) -> None:
        """What was on its way reaches the store."""
        late, self.late = self.late, []
        for each in late:
            await each.front.arrive(each)
        self.read_log()

    async def detach(self, host: FarHost) -> None:
        assert host.rig is not None
        assert host.line is not None
        await self.end_sync(host)
        warning = await host.rig.detach()
        self.read_log()
        if warning is None:
            assert self.is_head_of(host), "R17: released by who does not hold it"
            assert self.released[-1], "R18: not released"
            assert self.contents[-1] == host.line.now, "what was written is not in the store"
            host.is_exact = True
            host.line.flushed()
        else:
            assert not self.is_head_of(host) or host.front.down or not self.released[-1], warning

    async def stop(self, host: FarHost) -> None:
        """Its daemon ends in order."""
        if host.rig is not None and not host.is_attached:
            rig, host.rig = host.rig, None
            await rig.stop()
            if host.line is not None:
                host.line.flushed()

    # -- what must hold ---

    async def check(self) -> None:
        for host in self.hosts:
            await host.quiet()
        self.read_log()
        for host in self.hosts:
            if host.rig is None:
                continue
            if host.syncing is None:
                found = host.rig.cache.check()
                assert not found, "\n".join(map(str, found))
            if host.is_attached and host.syncing is None:
                assert not (unfit := host.sums_that_do_not_fit()), unfit
            if host.is_attached and host.line is not None:
                self._check_attached(host)

    def _check_attached(self, host: FarHost) -> None:
        head = host.far.extents.head
        assert head.epoch <= self.head, "an epoch that is not there"
        assert head.hash == self.history[head.epoch].hash, "its head is another host's"
        assert self.writers[head.epoch] == host.writer, "one author per epoch"
        present, clean = host.pages()
        base_pages = -(-BASE_BYTES // PAGE_BYTES) if self._base else 0
        pages = self.history[head.epoch].pages
        # Zeros over nothing need not be known.
        missing = {page for page, place in pages.items() if place or page < base_pages} - present
        assert not missing, f"the store has pages {sorted(missing)}, and the map does not know"
        content = self.contents[head.epoch]
        for page, data in clean.items():
            stored = content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            assert data[: len(stored)] == stored, f"I8: page {page} is clean and not what the store has"
