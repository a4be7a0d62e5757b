"""What the last session left, put into the engine: from the maps if it was killed, else from the index (R1,
R8, R9).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from itertools import chain

from tierblk.cache.index import Index
from tierblk.cache.layers import KINDS, LayerRecord
from tierblk.cache.maps import Maps
from tierblk.cache.rows import entries_of, unpack_row
from tierblk.cache.start import StartMode, is_current, start_mode
from tierblk.cache.superblock import Superblock
from tierblk.core import Engine, Layer
from tierblk.errors import CacheError

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Loaded:
    """What is in the engine now, and what has to go from the index."""

    mode: StartMode
    records: list[LayerRecord] = field(default_factory=list)
    layers: dict[int, Layer] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)  # layers of which nothing is cached
    dropped_rows: list[tuple[int, int]] = field(
        default_factory=list
    )  # (layer id, row) that cannot be believed
    damaged: list[LayerRecord] = field(default_factory=list)  # records that say now that something is lost
    dropped_slots: list[int] = field(default_factory=list)  # of clean pages that are not believed


def refuse_what_cannot_be_served(index: Index) -> None:
    """CacheError for a layer of a kind that this version does not know: before anything is changed."""
    for record in index.layers():
        if record.kind not in KINDS:
            raise CacheError(
                f"the index in {index.path} holds a {record.kind}, which this version cannot serve",
                "use the version of tierblk that made it",
            )


def load(engine: Engine, index: Index, maps: Maps, superblock: Superblock) -> Loaded:
    """Loads every layer that the index knows. `superblock`: as the last session left it. Changes nothing
    durable.

    CacheError when something is there that must not be dropped and cannot be served; OSError from the engine.
    refuse_what_cannot_be_served comes before.
    """
    meta, records = index.meta(), index.layers()
    if not is_current(meta.session, superblock):
        _refuse_to_lose(index, records)
        _log.warning(
            "%s is of session %d, the slots are of %d to %d: what is cached cannot be trusted and is dropped",
            index.path,
            meta.session,
            superblock.confirmed,
            superblock.session,
        )
        return Loaded(StartMode.DISCARDED)
    loaded = Loaded(StartMode.CLEAN)
    map_fds = {
        record.layer_id: map_fd
        for record in records
        if not meta.clean
        and (map_fd := maps.open_current(record.layer_id, record.size_bytes, superblock)) is not None
    }
    # Maps first: where a row of the index contradicts a map, the map is right.
    for record in records:
        if record.layer_id in map_fds:
            _load_map(engine, map_fds[record.layer_id], record, loaded)
    for record in records:
        if record.layer_id not in map_fds and record.kind == "scratch" and not meta.clean:
            _forget_scratch(index, record, loaded)
        elif record.layer_id not in map_fds:
            _load_rows(engine, index, maps, record, loaded, clean=meta.clean)
    for layer_id in map_fds:
        _quarantine(engine, index, loaded.layers[layer_id], loaded)
    for slot in loaded.dropped_slots:  # R8: the index names them until a commit
        engine.quarantine(slot)
    has_map = (layer_id in map_fds for layer_id in loaded.layers)
    loaded.mode = start_mode(superblock, meta.session, meta.clean, has_map)
    return loaded


def _refuse_to_lose(index: Index, records: list[LayerRecord]) -> None:
    """R8: with an index that is not of the slots' time no dirty page can be found, and nobody else has it."""
    local = [record.name for record in records if record.kind == "local" and any(index.rows(record.layer_id))]
    stored = [record.name for record in records if record.is_stored and _has_what_nobody_has(index, record)]
    if local or stored:
        named = [f"local volumes {', '.join(local)}"] if local else []
        if stored:
            named.append(f"volumes {', '.join(stored)}, of which not all is uploaded")
        raise CacheError(
            f"{index.path} is older than the slots beside it and names the {', and the '.join(named)}",
            "put the whole cache directory back as it was at one time; "
            "or remove it, which loses these volumes",
        )


def _has_what_nobody_has(index: Index, record: LayerRecord) -> bool:
    """Whether a volume in object storage would be shown as it never was, if all that is here of it went: a
    page of it is dirty, or may be, or was lost."""
    return bool(record.damaged) or any(
        not _is_whole(packed) or any(entry.dirty for entry in entries_of(packed))
        for _, packed in index.rows(record.layer_id)
    )


def _load_map(engine: Engine, map_fd: int, record: LayerRecord, loaded: Loaded) -> None:
    layer = engine.open_layer(record.layer_id, map_fd, record.size_bytes, kind=record.kind)
    try:
        layer.warm_start()
    except ValueError as error:
        raise CacheError(
            f"a block map that the last daemon left is damaged: {error}",
            "a reboot, or removing the daemon's run directory, makes the index count again",
        ) from None
    loaded.records.append(record)
    loaded.layers[record.layer_id] = layer


def _forget_scratch(index: Index, record: LayerRecord, loaded: Loaded) -> None:
    """A scratch volume is gone with the machine that had it."""
    loaded.dropped_rows += [(record.layer_id, row) for row, _ in index.rows(record.layer_id)]
    loaded.forgotten.append(record.layer_id)


def _load_rows(
    engine: Engine, index: Index, maps: Maps, record: LayerRecord, loaded: Loaded, *, clean: bool
) -> None:
    """A layer from the index; one without rows is forgotten, if nothing else is known of it. A base's row
    that cannot be believed is dropped, whole; a volume's is an error of its range, never the base's bytes
    (R9), and of one in object storage never older bytes from there. clean: the last session ended in order;
    else a volume's clean pages are not what they were (DESIGN 5).
    """
    rows = index.rows(record.layer_id)
    first = next(rows, None)
    is_nothing = first is None and not record.damaged and not record.pins
    if is_nothing and index.volume_state(record.layer_id) is None:
        loaded.forgotten.append(record.layer_id)
        return
    map_fd = maps.create(record.layer_id, record.size_bytes)
    layer = engine.open_layer(record.layer_id, map_fd, record.size_bytes, kind=record.kind)
    drop_clean = record.is_volume and not clean
    lost: list[str] = []
    for row, packed in chain([first] if first else [], rows):
        try:
            layer.load_row(row, packed, drop_clean=drop_clean)
        except ValueError as error:
            if record.is_volume and row < layer.rows:
                _log.error("%s, of %s: it cannot be read any more, and can be written", error, record.shown)
                layer.lose_row(row)
                lost.append(str(error))
                if record.is_stored:
                    layer.put_back([row])  # its record remembers, so that it can be forgiven
                continue
            # A whole row that contradicts another one (I4) is worse than a damaged one: it was written so.
            level = logging.ERROR if _is_whole(packed) else logging.WARNING
            _log.log(level, "%s, of %s, is dropped from the cache", error, record.shown)
            loaded.dropped_rows.append((record.layer_id, row))
            continue
        if drop_clean:
            clean_ones = (entry for entry in entries_of(packed) if not entry.cached & entry.dirty)
            loaded.dropped_slots += [entry.slot for entry in clean_ones if entry.slot]
    if lost and record.is_stored:
        record = _damaged(record, lost)
        loaded.damaged.append(record)
    loaded.records.append(record)
    loaded.layers[record.layer_id] = layer


def _damaged(record: LayerRecord, lost: list[str]) -> LayerRecord:
    """Of a volume of which rows were lost: the store may have older bytes of their pages (R9)."""
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    why = f"the index has lost where its pages are, and which are newer than the store's: {lost[0]}{more}"
    return replace(record, damaged=record.damaged or why)


def _is_whole(packed: bytes) -> bool:
    try:
        unpack_row(packed)
    except ValueError:
        return False
    return True


def _quarantine(engine: Engine, index: Index, layer: Layer, loaded: Loaded) -> None:
    """R8: a slot that the index names and the map does not is not free before a commit has rewritten that
    row.
    """
    for row, packed in index.rows(layer.layer_id):
        if row >= layer.rows:
            loaded.dropped_rows.append((layer.layer_id, row))
            continue
        current = layer.peek_row(row)
        if current == packed:
            continue
        layer.put_back([row])
        if not _is_whole(packed):
            continue  # nobody can load it, so it names nothing
        for named, now in zip(entries_of(packed), entries_of(current), strict=True):
            if named.slot != now.slot and 0 < named.slot < engine.slot_count:
                engine.quarantine(named.slot)
