"""The local tier: a cache directory, its index and the engine over them, from opening to clean stop.

    cache = Cache.open(settings, run_dir, make_engine)     in a thread that may block
    layer = await cache.base_layer(url, size_bytes, validator)
    layer = await cache.volume_layer(name, "local", size_bytes, base)
    await cache.commit()                                   on a timer, or when slots run low
    await cache.close()

A volume that is dropped leaves its map to the next one of its size.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from tierblk import address
from tierblk.cache import journal, summed, tend
from tierblk.cache.commit import CommitReport, Committer, VolumeSource
from tierblk.cache.directory import Directory, open_directory
from tierblk.cache.index import Index, create_index, open_index
from tierblk.cache.invariants import LayerRows, SlotCounts, Violation, check
from tierblk.cache.layers import LAYER_ID_MAX, LayerRecord
from tierblk.cache.loading import Loaded, load, refuse_what_cannot_be_served
from tierblk.cache.maps import Maps
from tierblk.cache.opening import begin_session, replay_journal
from tierblk.cache.resize import resize
from tierblk.cache.settle import Settler
from tierblk.cache.start import StartMode
from tierblk.cache.superblock import SLOT_BYTES
from tierblk.cache.tend import Evicted
from tierblk.config import CacheSettings
from tierblk.core import Engine, Layer
from tierblk.errors import CacheError
from tierblk.extent import PAGE_BYTES
from tierblk.outlast import to_the_end
from tierblk.units import format_exact_size

_COMMITS_AT_STOP_MAX = 10
_CLEAR_MAP_PAGES = 64  # 8192 blocks at a time: below a millisecond

_log = logging.getLogger(__name__)


class EngineFactory(Protocol):
    """Makes the engine over the open files of a cache directory. May raise OSError."""

    def __call__(self, *, slots_fd: int, slot_count: int, sums_fd: int, dio_align_bytes: int) -> Engine: ...


class Cache:
    """An open cache directory. Coroutines and `stats` belong to the event loop; `open` blocks."""

    def __init__(
        self,
        directory: Directory,
        index: Index,
        maps: Maps,
        engine: Engine,
        loaded: Loaded,
        journal_fd: int,
    ) -> None:
        self.path = directory.path
        self.uuid = directory.superblock.uuid
        self.session = directory.superblock.session
        self.start_mode = loaded.mode
        self.engine = engine
        self._directory = directory
        self._index = index
        self._maps = maps
        self._journal_fd = journal_fd
        self._records = {record.layer_id: record for record in loaded.records}
        self._layers = loaded.layers
        self._spare: dict[int, Layer] = {}  # of dropped volumes, empty
        self._sources: dict[int, VolumeSource] = {}
        self._opening = asyncio.Lock()
        self._closed = False
        self.committer = Committer(
            engine,
            self._layers.values,
            lambda: self._sources,
            index,
            slots_fd=directory.slots_fd,
            sums_fd=directory.sums_fd,
        )
        self.settler = Settler(lambda: list(self._layers.values()), self._opening, lambda: not self._closed)

    @classmethod
    def open(cls, settings: CacheSettings, run_dir: Path, make_engine: EngineFactory) -> Cache:
        """Opens or makes the directory that [cache] names, with every layer that its index knows.

        A directory of another size than `settings` says gets that size first (resize.py). run_dir: where
        block maps outlive a killed daemon, on tmpfs. CacheError for everything that can be wrong, a disk that
        is read-only or cannot be read included. Blocks: reading a big index takes seconds.
        """
        try:
            with ExitStack() as undo:
                directory = open_directory(settings.dir, settings.size, run_dir, create_index)
                undo.callback(directory.close)
                slot_count = max(directory.superblock.slot_count, settings.size // SLOT_BYTES)
                index = open_index(directory.index_path, directory.superblock.uuid, slot_count)
                undo.callback(index.close)
                refuse_what_cannot_be_served(index)
                replay_journal(directory, index)
                maps = Maps(run_dir, directory.superblock)
                undo.callback(maps.close)
                resize(directory, index, maps, settings.size)
                engine = make_engine(
                    slots_fd=directory.slots_fd,
                    slot_count=directory.superblock.slot_count,
                    sums_fd=directory.sums_fd,
                    dio_align_bytes=directory.dio_align_bytes,
                )
                undo.callback(engine.close)
                loaded = load(engine, index, maps, directory.superblock)
                if loaded.mode is StartMode.CLEAN:
                    _load_summed(directory, index, loaded)
                journal_fd = begin_session(directory, index, maps, loaded)
                undo.callback(os.close, journal_fd)
                summed.remove(directory.path)
                session = directory.superblock.session
                engine.open_journal(journal_fd, journal.RING_AT_BYTES, journal.RING_BYTES, session)
                engine.finish_load()
                tend.apply_all_pins(loaded.records, loaded.layers)
                undo.pop_all()
        except OSError as error:
            raise CacheError(f"cannot open the cache in {settings.dir}: {error.strerror}") from None
        _log.info("opened %s, session %d, %s", directory.path, session, loaded.mode.value)
        return cls(directory, index, maps, engine, loaded, journal_fd)

    @property
    def run_dir(self) -> Path:
        """This cache's own folder below the run directory."""
        return self._maps.path.parent

    async def base_layer(self, url: str, size_bytes: int, validator: str) -> Layer:
        """The layer of that image, found or made; its record is durable before anything can be cached for it.

        Who asks for the same identity gets the same layer, so an image is stored once. CacheError. Cancelled,
        it ends first: the record is on its way to the index, and its number must not be given to another.
        """
        return await to_the_end(self._base_layer(url, size_bytes, validator))

    async def _base_layer(self, url: str, size_bytes: int, validator: str) -> Layer:
        async with self._opening:
            self._refuse_closed()
            record = self._find(url, size_bytes, validator)
            layer_id = record.layer_id if record else self._free_id()
            # Written for a known image too: which version of an address was used last is asked when it is
            # offline.
            now = int(time.time())
            pins = record.pins if record else ()
            record = LayerRecord(layer_id, "base", url, size_bytes, validator, now, pins=pins)
            try:
                await asyncio.to_thread(self._index.put_layer, record)
            except CacheError as error:
                if layer_id not in self._layers:  # unrecorded, its number could become another image's
                    raise
                _log.warning("that %s is used again could not be recorded: %s", address.shown(url), error)
            self._records[layer_id] = record
            if layer_id not in self._layers:
                self._layers[layer_id] = self._open_empty(record)
            return self._layers[layer_id]

    def volume(self, name: str) -> LayerRecord | None:
        """The record of the volume of that name."""
        return next((r for r in self._records.values() if r.is_volume and r.name == name), None)

    def layer(self, layer_id: int) -> Layer:
        """That of a record. KeyError: there is none. CacheError: the cache is closed."""
        self._refuse_closed()
        return self._layers[layer_id]

    def scratch_volumes(self) -> list[str]:
        """The names of those that are gone as soon as their devices are."""
        return [record.name for record in self._records.values() if record.kind == "scratch"]

    async def volume_layer(
        self, name: str, mode: str, size_bytes: int, base: tuple[str, int, str] | None
    ) -> Layer:
        """The volume of that name, found or made; its record is durable before anything can be written to
        it.

        mode: "local", "scratch" or "write-back"; base: (url, size_bytes, validator) of what it lies over.
        CacheError when there is one of that name that differs in any of this. Cancelled, it ends first.
        Whether it may be shown says `damaged` of its record.
        """
        return await to_the_end(self._volume_layer(name, mode, size_bytes, base))

    async def _volume_layer(
        self, name: str, mode: str, size_bytes: int, base: tuple[str, int, str] | None
    ) -> Layer:
        async with self._opening:
            self._refuse_closed()
            url, base_size_bytes, validator = base or ("", 0, "")
            wanted = LayerRecord(0, mode, url, size_bytes, validator, int(time.time()), name, base_size_bytes)
            if (known := self.volume(name)) is not None:
                _refuse_another(known, wanted)
                return self._layers[known.layer_id]
            layer_id, spare = next(
                ((i, layer) for i, layer in self._spare.items() if layer.size_bytes == size_bytes),
                (self._free_id(), None),
            )
            record = replace(wanted, layer_id=layer_id)
            await asyncio.to_thread(self._index.put_layer, record)
            if spare is not None:
                spare.become(mode)
                del self._spare[layer_id]
            else:
                try:
                    self._layers[layer_id] = self._open_empty(record)
                except CacheError:
                    await asyncio.to_thread(self._index.delete_layer, layer_id)
                    raise
            self._records[layer_id] = record
            return self._layers[layer_id]

    def set_volume_source(self, layer_id: int, source: VolumeSource | None) -> None:
        """Who is asked at every commit from now on what is to be durable beside the rows of a volume; None:
        nobody any more. A cycle that runs may still write what it has taken: commit first, to be sure."""
        if source is None:
            self._sources.pop(layer_id, None)
        else:
            self._sources[layer_id] = source

    async def volume_state(self, name: str) -> bytes | None:
        """What was last made durable as the state of the volume of that name; None: nothing, or there is no
        such volume. CacheError."""
        record = self.volume(name)
        if record is None:
            return None
        return await asyncio.to_thread(self._index.volume_state, record.layer_id)

    async def volume_extents(self, layer_id: int) -> list[tuple[bytes, bytes]]:
        """(key, value) of all extents of a volume that are durable, by key. CacheError."""
        return await asyncio.to_thread(self._index.extents, layer_id)

    async def forgive(self, name: str) -> None:
        """The volume of that name is not `damaged` any more: its user does without what was lost. Durable
        when it returns; CacheError, also when there is no such volume. Cancelled, it ends first."""
        await to_the_end(self._forgive(name))

    async def _forgive(self, name: str) -> None:
        async with self._opening:
            if (record := self.volume(name)) is None:
                raise CacheError(f"there is no volume {name} in {self.path}")
            await self.commit()  # else the next start would find the rows again that cannot be read
            record = replace(record, damaged="")
            await asyncio.to_thread(self._index.put_layer, record)
            self._records[record.layer_id] = record

    async def pin(self, layer_id: int, first_block: int, end_block: int, *, pinned: bool) -> None:
        """These blocks of a layer are never evicted from now on, also after a restart, or may be again.
        CacheError, also when it would be more than a half of the cache. Cancelled, it ends first."""
        await to_the_end(self._pin(layer_id, first_block, end_block, pinned=pinned))

    async def _pin(self, layer_id: int, first_block: int, end_block: int, *, pinned: bool) -> None:
        async with self._opening:
            self._refuse_closed()
            if (known := self._records.get(layer_id)) is None:
                raise CacheError(f"{self.path} has no layer {layer_id} any more")
            record = tend.with_pins(known, first_block, end_block, pinned=pinned)
            if pinned:  # what is too much, of a cache that was larger, can be taken back
                tend.check_pins([*(self._records | {layer_id: record}).values()], self.engine)
            await asyncio.to_thread(self._index.put_layer, record)
            self._records[layer_id] = record
            await tend.apply_pins(self._layers[layer_id], first_block, end_block, pinned=pinned)

    async def evict(self, layer_id: int, first_block: int, end_block: int) -> Evicted:
        """What can go of these blocks is gone, and its room free, when this returns. CacheError, also if the
        cache is closed meanwhile."""
        gone = await tend.evict(lambda: self.layer(layer_id), first_block, end_block)
        await self.commit()
        return gone

    @property
    def records(self) -> list[LayerRecord]:
        """Of all layers."""
        return list(self._records.values())

    async def drop_volume(self, name: str) -> None:
        """Everything that a volume has is gone when this returns; doors to it are closed before. CacheError
        when the index does not take it: the next start finds what is left of it. Cancelled, it ends first.
        """
        await to_the_end(self._drop_volume(name))

    async def drop_base(self, layer_id: int, may_go: Callable[[LayerRecord], bool]) -> bool:
        """As drop_volume, of a base. may_go: asked when nothing can be opened any more. Whether it is
        gone."""

        def find() -> LayerRecord | None:
            record = self._records.get(layer_id)
            return record if record is not None and may_go(record) else None

        return await to_the_end(self._drop(find))

    async def _drop_volume(self, name: str) -> None:
        await self._drop(lambda: self.volume(name))

    async def _drop(self, find: Callable[[], LayerRecord | None]) -> bool:
        async with self._opening:
            self._refuse_closed()
            record = find()
            if record is None:
                return False
            layer, block = self._layers[record.layer_id], 0
            try:
                while (next_block := layer.clear(block, _CLEAR_MAP_PAGES)) is not None:
                    block = next_block
                    await asyncio.sleep(0)
            except OSError as error:
                raise CacheError(f"{record.shown} cannot be dropped: {error.strerror}") from None
            self.set_volume_source(record.layer_id, None)
            await self.commit()  # also of rows that a running cycle has taken
            while layer.changed():
                await self.commit()
            await asyncio.to_thread(self._index.delete_layer, record.layer_id)
            del self._records[record.layer_id]
            # The engine keeps its map as long as it runs: the next volume of that size gets it.
            self._spare[record.layer_id] = layer
            return True

    async def commit(self) -> CommitReport:
        """Makes all that is cached durable; see commit.py. CacheError."""
        return await self.committer.commit()

    def changed(self) -> bool:
        """Whether a commit would change anything: rows differ from the index, a volume has more to say, or
        freed slots wait for one."""
        return (
            any(layer.changed() for layer in self._layers.values())
            or any(source.is_changed() for source in self._sources.values())
            or self.engine.quarantined_slots() > 0
        )

    def identities_of(self, url: str) -> list[tuple[str, int, str]]:
        """(url, size_bytes, validator) of the images known at an address, the last used last."""
        known = sorted(
            (r for r in self._records.values() if r.url == url and not r.is_volume),
            key=lambda record: record.used_unix_s,
        )
        return [(record.url, record.size_bytes, record.validator) for record in known]

    def stats(self) -> dict[str, Any]:
        """The engine's counters, in slots and blocks, what each layer has in slots, and why commits fail, if
        they do: {"reason", "since" in seconds since 1970, "final": whether only a restart helps}; for JSON.
        """
        layers = [
            {
                "layer_id": layer_id,
                "kind": self._records[layer_id].kind,
                "name": self._records[layer_id].name or None,
                "url": address.shown(self._records[layer_id].url) or None,
                "size_bytes": self._records[layer_id].size_bytes,
                "cached_bytes": layer.cached_pages() * PAGE_BYTES,
            }
            for layer_id, layer in self._layers.items()
            if layer_id in self._records
        ]
        failure = self.committer.failure
        return {
            **self.engine.stats(),
            "session": self.session,
            "layers": layers,
            "commit_failure": asdict(failure) if failure else None,
        }

    def check(self) -> list[Violation]:
        """The runnable invariants over all block maps; exact while nothing is being filled. Slow: every row
        is read.
        """
        layers = []
        for layer_id, record in self._records.items():
            layer = self._layers[layer_id]
            rows = {row: layer.peek_row(row) for row in range(layer.rows)}
            layers.append(LayerRows(layer_id, record.kind, record.size_bytes, rows))
        counts = self.engine.stats()
        return check(layers, counts["slots"] + 1, SlotCounts(*(counts[name] for name in SlotCounts._fields)))

    async def close(self, clean: bool = True) -> None:
        """Ends the session; doors are closed before. With `clean`, what is cached is all recorded and maps
        are removed.

        Everything is closed in any case. CacheError when it could not end clean: the next start is then a
        warm one.
        """
        if self._closed:
            return
        self._closed = True
        async with self._opening:  # a layer that is being made is in the last commit
            failure = await self._last_commit() if clean else None
            await self.committer.stop()
        try:
            await asyncio.to_thread(self._shut, clean and failure is None)
        except OSError as error:
            failure = CacheError(f"cannot close the cache in {self.path}: {error.strerror}")
        if failure is not None:
            raise failure

    async def _last_commit(self) -> CacheError | None:
        """Commits until nothing differs from the index. What went wrong, if anything."""
        try:
            for _ in range(_COMMITS_AT_STOP_MAX):
                await self.commit()
                if not self.changed():
                    return None
        except CacheError as error:
            return error
        return CacheError(f"the cache in {self.path} is still being filled, so it cannot end clean")

    def _shut(self, clean: bool) -> None:
        """Closes everything, the lock last: the engine's writes have landed when it goes (R8)."""
        masks = self._summed() if clean else b""
        self.engine.close()  # if it cannot, it still writes: the lock stays
        with ExitStack() as stack:
            stack.callback(self._directory.close)
            stack.callback(self._index.close)
            stack.callback(self._maps.close)
            stack.callback(os.close, self._journal_fd)
            if clean:
                self._save_summed(masks)
                self._index.mark_clean(self.session)
                self._maps.remove_all()

    def _summed(self) -> bytes:
        """Which dirty pages have sums, see summed.py; b"": none. No door is open."""
        masks = summed.room_for(self.engine.slot_count)
        for layer in self._layers.values():
            layer.save_summed(masks)
        return bytes(masks) if any(masks) else b""

    def _save_summed(self, masks: bytes) -> None:
        """Without it nothing is lost but these sums, so a disk that refuses it is only told."""
        if not masks:
            return
        try:
            os.fsync(self._directory.sums_fd)
            summed.write(self.path, self.uuid, self.session, masks)
        except OSError as error:
            _log.warning("checksums of what was written are lost in %s: %s", self.path, error.strerror)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CacheError(f"the cache in {self.path} is closed")

    def _find(self, url: str, size_bytes: int, validator: str) -> LayerRecord | None:
        wanted = (
            record for record in self._records.values() if record.has_identity(url, size_bytes, validator)
        )
        return next(wanted, None)

    def _free_id(self) -> int:
        for layer_id in range(1, LAYER_ID_MAX + 1):
            if layer_id not in self._layers:
                return layer_id
        raise CacheError(
            f"the cache in {self.path} already knows {LAYER_ID_MAX} images and volumes",
            "restart the daemon, which forgets those of which nothing is there",
        )

    def _open_empty(self, record: LayerRecord) -> Layer:
        """The engine's layer for an image of which nothing is cached, with its map stamped."""
        map_fd = self._maps.create(record.layer_id, record.size_bytes)
        try:
            layer = self.engine.open_layer(record.layer_id, map_fd, record.size_bytes, kind=record.kind)
        except OSError as error:
            self._maps.forget(record.layer_id)
            raise CacheError(f"cannot make the block map of {record.shown}: {error.strerror}") from None
        self._maps.stamp(record.layer_id, self.session)
        return layer


def _load_summed(directory: Directory, index: Index, loaded: Loaded) -> None:
    """What the last session's end says of sums of dirty pages."""
    if masks := summed.read(directory.path, directory.superblock.uuid, index.meta().session):
        for layer in loaded.layers.values():
            layer.load_summed(masks)


def _refuse_another(known: LayerRecord, wanted: LayerRecord) -> None:
    what = f"there is a volume {known.name} already, and"
    has, wants = (format_exact_size(record.size_bytes) for record in (known, wanted))
    if known.kind != wanted.kind:
        raise CacheError(f"{what} it is a {known.kind} one", f'volume.mode = "{known.kind}" shows it')
    if known.size_bytes != wanted.size_bytes:
        raise CacheError(f"{what} it has {has}, not {wants}", f'volume.size = "{has}" shows it')
    if known.base != wanted.base:
        raise CacheError(
            f"{what} it lies over {known.shown_base}, or another version of it",
            "what was written means nothing without what is below it: choose another device.name",
        )
