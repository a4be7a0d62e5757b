"""What was written here and can go nowhere any more, since another host took the volume over, becomes a
volume of its own: a clone of the epoch that this cache stood at, with what is dirty on top (R18).

The clone is named in its parent first (R21), so that a collection there keeps what it stands on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

from tierblk.errors import RemoteRefused
from tierblk.origin import catch_up_with_own
from tierblk.remote import (
    Birth,
    BirthParent,
    ExtentMap,
    Lineage,
    SnapshotName,
    Store,
    begin,
    open_lineage,
    read_birth,
    tried,
)
from tierblk.standing import Standing, new_writer

log = logging.getLogger(__name__)

SNAPSHOT_FORMAT = 1


async def clone(
    store: Store, url: str, standing: Standing, extents: ExtentMap, open_at: Callable[[str], Awaitable[Store]]
) -> tuple[Lineage, ExtentMap, Standing]:
    """A new volume at the empty prefix `url` of `store`, out of what a cache has: its lineage, its extent
    map, and where the cache stands beside it. extents: as the index has them, of the volume that it was.
    RemoteRefused: there is something at that prefix, or the old volume has another history."""
    own = await _own_history(standing, extents, open_at)
    birth = await _born(store, standing, own, open_at)
    lineage = await open_lineage(store, open_at)
    log.info("%s is a clone of %s at its epoch %d", store.shown, standing.url, own.head.epoch)
    return lineage, own.fork(birth.uuid), Standing(birth.uuid, url, new_writer())


async def _own_history(
    standing: Standing, extents: ExtentMap, open_at: Callable[[str], Awaitable[Store]]
) -> ExtentMap:
    """The map with those records of ours that arrived without our knowing, and without what others made."""
    own = extents.copy()
    parent = await open_at(standing.url)
    try:
        lineage = await open_lineage(parent, open_at)
    except BaseException:
        await parent.aclose()
        raise
    try:
        await catch_up_with_own(own, standing, lineage)
    finally:
        await lineage.aclose()
    return own


async def _born(
    store: Store, standing: Standing, own: ExtentMap, open_at: Callable[[str], Awaitable[Store]]
) -> Birth:
    """The clone's volume.json, its snapshot in the parent before it; or that of an earlier try."""
    head = own.head
    parent = BirthParent(standing.uuid, standing.url, head.epoch)
    there = await read_birth(store)
    if there is not None and there.parent == parent:
        return there
    if there is not None:
        raise RemoteRefused(f"there is a volume at {store.shown} already", "choose an empty prefix")
    birth = Birth(uuid4(), head.size_bytes, head.base, parent, int(time.time()))
    await _name_in_parent(standing, head.epoch, head.hash, birth.uuid, open_at)
    made = await tried(lambda: begin(store, birth))
    if made != birth:
        raise RemoteRefused(
            f"{store.shown} was begun by another host at this moment", "choose another prefix"
        )
    return birth


async def _name_in_parent(
    standing: Standing,
    epoch: int,
    record_hash: bytes,
    child: UUID,
    open_at: Callable[[str], Awaitable[Store]],
) -> None:
    document = {
        "format": SNAPSHOT_FORMAT,
        "uuid": str(standing.uuid),
        "epoch": epoch,
        "hash": record_hash.hex(),
        "clone": str(child),
        "created_unix_s": int(time.time()),
    }
    parent = await open_at(standing.url)
    try:
        body = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        await tried(lambda: parent.create(str(SnapshotName(f"clone-{child}")), [body]))
    finally:
        await parent.aclose()
