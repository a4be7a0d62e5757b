"""A volume's log of epochs in a store: read from a checkpoint on, followed as it grows, and shortened for the
next reader by a checkpoint.

Records are kept for ever (which is how R20 is met), so their numbers have no gaps: the next one is asked for
by its name, and where there is none the log ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar
from uuid import UUID

from tierblk.errors import RemoteRefused
from tierblk.remote import checkpoint
from tierblk.remote import epoch as epochs
from tierblk.remote.checkpoint import CHECKPOINT_BYTES_MAX
from tierblk.remote.epoch import RECORD_BYTES_MAX
from tierblk.remote.extents import ExtentMap
from tierblk.remote.lineage import Lineage, Stretch, begin, open_lineage, read_birth
from tierblk.remote.names import CheckpointName, EpochName, parse
from tierblk.remote.record import Head, Record
from tierblk.remote.store import Store, all_of
from tierblk.units import KIB, MIB

__all__ = [
    "Followed",
    "Lineage",
    "begin",
    "follow",
    "load",
    "open_lineage",
    "read_birth",
    "write_checkpoint",
]

log = logging.getLogger(__name__)

AHEAD_MAX = 16
AHEAD_BYTES_MAX = 5 * MIB
"""Inline bytes and what else the record of a small epoch has; a larger one is read again, alone. So what is
ahead never takes more memory than AHEAD_MAX of these and one record."""

THREAD_BYTES = 64 * KIB
"""Fewer are decoded before a thread would have begun."""

ROLLBACKS_MAX = 64
"""How deep rollbacks may be nested: one to an epoch whose own map needs a rollback, and so on. A store could
have any number (I12)."""

T = TypeVar("T")


class Followed(NamedTuple):
    """A record that was applied, and its hash. Its inline bytes are left out: they stay in the store, and
    many records are few bytes without them."""

    record: Record
    hash: bytes


def _nobody(followed: Followed) -> None:
    pass


@dataclass(slots=True)
class _Past:
    """Maps of the epochs that rollbacks went to, for the length of one call; depth: of the nested ones."""

    lineage: Lineage
    maps: dict[int, ExtentMap] = field(default_factory=dict)
    depth: int = 0


async def load(lineage: Lineage, upto: int | None = None) -> ExtentMap:
    """The map at an epoch from 0; None: at the newest there is.

    It begins with the last checkpoint that counts (R15): the one of a record that exists, by its hash. One
    that is damaged, or of a record that lost its race, is passed over. RemoteUnavailable; RemoteRefused: a
    record cannot be read or does not follow the one before, or there is no such epoch.
    """
    return await _load(_Past(lineage), upto)


async def follow(
    lineage: Lineage, extents: ExtentMap, taken: Callable[[Followed], None] = _nobody
) -> list[Followed]:
    """Apply the records behind the map's head, which is the volume's own, to the last that there is; they are
    returned in order. Nobody else changes the map meanwhile; it may be looked at between any two awaits.

    taken: called with each once it is applied, for who has to know them although a later one fails: what was
    applied stays applied. RemoteUnavailable; RemoteRefused names the record that cannot be read or does not
    follow.
    """
    found: list[Followed] = []

    def take(followed: Followed) -> None:
        found.append(followed)
        taken(followed)

    await _advance(_Past(lineage), Stretch(lineage.members[0], None), extents, take)
    return found


async def write_checkpoint(store: Store, extents: ExtentMap) -> bool:
    """Store the map, which stands at an epoch of this store's own volume (ValueError at epoch 0). False:
    there is one of this epoch already. The map may be changed meanwhile. RemoteUnavailable; RemoteRefused,
    also for a map that is too large for a checkpoint."""
    if not extents.head.epoch:
        raise ValueError("there is nothing to have a checkpoint of before epoch 1")
    still = extents.copy()
    name = checkpoint.name_of(still.head)
    try:
        encoded = await asyncio.to_thread(checkpoint.encode, still)
    except ValueError as error:
        raise RemoteRefused(f"{store.shown}/{name} cannot be made: {error}") from None
    return await store.create(name, [encoded])


async def _load(past: _Past, upto: int | None) -> ExtentMap:
    stretches = past.lineage.stretches(upto)
    extents, oldest = None, len(stretches) - 1
    for age, stretch in enumerate(stretches):
        if not stretch.is_empty and (extents := await _from_checkpoint(stretch)) is not None:
            oldest = age
            break
    if extents is None:
        extents = ExtentMap(Head.born(stretches[oldest].member.birth))
    for stretch in reversed(stretches[: oldest + 1]):
        uuid = stretch.member.birth.uuid
        if extents.head.uuid != uuid:
            extents = extents.fork(uuid)
        await _advance(past, stretch, extents, _nobody)
        if stretch.end is not None and extents.head.epoch != stretch.end:
            where = stretch.member.store.shown
            raise RemoteRefused(f"{where} has no epoch {stretch.end}, its last one is {extents.head.epoch}")
    return extents


async def _from_checkpoint(stretch: Stretch) -> ExtentMap | None:
    """The map of the last checkpoint of these epochs that counts; None: there is none."""
    store = stretch.member.store
    listed = [(parse(found.name), found.size_bytes) for found in await store.names("checkpoint")]
    fitting = {
        name: size_bytes
        for name, size_bytes in listed
        if isinstance(name, CheckpointName)
        and name.epoch > stretch.member.begin
        and (stretch.end is None or name.epoch <= stretch.end)
    }
    for name in sorted(fitting, reverse=True):
        head = await _head(store, name, stretch.member.birth.uuid)
        if head is None:
            continue
        data = None
        if fitting[name] <= CHECKPOINT_BYTES_MAX:
            data = await store.read(str(name), CHECKPOINT_BYTES_MAX)
        extents = await _checked(store, name, head, data)
        if extents is not None:
            return extents
    return None


async def _head(store: Store, name: CheckpointName, uuid: UUID) -> Head | None:
    """Where the volume stands behind the record that a checkpoint says it is of; None: it is of none, or of
    one that cannot be read, which whoever needs that record will be told."""
    record_name = str(EpochName(name.epoch))
    data = await store.read(record_name, RECORD_BYTES_MAX)
    if data is None or epochs.hash_of(data) != name.hash:
        log.info("%s/%s is of no record of this volume", store.shown, name)
        return None
    try:
        record = await _off_loop(data, lambda: epochs.decode(data, name=record_name))
    except RemoteRefused as error:
        log.warning("%s/%s is passed over: %s", store.shown, name, error)
        return None
    if record.uuid != uuid or record.epoch != name.epoch:
        log.warning("%s/%s is passed over: its record is of another epoch or volume", store.shown, name)
        return None
    return Head.of(record, name.hash)


async def _checked(store: Store, name: CheckpointName, head: Head, data: bytes | None) -> ExtentMap | None:
    """The map of a checkpoint of that head; None: its bytes are none. data: None where there are none, or too
    many."""
    why = "it is not there any more, or too large"
    if data is not None:
        try:
            extents = await _off_loop(data, lambda: checkpoint.decode(data, name=str(name)))
        except RemoteRefused as error:
            why = str(error)
        else:
            if extents.head == head:
                return extents
            why = "what it says of the volume is not what the record says"
    log.warning("%s/%s is passed over: %s", store.shown, name, why)
    return None


async def _advance(
    past: _Past, stretch: Stretch, extents: ExtentMap, taken: Callable[[Followed], None]
) -> None:
    """Apply the records of a stretch behind the map's head, as far as there are any. First one is read, then
    two at once, and so on: who follows an idle volume asks once."""
    store, width = stretch.member.store, 1
    while True:
        first = extents.head.epoch + 1
        end = first + width if stretch.end is None else min(first + width, stretch.end + 1)
        if first >= end:
            return
        ahead = await all_of(_ahead(store, number) for number in range(first, end))
        for number, data in enumerate(ahead, first):
            if data is None:
                is_followed = any(later is not None for later in ahead[number - first :])
                data = await _last_look(store, number, is_followed)
                if data is None:
                    return
            elif not data:
                data = await store.read(str(EpochName(number)), RECORD_BYTES_MAX) or b""
            await _take(past, store, extents, number, data, taken)
            ahead[number - first] = None  # its memory
        width = min(2 * width, AHEAD_MAX)


async def _ahead(store: Store, number: int) -> bytes | None:
    """A record; None: there is none; empty: it was refused, perhaps for its size."""
    try:
        return await store.read(str(EpochName(number)), AHEAD_BYTES_MAX)
    except RemoteRefused:
        return b""


async def _last_look(store: Store, number: int, is_followed: bool) -> bytes | None:
    """What there is of a record that was not there a moment ago: a writer may have gone on meanwhile. None:
    it is where the log ends."""
    if not is_followed:
        return None
    name = str(EpochName(number))
    data = await store.read(name, RECORD_BYTES_MAX)
    if data is None:
        raise RemoteRefused(f"{store.shown}/{name} is not there, and a later one is")
    return data


async def _take(
    past: _Past,
    store: Store,
    extents: ExtentMap,
    number: int,
    data: bytes,
    taken: Callable[[Followed], None],
) -> None:
    """Apply a record, or nothing of it."""
    name = f"{store.shown}/{EpochName(number)}"
    record = await _off_loop(data, lambda: epochs.decode(data, name=name))
    rolled_back = await _then(past, record, name) if record.rolled_back_to else None
    record_hash = epochs.hash_of(data)
    # A thread gets a map of its own: others look at this one meanwhile.
    target = extents.copy() if len(data) >= THREAD_BYTES else extents
    await _off_loop(data, lambda: target.apply(record, record_hash, rolled_back=rolled_back, name=name))
    if target is not extents:
        extents.become(target)
    taken(Followed(replace(record, inline=b""), record_hash))


async def _then(past: _Past, record: Record, name: str) -> ExtentMap:
    """The map that a record goes back to."""
    number = record.rolled_back_to
    if number not in past.maps:
        if past.depth == ROLLBACKS_MAX:
            raise RemoteRefused(f"{name} goes back to an epoch that needs {ROLLBACKS_MAX} other rollbacks")
        past.depth += 1
        past.maps[number] = await _load(past, number)
        past.depth -= 1
    return past.maps[number]


async def _off_loop(data: bytes, function: Callable[[], T]) -> T:
    """What the function makes of the data, in a thread when that is much."""
    return await asyncio.to_thread(function) if len(data) >= THREAD_BYTES else function()
