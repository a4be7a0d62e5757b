"""Attaching a volume in object storage for writing: what the store has, what the cache keeps beside that, and
the claim that makes this host the one writer (R17, R18).

    find     before the base is opened: the volume's log is read up to its head
    claim    what the cache holds is compared with it and cut to what may stay; that is committed (R17); then
             an empty epoch is created, which can be created once
    go_on    a device that an earlier daemon of this host left: served at once, with what the cache knows; the
             log is looked at while it is, see catch_up
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar
from uuid import uuid4

from tierblk import address
from tierblk import standing as standings
from tierblk.cache import Cache, LayerRecord
from tierblk.config import Config
from tierblk.errors import CacheError, ConfigError, RemoteRefused
from tierblk.extent import PAGE_BYTES
from tierblk.far import FarVolume, blocks_of, learn_blocks
from tierblk.remote import (
    RECORD_BYTES_MAX,
    Birth,
    BirthBase,
    EpochName,
    ExtentMap,
    Head,
    Identity,
    Lineage,
    PatientStore,
    Record,
    Store,
    begin,
    decode_record,
    encode_record,
    follow,
    hash_of,
    load,
    open_lineage,
    open_store,
    prove,
    read_birth,
    tried,
)
from tierblk.rescue import clone
from tierblk.standing import ID_BYTES, Standing, new_writer, shown_writer
from tierblk.units import format_exact_size, format_size
from tierblk.writeback import create_record, record_after

log = logging.getLogger(__name__)

T = TypeVar("T")

_ROUNDS_MAX = 8


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user allows: to take the volume from a host that has not released it; to lose what is in this
    cache alone; to make a new volume of it, at the config's address."""

    take_over: bool = False
    discard_local: bool = False
    clone_local: bool = False


@dataclass(slots=True)
class Found:
    """A volume as its store has it. lineage, extents: None when there is none yet. known, standing: of this
    cache. followed: records that the cache did not know; diverged: they are of another history."""

    store: Store
    lineage: Lineage | None = None
    extents: ExtentMap | None = None
    known: LayerRecord | None = None
    standing: Standing | None = None
    followed: list[Record] = field(default_factory=list)
    diverged: bool = False

    @property
    def base(self) -> Identity | None:
        """What it lies over."""
        base = self.extents.head.base if self.extents else None
        return Identity(base.url, base.size_bytes, base.validator) if base else None

    async def aclose(self) -> None:
        """Of one that is not used."""
        await (self.lineage.aclose() if self.lineage else self.store.aclose())


class Claims:
    """Opens the volumes of one cache. All of it belongs to the event loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def find(self, config: Config, name: str, wishes: Wishes) -> Found:
        """Read the log. TierblkError; nothing is open then."""
        volume = config.volume
        assert volume is not None
        assert volume.url is not None
        known, standing = await self._known(name, anew=wishes.discard_local)
        store = await _open(config, volume.url)
        found = Found(store, known=known, standing=standing)
        try:
            await tried(lambda: prove(store))
            if wishes.clone_local:
                await self._clone(found, config, volume.url)
                return found
            birth = await read_birth(store)
            if birth is None:
                if standing is not None and not wishes.discard_local:
                    raise RemoteRefused(
                        f"{store.shown} holds no volume any more, and the cache has {name} of it",
                        "put its objects back; `tierblk attach --discard-local` begins a new volume",
                    )
                return found
            found.lineage = await open_lineage(store, lambda url: _open(config, url))
            is_another = standing is not None and standing.uuid != birth.uuid
            if is_another and not wishes.discard_local:
                raise CacheError(
                    f"what the cache has as {name} is of another volume than {store.shown}",
                    "choose another device.name, or lose what is here: `tierblk attach --discard-local`",
                )
            await self._read(found, anew=wishes.discard_local)
            assert found.extents is not None
            _refuse_another(config, found.extents.head)
        except BaseException:
            await found.aclose()
            raise
        return found

    async def _clone(self, found: Found, config: Config, url: str) -> None:
        """What the cache has becomes a volume at another address."""
        if found.known is None or found.standing is None:
            raise CacheError(
                "the cache has nothing that a new volume could be made of",
                "leave out --clone-local, which is for what could not be uploaded",
            )
        extents = await self._kept_extents(found.known, found.standing)
        found.lineage, found.extents, found.standing = await clone(
            found.store, url, found.standing, extents, lambda other: _open(config, other)
        )
        _refuse_another(config, found.extents.head)

    async def _read(self, found: Found, *, anew: bool) -> None:
        assert found.lineage is not None
        if anew or found.standing is None or found.known is None:
            found.extents = await load(found.lineage)
            return
        found.extents = await self._kept_extents(found.known, found.standing)
        try:
            found.followed = [each.record for each in await follow(found.lineage, found.extents)]
        except RemoteRefused as error:
            log.warning("%s: %s", found.known.name, error)
            found.diverged = True
            found.extents = await load(found.lineage)

    async def _known(self, name: str, *, anew: bool = False) -> tuple[LayerRecord | None, Standing | None]:
        """anew: nothing that is here is needed, so it need not be readable."""
        known = self._cache.volume(name)
        if known is None:
            return None, None
        if known.kind != "write-back":
            raise CacheError(
                f"there is a volume {name} already, and it is a {known.kind} one",
                f'volume.mode = "{known.kind}" shows it; or choose another device.name',
            )
        state = await self._cache.volume_state(name)
        try:
            return known, standings.decode(state) if state is not None else None
        except ValueError as error:
            if anew:
                return known, None
            raise CacheError(
                f"the index does not say where the volume {name} stands: {error}",
                "`tierblk attach --discard-local` goes back to the last epoch in the store",
            ) from None

    async def _kept_extents(self, known: LayerRecord, standing: Standing) -> ExtentMap:
        pairs = await self._cache.volume_extents(known.layer_id)
        try:
            return await asyncio.to_thread(ExtentMap.restore, pairs, uuid=standing.uuid)
        except ValueError as error:
            raise CacheError(
                f"the index is damaged where it says what of {known.name} is in the store: {error}",
                "`tierblk attach --discard-local` reads it anew, and loses what was not uploaded",
            ) from None

    # -- to claim ---

    async def claim(
        self, found: Found, config: Config, name: str, base: Identity | None, wishes: Wishes
    ) -> FarVolume:
        """This host is the writer when it returns. TierblkError: it is not, and `found` is closed."""
        far: FarVolume | None = None
        try:
            if found.extents is None:
                await _be_born(found, config, base)
            last = await _last_record(found)
            is_held = last is not None and not last.released
            if is_held and not _is_ours(found, last) and not wishes.take_over:
                raise _held(found.store, last)
            await self._keep(found, name, wishes)
            far = await self._open_layer(found, config, name, base)
            await self._cache.commit()  # R17: what was dropped is not to come back
            await self._race(far, found, last.writer if last and wishes.take_over else None)
        except BaseException:
            if far is not None:
                self._cache.set_volume_source(far.layer.layer_id, None)
            await found.aclose()
            raise
        return far

    async def _keep(self, found: Found, name: str, wishes: Wishes) -> None:
        """R18: cuts what the cache has to what may stay. Afterwards either found.known is None, and the cache
        has nothing, or all that it has is of the head."""
        known, standing = found.known, found.standing
        if known is None:
            return
        layer = self._cache.layer(known.layer_id)
        dirty_bytes = layer.dirty_pages() * PAGE_BYTES
        is_foreign = (
            standing is None
            or found.diverged
            or not all(standing.is_ours(each.epoch, each.attempt) for each in found.followed)
        )
        if not wishes.discard_local:
            _refuse_to_lose(found, name, dirty_bytes if is_foreign else 0)
        changes_all = any(
            each.rolled_back_to or each.size_bytes != known.size_bytes for each in found.followed
        )
        if wishes.discard_local or standing is None or found.diverged or changes_all:
            await self._cache.drop_volume(name)
            found.known = found.standing = None
            return
        # What others wrote since is newer than what is clean here; of our own it is the same.
        for record in found.followed:
            await learn_blocks(layer, blocks_of(record))

    async def _open_layer(self, found: Found, config: Config, name: str, base: Identity | None) -> FarVolume:
        extents = found.extents
        assert extents is not None
        head = extents.head
        over = (base.url, base.size_bytes, base.validator) if base else None
        layer = await self._cache.volume_layer(name, "write-back", head.size_bytes, over)
        standing = found.standing or Standing(head.uuid, found.store.shown, new_writer())
        standing = replace(standing.at(head.epoch), fenced="", url=found.store.shown)
        layer.refuse(0)
        far = FarVolume(name, layer, extents, standing, config.remote)
        if found.known is None:
            await far.learn_all()
        self._cache.set_volume_source(layer.layer_id, far)
        return far

    async def _race(self, far: FarVolume, found: Found, taken_from: bytes | None) -> None:
        """R16, R17, I14: the claim. taken_from: a writer that may go on making epochs meanwhile."""
        store, lineage = found.store, found.lineage
        assert lineage is not None

        async def create(name: str, pieces: Sequence[bytes]) -> bool:
            return await tried(lambda: store.create(name, pieces))

        async def read(name: str) -> bytes | None:
            return await tried(lambda: store.read(name, RECORD_BYTES_MAX))

        for _ in range(_ROUNDS_MAX):
            head, attempt = far.extents.head, os.urandom(ID_BYTES)
            far.standing = far.standing.intend(head.epoch + 1, attempt)
            await self._cache.commit()  # R12: a record without an intent here would be nobody's
            claim = record_after(head, attempt, far.standing.writer)
            made, encoded = await create_record(claim, encode_record(claim), create, read)
            if far.standing.is_ours(made.epoch, made.attempt):
                await far.apply(made, hash_of(encoded), learn=True)
                if made.attempt == attempt:
                    far.standing = far.standing.hold(True)
                    far.open(lineage)
                    return
                continue  # an earlier attempt, whose answer was lost
            if not made.released and made.writer != taken_from:
                raise _held(store, made)
            # Of a copy: no commit may keep extents whose pages the block map has not learnt (R18).
            for each in await follow(lineage, far.extents.copy()):
                await far.apply(each.record, each.hash, learn=True)
            far.standing = far.standing.at(far.extents.head.epoch)
            await self._cache.commit()
        raise RemoteRefused(f"{store.shown} is written to faster than it can be claimed", "stop its writer")

    # -- to go on ---

    async def go_on(self, config: Config, name: str) -> FarVolume:
        """The volume of a device that is there, as this cache knows it: no network is asked. CacheError."""
        known, standing = await self._known(name)
        if known is None or standing is None:
            raise CacheError(f"the cache does not know the volume {name}", f"`tierblk detach --force {name}`")
        extents = await self._kept_extents(known, standing)
        layer = self._cache.layer(known.layer_id)
        far = FarVolume(name, layer, extents, standing, config.remote, kept=standing)
        if standing.fenced:
            far.fence(standing.fenced)
        self._cache.set_volume_source(known.layer_id, far)
        return far


Log = tuple[Lineage, list[tuple[Record, bytes]]]


async def catch_up(
    far: FarVolume, config: Config, persist: Callable[[Callable[[], Awaitable[Log]]], Awaitable[Log]]
) -> None:
    """Until the extent map of a volume that goes on has all records of ours, and reads of the store can go
    on. Fences it when somebody else has made one (R19). persist: asks until there is an answer."""
    volume = config.volume
    assert volume is not None
    assert volume.url is not None
    url = volume.url

    async def read() -> Log:
        store = await _open(config, url)
        try:
            lineage = await open_lineage(store, lambda other: _open(config, other))
        except BaseException:
            await store.aclose()
            raise
        try:
            # Of a copy: what another host wrote is never seen by who still uses the device.
            followed = await follow(lineage, far.extents.copy())
        except BaseException:
            await lineage.aclose()
            raise
        return lineage, [(each.record, each.hash) for each in followed]

    lineage, followed = await persist(read)
    for record, record_hash in followed:
        if not far.standing.is_ours(record.epoch, record.attempt):
            far.fence_by(record)
            break
        await far.apply(record, record_hash, learn=True)
        far.standing = far.standing.hold(not record.released)
    far.open(lineage)


async def _open(config: Config, url: str) -> Store:
    return PatientStore(await open_store(url, config.store, config.remote))


async def _be_born(found: Found, config: Config, base: Identity | None) -> None:
    """Nobody has made the volume yet."""
    assert config.volume is not None
    size_bytes = config.volume.size or (base.size_bytes if base else 0)
    below = BirthBase(base.url, base.size_bytes, base.validator) if base else None
    birth = Birth(uuid4(), size_bytes, below, None, int(time.time()))
    made = await tried(lambda: begin(found.store, birth))
    if made != birth:
        raise RemoteRefused(f"{found.store.shown} was begun by another host at this moment", "attach again")
    found.lineage = await open_lineage(found.store, lambda url: _open(config, url))
    found.extents = ExtentMap(Head.born(birth))
    log.info("%s is a new volume of %s", found.store.shown, format_size(size_bytes))


async def _last_record(found: Found) -> Record | None:
    """The head's, which says who holds the volume; None: nobody ever did, under this prefix."""
    assert found.extents is not None
    assert found.lineage is not None
    epoch = found.extents.head.epoch
    if found.followed:
        return found.followed[-1]
    if epoch == 0 or found.lineage.store_of(epoch) is not found.store:
        return None
    name = str(EpochName(epoch))
    data = await found.store.read(name, RECORD_BYTES_MAX)
    if data is None:
        raise RemoteRefused(f"{found.store.shown} has lost its {name}", "put the object back")
    return await asyncio.to_thread(decode_record, data, name=name)


def _is_ours(found: Found, last: Record | None) -> bool:
    """Whether the head is a record of this cache."""
    if found.standing is None or last is None or found.diverged:
        return False
    if found.standing.is_ours(last.epoch, last.attempt):
        return True
    return not found.followed and found.standing.held and found.standing.writer == last.writer


def _held(store: Store, record: Record | None) -> RemoteRefused:
    assert record is not None
    return RemoteRefused(
        f"{store.shown} is held by {shown_writer(record.writer)}, which made its epoch {record.epoch}",
        "detach it there; or, if that host is gone: `tierblk attach --take-over`; it can write no more then",
    )


def _refuse_to_lose(found: Found, name: str, divergent_bytes: int) -> None:
    """R18, R9: what nobody else has is lost only when the user says so."""
    assert found.known is not None
    if found.known.damaged:
        raise CacheError(
            f"part of what was written to {name} is lost: {found.known.damaged}",
            "`tierblk attach --discard-local` goes back to the last epoch in the store",
        )
    if divergent_bytes:
        raise CacheError(
            f"{format_size(divergent_bytes)} were written to {name} here, and then another host took "
            f"{found.store.shown} over: the two cannot be merged",
            "`tierblk attach --discard-local` loses what is here alone; with an empty prefix as volume.url, "
            "`tierblk attach --clone-local` makes a new volume of it",
        )


def _refuse_another(config: Config, head: Head) -> None:
    """The config is of the volume that is there."""
    volume, base = config.volume, head.base
    assert volume is not None
    if volume.size is not None and volume.size != head.size_bytes:
        raise ConfigError(
            f"volume.size is {format_exact_size(volume.size)}, and the volume in {volume.url} has "
            f"{format_exact_size(head.size_bytes)}",
            "leave volume.size out",
        )
    if base is None and config.base is not None:
        raise ConfigError(f"the volume in {volume.url} lies over nothing", "leave [base] out")
    if base is not None and (config.base is None or config.base.url != base.url):
        raise ConfigError(
            f"the volume in {volume.url} lies over {address.shown(base.url)}",
            "let base.url say so: what was written means nothing without what is below it",
        )
