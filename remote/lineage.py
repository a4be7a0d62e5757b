"""The stores of a volume: its own, and for a clone those of its ancestors, where its older objects are.

A clone goes on counting epochs where its parent was, so the epoch of an object says in whose prefix it is
(docs/formats.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote import birth as births
from tierblk.remote.birth import BIRTH_BYTES_MAX, Birth
from tierblk.remote.names import BIRTH
from tierblk.remote.store import Store

VOLUMES_MAX = 64
"""Of one lineage: each is a store of its own, with connections."""


class Member(NamedTuple):
    """A volume of a lineage. Its own epochs are those behind `begin`, which is the epoch that it was cloned
    at, and 0 for one that was not."""

    store: Store
    birth: Birth

    @property
    def begin(self) -> int:
        """See above."""
        return self.birth.parent.epoch if self.birth.parent else 0


class Stretch(NamedTuple):
    """Epochs (begin, end] of a volume, counted as its descendant sees them; end None: as far as they go."""

    member: Member
    end: int | None

    @property
    def is_empty(self) -> bool:
        """Whether the volume was cloned before it had epochs of its own."""
        return self.end is not None and self.end <= self.member.begin


@dataclass(frozen=True, slots=True)
class Lineage:
    """A volume and its ancestors, the youngest first."""

    members: tuple[Member, ...]

    @property
    def store(self) -> Store:
        """The volume's own."""
        return self.members[0].store

    @property
    def birth(self) -> Birth:
        """The volume's own."""
        return self.members[0].birth

    def store_of(self, epoch: int) -> Store:
        """In whose prefix the objects of an epoch (from 1) are, or would be."""
        return next(member.store for member in self.members if epoch > member.begin or not member.begin)

    def stretches(self, upto: int | None) -> list[Stretch]:
        """Which epochs of whom make up the volume as of an epoch (None: the newest), the youngest first."""
        found, end = [], upto
        for member in self.members:
            found.append(Stretch(member, end))
            end = member.begin if end is None else min(end, member.begin)
        return found

    async def aclose(self) -> None:
        """Close all the stores."""
        for member in self.members:
            await member.store.aclose()


async def read_birth(store: Store) -> Birth | None:
    """What the volume was born as; None: there is no volume. RemoteUnavailable; RemoteRefused, also when what
    is there is no volume.json."""
    data = await store.read(BIRTH, BIRTH_BYTES_MAX)
    return None if data is None else births.decode(data, f"{store.shown}/{BIRTH}")


async def begin(store: Store, birth: Birth) -> Birth:
    """Make a volume. Returns what it is born as: another one when there is one already, and the same when
    that is an earlier call's whose answer was lost (the uuid tells). RemoteUnavailable: not known yet, call
    it again. RemoteRefused."""
    if await store.create(BIRTH, [births.encode(birth)]):
        return birth
    there = await read_birth(store)
    if there is None:
        raise RemoteUnavailable(f"{store.shown}/{BIRTH} was there, and is not any more")
    return there


async def open_lineage(store: Store, open_parent: Callable[[str], Awaitable[Store]]) -> Lineage:
    """The lineage of the volume in a store. open_parent: opens the store at a parent's url.

    The lineage closes all the stores; when this raises, those that it opened are closed, and `store` is not.
    RemoteUnavailable; RemoteRefused, also for no volume, a parent that is another volume than the one that
    was cloned, a chain that is a ring, or one of more than VOLUMES_MAX.
    """
    members: list[Member] = []
    try:
        while True:
            members.append(await _member(store, members))
            parent = members[-1].birth.parent
            if parent is None:
                return Lineage(tuple(members))
            store = await open_parent(parent.url)
    except BaseException:
        opened = [member.store for member in members[1:]]
        if members and store is not members[-1].store:
            opened.append(store)
        await _close_all(opened)
        raise


async def _member(store: Store, children: list[Member]) -> Member:
    birth = await read_birth(store)
    if birth is None:
        raise RemoteRefused(f"there is no volume at {store.shown}", "check the address")
    if children and (parent := children[-1].birth.parent) is not None and birth.uuid != parent.uuid:
        raise RemoteRefused(
            f"{children[-1].store.shown} was cloned from volume {parent.uuid}, "
            f"and at {store.shown} is {birth.uuid}"
        )
    if any(birth.uuid == child.birth.uuid for child in children):
        raise RemoteRefused(f"volume {birth.uuid} at {store.shown} is its own ancestor")
    if len(children) == VOLUMES_MAX:
        raise RemoteRefused(f"{children[0].store.shown} has {VOLUMES_MAX} ancestors and more")
    return Member(store, birth)


async def _close_all(stores: list[Store]) -> None:
    for store in stores:
        with suppress(TierblkError, asyncio.CancelledError):
            await store.aclose()
