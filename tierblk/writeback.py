"""Write-back: what was written to a volume becomes epochs in object storage, one after the other (DESIGN 8).

    1. seal                 one instant; the attempt becomes an intent (R10, R16)
    2. commit cycle         begun when the writes that were under way have ended; beside it the upload (R12)
    3. record               created once for ever; who finds another one there is fenced (R16, R19)
    4. extents, then masks  pages that nobody changed since the seal are clean (R13, I8)

An epoch begins when something was dirty for `epoch_interval`, when `epoch_size` is dirty, when slots are
needed, or when somebody asks. Nothing is sent while nothing is dirty. What the store does not answer is asked
again for ever, with the same bytes: nothing that depends on it is acknowledged meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from tierblk.core import PAGE_BYTES, Sealed
from tierblk.errors import CacheError, Fenced, RemoteRefused, TierblkError
from tierblk.far import FarVolume
from tierblk.remote import (
    EpochName,
    Head,
    Record,
    decode_record,
    encode_record,
    hash_of,
    write_checkpoint,
)
from tierblk.sending import DELAY_MOST_S, Sender
from tierblk.standing import ID_BYTES
from tierblk.upload import Packed, Uploader

if TYPE_CHECKING:
    from tierblk.config import VolumeSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECKPOINT_EACH = 64
"""Records between two checkpoints: what a host that comes with an empty cache reads one by one."""

_LOOK_S = 0.25
_COLLECT_PAGES = 256
_WRITER_S = 0.002
"""How soon to look again whether a write of before the seal has ended."""
_TAKE_BLOCKS = 4096
_CLEAN_BLOCKS = 512


class WriteBack:
    """The epochs of one volume, from `start` to `finish` or `stop`. All of it belongs to the event loop."""

    def __init__(
        self,
        volume: FarVolume,
        commit: Callable[[], Awaitable[object]],
        settings: VolumeSettings,
        *,
        on_look: Callable[[], None] = lambda: None,
        demand: Callable[[], bool] = lambda: False,
        rng: Callable[[], float] = random.random,
    ) -> None:
        """commit: a whole cycle that begins after the call. on_look: called several times a second while
        something is dirty, and when an epoch ends. demand: whether anybody waits for bytes of any remote.
        rng: uniform in [0, 1)."""
        self.volume = volume
        self.epochs = 0
        self.dirty_since: float | None = None
        """Since when something waits to be uploaded, Unix time."""
        self._commit = commit
        self._on_look = on_look
        self.sender = Sender(volume, bytes_per_s=settings.upload_bandwidth, demand=demand, rng=rng)
        self._epoch_s = 0.0
        self._epoch_began_s: float | None = None
        self._sealed_bytes = self._uploaded_before = 0  # of the epoch under way
        self._settings = settings
        clock = asyncio.get_running_loop().time
        self._clock = clock
        self._uploader = Uploader(
            volume.layer,
            self.sender.create,
            requests=settings.upload_requests,
            compression=settings.compression,
        )
        self._wake = asyncio.Event()
        self._asked: list[asyncio.Future[None]] = []  # for an epoch that is sealed from now on
        self._flying: list[asyncio.Future[None]] | None = None  # for the one that is under way
        self._hurries = self._releases = False
        self._task: asyncio.Task[None] | None = None
        self._died: CacheError | None = None
        self._side: set[asyncio.Task[None]] = set()
        self._checkpoint_epoch = volume.extents.head.epoch
        # From the first request on, also while the store is still looked at.
        volume.layer.flush_far(settings.durability == "remote")

    # -- life ---

    def start(self) -> None:
        """The claim is ours, the extent map is at the head."""
        self._task = asyncio.create_task(self._run(), name=f"write-back of {self.volume.name}")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """It shall not die in silence, or nobody would know that nothing is uploaded any more."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("write-back of %s died of a bug: %r", self.volume.name, error, exc_info=error)
            self._died = CacheError(f"write-back ended by an internal error: {error!r:.200}")
            self.sender.failed(self._died)
            self._fail(self._died)

    async def stop(self) -> None:
        """At once, also in the middle of an epoch: what was dirty is dirty. For a daemon that hands over."""
        tasks = [task for task in (self._task, *self._side) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail(Fenced("write-back was stopped") if self.volume.standing.fenced else None)

    async def finish(self) -> None:
        """All that is dirty is uploaded and the claim given back when this returns; no door is open. Waits as
        long as the store does. Cancelled, or Fenced: the claim is kept, and what is dirty as well."""
        self._releases = True
        self._wake.set()
        if self._task is not None and self._died is None:
            await asyncio.wait([self._task])
        self._refuse_hopeless()
        self.volume.layer.mark_all()  # exact masks: who comes back is to know what is not dirty (R18)
        await self._commit()

    def hurry(self) -> None:
        """Slots are needed, which only an epoch makes free."""
        if self.volume.layer.dirty_pages():
            self._hurries = True
            self._wake.set()

    async def sync(self) -> None:
        """What was written before the call is in the store when it returns. Fenced, or CacheError: it never
        will be."""
        self._refuse_hopeless()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.volume.layer.dirty_pages():
            self._asked.append(future)
            self._wake.set()
        elif self._flying is not None:  # R14
            self._flying.append(future)
        else:
            return
        await future

    async def flushed(self) -> None:
        """FLUSHes wait for the store: those of now are answered when it has what was before them (R14)."""
        layer = self.volume.layer
        upto = layer.far_count()
        try:
            await self.sync()
        except TierblkError as error:
            layer.far_done(upto, error=error.errno)
        else:
            layer.far_done(upto)

    @property
    def max_dirty_bytes(self) -> int | None:
        """How much may be dirty; None: what the cache has room for."""
        return self._settings.max_dirty

    @property
    def epoch_s(self) -> float:
        """How long an epoch takes at present."""
        runs_s = 0.0 if self._epoch_began_s is None else self._clock() - self._epoch_began_s
        return max(self._epoch_s, runs_s)

    def to_dict(self) -> dict[str, Any]:
        """For status."""
        head = self.volume.extents.head
        return {
            "url": self.volume.shown,
            "epoch": head.epoch,
            "epoch_at": self.volume.epoch_unix_s,
            "dirty_bytes": self.volume.layer.dirty_pages() * PAGE_BYTES,
            "dirty_since": self.dirty_since,
            "uploading": self._flying is not None,
            "sealed_bytes": self._sealed_bytes,
            "sent_bytes": self._uploader.uploaded_bytes - self._uploaded_before if self._sealed_bytes else 0,
            "sending": self.sender.sending,
            "uploaded_bytes": self._uploader.uploaded_bytes,
            "max_dirty_bytes": self.max_dirty_bytes,
            "epochs": self.epochs,
            "put_requests": self.sender.puts,
            "put_bytes": self.sender.stored_bytes,
            "durability": self._settings.durability,
            "held": self.volume.standing.held,
            "fenced": self.volume.standing.fenced or None,
            "trouble": str(self.sender.trouble) if self.sender.trouble else None,
            "trouble_since": self.sender.trouble_since,
            "next_try_s": self.sender.next_try_s,
        }

    def _refuse_hopeless(self) -> None:
        if self._died is not None:
            raise CacheError(self._died.message, "a new daemon goes on with it; the log says what it was")
        if reason := self.volume.standing.fenced:
            raise Fenced(
                f"{self.volume.name}: {reason}", "what was not uploaded is kept in the cache directory"
            )

    # -- epochs ---

    async def _run(self) -> None:
        while not self.volume.standing.fenced:
            await self._due()
            if not self._releases and not self.volume.layer.dirty_pages():
                # The epoch that was under way when they asked had all of it.
                waiting, self._asked = self._asked, []
                _answer(waiting)
                continue
            release = self._releases
            self._hurries = False
            self._epoch_began_s = self._clock()
            looking = asyncio.create_task(self._look(), name=f"look at {self.volume.name}")
            try:
                await self._epoch(release=release)
                self._epoch_s += (self._clock() - self._epoch_began_s - self._epoch_s) / 4
            except (TierblkError, OSError, ValueError) as error:
                await self._failed_here(error)
            else:
                if release and not self.volume.standing.held:
                    return
            finally:
                self._epoch_began_s = None
                looking.cancel()
                self._on_look()

    async def _look(self) -> None:
        """While an epoch is under way others are told that time goes by."""
        while True:
            self._on_look()
            await asyncio.sleep(_LOOK_S)

    async def _due(self) -> None:
        """Until there is an epoch to make."""
        while not (self._asked or self._releases):
            dirty_bytes = self.volume.layer.dirty_pages() * PAGE_BYTES
            if not dirty_bytes:
                self.dirty_since = None
                self._hurries = False
            else:
                now = time.time()
                self.dirty_since = self.dirty_since or now
                self._on_look()
                is_old = not 0 <= now - self.dirty_since < self._settings.epoch_interval
                if is_old or self._hurries or dirty_bytes >= self._settings.epoch_size:
                    return
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_S, self._settings.epoch_interval)):
                    await self._wake.wait()

    async def _failed_here(self, error: Exception) -> None:
        """The SSD, the index, or a record that cannot be: it may get better, and what is dirty stays."""
        if not isinstance(error, TierblkError):
            error = CacheError(f"an epoch cannot be made: {error}")
        if self.sender.trouble is None:
            log.error("%s: %s", self.volume.name, error)
        self.sender.failed(error)
        await asyncio.sleep(DELAY_MOST_S)

    async def _epoch(self, *, release: bool) -> None:
        """One epoch, from its seal to its end."""
        volume, layer = self.volume, self.volume.layer
        number, attempt = volume.extents.head.epoch + 1, os.urandom(ID_BYTES)
        waiting, self._asked = self._asked, []
        self._flying = waiting
        sealed_unix_s = time.time()
        outcome: Record | None = None
        try:
            layer.seal()
            volume.standing = volume.standing.intend(number, attempt)
            blocks = await self._collect()
            pages = sum((block.dirty & ~block.zero).bit_count() for block in blocks)
            self._sealed_bytes, self._uploaded_before = pages * PAGE_BYTES, self._uploader.uploaded_bytes
            # R12: begun with the intent, and behind the last write that the epoch has, which may have been
            # under way at the seal: it would not be synced else (I13). It runs beside the upload.
            durable = asyncio.create_task(_as_coroutine(self._commit))
            try:
                packed = await self._uploader.upload(number, attempt, blocks)
                await asyncio.shield(durable)
            finally:
                await asyncio.gather(durable, return_exceptions=True)
            made = record_after(
                volume.extents.head, attempt, volume.standing.writer, packed, released=release
            )
            outcome, encoded = await self._make(made)
            if outcome is not None:
                await volume.apply(outcome, hash_of(encoded), learn=outcome.attempt != attempt)
                if outcome.attempt == attempt:
                    await self._clean(packed)
                    volume.standing = volume.standing.hold(not release or layer.dirty_pages() > 0)
        finally:
            layer.end_epoch()
            self._flying = None
            self._sealed_bytes = 0
            if outcome is None or outcome.attempt != attempt:
                self._asked = waiting + self._asked
        if outcome is None:
            await self.fenced()
            return
        if outcome.attempt == attempt:
            self.epochs += 1
            self.dirty_since = sealed_unix_s if layer.dirty_pages() else None
            _answer(waiting)
            self._maybe_checkpoint(release)

    async def _collect(self) -> list[Sealed]:
        """All blocks of the epoch."""
        layer = self.volume.layer
        while True:
            found = layer.collect(_COLLECT_PAGES)
            if found:
                break
            # None: a write of before the seal is under way, whose end nobody tells.
            await asyncio.sleep(_WRITER_S if found is None else 0)
        blocks: list[Sealed] = []
        while batch := layer.sealed(_TAKE_BLOCKS):
            blocks += batch
            await asyncio.sleep(0)
        return blocks

    async def _make(self, record: Record) -> tuple[Record | None, bytes]:
        """R16: the record that is there now under this epoch's name, with its bytes: this one, or an earlier
        attempt of ours. None: somebody else's, and so we are fenced."""
        encoded = await asyncio.to_thread(encode_record, record)
        found, there = await create_record(record, encoded, self.sender.create, self.sender.read_record)
        if self.volume.standing.is_ours(found.epoch, found.attempt):
            return found, there
        self.volume.fence_by(found)
        return None, there

    async def _clean(self, packed: Packed) -> None:
        """R13: the extents know these pages. In pieces: hits are served between them."""
        layer = self.volume.layer
        for blocks, sums in packed.groups:
            at = 0
            for begin in range(0, len(blocks), _CLEAN_BLOCKS):
                batch = blocks[begin : begin + _CLEAN_BLOCKS]
                if sums is None:
                    layer.clean(batch)
                else:
                    length = 4 * sum((block.dirty & ~block.zero).bit_count() for block in batch)
                    layer.clean(batch, sums[at : at + length])
                    at += length
                await asyncio.sleep(0)

    async def fenced(self) -> None:
        """The volume is fenced: who waits for an epoch hears it, and the index keeps it."""
        reason = self.volume.standing.fenced
        self._fail(Fenced(f"{self.volume.name}: {reason}"))
        with suppress(CacheError):  # said already; and the store will say it again
            await self._commit()

    def _fail(self, error: TierblkError | None) -> None:
        """Those who wait for an epoch get the error; None: they are left, since their requests come again."""
        waiting, self._asked = self._asked, []
        for future in waiting:
            if not future.done():
                future.cancel() if error is None else future.set_exception(error)

    def _maybe_checkpoint(self, release: bool) -> None:
        """So that who reads the volume anew has few records to read."""
        behind = self.volume.extents.head.epoch - self._checkpoint_epoch
        if behind < CHECKPOINT_EACH or release or self._side:
            return
        self._checkpoint_epoch = self.volume.extents.head.epoch
        task = asyncio.create_task(self._write_checkpoint(), name=f"checkpoint of {self.volume.name}")
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    async def _write_checkpoint(self) -> None:
        try:
            await write_checkpoint(self.sender.store, self.volume.extents.copy())
            self.sender.puts += 1
        except (TierblkError, ValueError) as error:  # it only spares reading
            log.warning("%s: no checkpoint could be written: %s", self.volume.name, error)


def record_after(
    head: Head, attempt: bytes, writer: bytes, packed: Packed | None = None, *, released: bool = False
) -> Record:
    """The record of the next epoch behind a head; without anything packed it changes nothing, as a claim."""
    packed = packed or Packed()
    return Record(
        uuid=head.uuid,
        epoch=head.epoch + 1,
        attempt=attempt,
        writer=writer,
        previous=head.hash,
        size_bytes=head.size_bytes,
        base_visible_bytes=head.base_visible_bytes,
        base=head.base,
        released=released,
        rolled_back_to=0,
        created_unix_s=int(time.time()),
        data=tuple(packed.data),
        runs=tuple(packed.runs),
        zeroes=tuple(packed.zeroes),
        inline=packed.inline,
    )


async def create_record(
    record: Record,
    encoded: bytes,
    create: Callable[[str, Sequence[bytes]], Awaitable[bool]],
    read: Callable[[str], Awaitable[bytes | None]],
) -> tuple[Record, bytes]:
    """R16, for epochs and claims: create the record, or see which one is there. That one, and its bytes.
    Whose it is the caller has to look at. create, read: of the volume's store."""
    name = str(EpochName(record.epoch))
    if await create(name, [encoded]):
        return record, encoded
    there = await read(name)
    if there is None:
        raise RemoteRefused(f"{name} exists in the store, and cannot be read")
    if there == encoded:
        return record, encoded
    return await asyncio.to_thread(decode_record, there, name=name), there


def _answer(waiting: list[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


async def _as_coroutine(call: Callable[[], Awaitable[object]]) -> None:
    await call()
