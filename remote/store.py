"""A store: immutable objects below a prefix, of which each can be created once (DESIGN 8, R15).

Everything that keeps two writers apart stands on one promise of the store: of several that create a name, one
is told that it did, whatever happens to the others. Several servers answer success to all of them and keep
the last; `prove` finds out, and is asked before a volume is attached for writing.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError

PROOF_RACERS = 8
"""In turn, a server that looks first and then creates would pass."""

_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,199}(/[a-z0-9_-][a-z0-9._-]{0,199}){0,3}", re.ASCII)

Bytes = bytes | bytearray | memoryview
T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """An object in a listing. created_unix_s: by the store's clock, which is nobody's else (R20, R21)."""

    name: str
    size_bytes: int
    created_unix_s: float


class Store(Protocol):
    """Objects by name below one prefix. Any number of calls may run at once.

    All raise RemoteUnavailable when the outcome is not known or there is none yet (the same call may be made
    again; of a creation R16 says how), and RemoteRefused when the same call would fail again.
    """

    @property
    def shown(self) -> str:
        """The address of the prefix for messages, without what is secret in it."""

    @property
    def clock_unix_s(self) -> float:
        """What time the store said that it is, in its last answer; 0.0 before the first."""

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        """Make an object of the pieces, one after the other. True: this call made it, and it is durable.
        False: there is one of that name already, perhaps made by an earlier call whose answer was lost (R16).
        The pieces must not change before this returned or raised."""

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        """All of an object; None when there is none. RemoteRefused when it is larger than limit_bytes."""

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill the buffer with an object's bytes from offset_bytes on. RemoteRefused when it is not there or
        ends before. Once this returned or raised, be it CancelledError, nothing writes to the buffer."""

    async def names(self, folder: str, after: str = "") -> list[Found]:
        """All objects FOLDER/... whose name sorts behind `after`, in order."""

    async def delete(self, name: str) -> None:
        """It is not there when this returns, whether or not it was."""

    async def aclose(self) -> None:
        """Close connections and descriptors; calls that still run end in an error."""


def check_name(name: str) -> None:
    """ValueError for a name that could lead out of the prefix, or that a store may not take (I12)."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.200} is no name of an object")


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return, run at once, in their order. When one raises, or this is cancelled, the others are
    cancelled and have ended before this raises; of several errors the first."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in tasks]


async def prove(store: Store) -> None:
    """Of several that create the same name at once the store tells one that it did, and keeps that one's
    bytes. RemoteRefused when not: it cannot keep two writers apart. RemoteUnavailable: try it again; also
    when it told nobody, which is what an answer that was lost and asked for again looks like."""
    name = f"proof/{os.urandom(16).hex()}"
    bodies = [os.urandom(32) for _ in range(PROOF_RACERS)]
    made = await all_of(store.create(name, [body]) for body in bodies)
    try:
        winners = [body for was_made, body in zip(made, bodies, strict=True) if was_made]
        kept = await store.read(name, 1024)
    finally:
        with suppress(TierblkError):  # it is in nobody's way
            await store.delete(name)
    if not winners and kept in bodies:
        raise RemoteUnavailable(f"{store.shown} made an object, and who made it did not hear of it")
    if [kept] != winners:
        raise RemoteRefused(
            f"{store.shown} cannot hold volumes that are written to: of {PROOF_RACERS} that created one "
            f"object at once it told {len(winners)} that they had, so two writers would overwrite each other",
            "use a store that honours If-None-Match (S3, Azure, GCS, SeaweedFS and others do), "
            "without a cache in between",
        )


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
