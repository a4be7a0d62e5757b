"""What each request of a device did, as documents for whoever watches.

A reader asks for what it wants, and the rest is passed over where it was recorded (trace.c). It is read as
fast as its client takes it, a little at a time: what a slow client does not take is lost, and said, and
neither the event loop nor memory is held up by it."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from tierblk.core import Traced, ticks_now
from tierblk.errors import DaemonError, DeviceError
from tierblk.latency import OPERATIONS, TIERS

BATCH = 256
"""Records at once, about a millisecond of the event loop."""
RECORDS_MAX = 2**20
"""More than all queues of a device keep."""
LOOK_S = 0.05
BREATH_S = 0.004
"""Between two batches that were full."""
ALIVE_S = 1.0
"""An empty line at least that often: a reader knows by it that the daemon lives."""

_BIG = 2**63


def _list_of(known: tuple[str | None, ...]) -> dict[str, Any]:
    one = f"({'|'.join(name for name in known if name)})"
    return {"type": "string", "pattern": f"^{one}(,{one})*$"}


def _from(least: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": _BIG - 1}


PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "op": _list_of(OPERATIONS),
    "tier": _list_of(TIERS),
    "min_latency_us": _from(0),
    "offset_bytes": _from(0),
    "length_bytes": _from(1),
    "limit": _from(1),
}
"""Of a query, as JSON schemas."""


class Source(Protocol):
    """As core.Trace."""

    def read(self, records_max: int) -> tuple[list[Traced], int]:
        """What is new, and how many were lost."""
        ...

    def close(self) -> None:
        """Nothing more is read."""
        ...


@dataclass(frozen=True)
class Wanted:
    """Which requests, and how many of them; None: all. min_latency_us: at least so slow. within: (start,
    end), bytes of the device of which they touch one; a flush touches none."""

    ops: frozenset[str] | None = None
    tiers: frozenset[str] | None = None
    min_latency_us: float = 0.0
    within: tuple[int, int] | None = None
    limit: int | None = None

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> Wanted:
        """Of a query: op and tier (several with commas), min_latency_us, offset_bytes with length_bytes,
        limit. DaemonError names what is wrong."""
        if ("offset_bytes" in query) != ("length_bytes" in query):
            raise DaemonError("offset_bytes and length_bytes belong together")
        within = None
        if "offset_bytes" in query:
            start = _number(query, "offset_bytes", least=0)
            within = start, start + _number(query, "length_bytes", least=1)
        limit = _number(query, "limit", least=1) if "limit" in query else None
        latency_us = _number(query, "min_latency_us", least=0) if "min_latency_us" in query else 0
        return cls(_names(query, "op", OPERATIONS), _names(query, "tier", TIERS), latency_us, within, limit)

    def masks(self, tick_s: float) -> dict[str, Any]:
        """For core.Trace."""
        return {
            "ops": _mask(self.ops, OPERATIONS),
            "tiers": _mask(self.tiers, TIERS),
            "min_ticks": min(int(self.min_latency_us / 1e6 / tick_s), _BIG),
            "within": self.within,
        }


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _names(query: Mapping[str, str], key: str, known: tuple[str | None, ...]) -> frozenset[str] | None:
    if key not in query:
        return None
    names = query[key].split(",")
    there = {name for name in known if name}
    if strange := [name for name in names if name not in there]:
        raise DaemonError(f"there is no {key} {strange[0]!r:.60}", f"there are {_words(there)}")
    return frozenset(names)


def _number(query: Mapping[str, str], key: str, *, least: int) -> int:
    text = query[key]
    # Not int(), which takes spaces, signs, underscores, and any length.
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not least <= number < _BIG:
        raise DaemonError(f"{key} must be a whole number from {least} on, not {text!r:.60}")
    return number


def _mask(names: frozenset[str] | None, known: tuple[str | None, ...]) -> int:
    if names is None:
        return 2**32 - 1
    return sum(1 << number for number, name in enumerate(known) if name in names)


def document(record: Traced, *, tick_s: float, now_ticks: int, now_s: float) -> dict[str, Any]:
    """A request for people and programs. time: seconds since 1970, when it came. tier: null where none serves
    it. error: the errno's name or null. queue and tag: whose place in the driver it had."""
    return {
        "time": round(now_s - (now_ticks - record.began) * tick_s, 6),
        "op": OPERATIONS[record.op],
        "offset_bytes": record.offset_bytes,
        "length_bytes": record.length_bytes,
        "tier": TIERS[record.tier] if record.tier < len(TIERS) else None,
        "latency_us": round(record.took * tick_s * 1e6, 1),
        "error": errno.errorcode.get(record.error, str(record.error)) if record.error else None,
        "fua": record.fua,
        "queue": record.queue,
        "tag": record.tag,
    }


class Tracer(Protocol):
    """As core.Door."""

    def trace(self, **wanted: Any) -> Source:
        """See core.Door.trace."""
        ...


class Readers:
    """All readers of one device."""

    def __init__(self, tick_s: Callable[[], float]) -> None:
        """tick_s: of the core's clock."""
        self._tick_s = tick_s
        self._door: Tracer | None = None
        self._readers: set[Reader] = set()

    def begin(self, door: Tracer) -> None:
        """It is served."""
        self._door = door

    def open(self, wanted: Wanted) -> Reader:
        """From now on. DeviceError: nobody serves the device."""
        if self._door is None:
            raise DeviceError("nobody serves the device at the moment, so there is nothing to trace")
        try:
            source = self._door.trace(**wanted.masks(self._tick_s()))
        except OSError as error:
            raise DeviceError(str(error)) from None
        reader = Reader(source, self._tick_s, wanted.limit, self._readers.discard)
        self._readers.add(reader)
        return reader

    def end(self, why: str) -> None:
        """Before the door is closed. See Reader.end."""
        self._door = None
        for reader in list(self._readers):
            reader.end(why)


class Reader:
    """What one client sees of a device's trace, from its call to its end or the device's."""

    def __init__(
        self,
        source: Source,
        tick_s: Callable[[], float],
        limit: int | None,
        on_close: Callable[[Reader], None] = lambda _: None,
    ) -> None:
        self._source: Source | None = source
        self._tick_s = tick_s
        self._left = limit
        self._on_close = on_close
        self._rest: list[dict[str, Any]] = []
        self._why: str | None = None
        self._ended = asyncio.Event()

    def end(self, why: str) -> None:
        """The device goes: nothing is read any more behind what is there now. why: "detached", "stopping"."""
        if self._why is None:
            self._why = why
            self._rest = self._documents()
            if self._source is not None and len(self._rest) >= BATCH:  # more than a moment is lost, and said
                records, lost = self._source.read(RECORDS_MAX)
                self._rest.append({"lost": lost + len(records)})
            self.close()
            self._ended.set()

    def close(self) -> None:
        """Whoever reads has gone. Can be called twice."""
        source, self._source = self._source, None
        if source is not None:
            source.close()
            self._on_close(self)

    def _documents(self) -> list[dict[str, Any]]:
        """What is new, in the order in which it ended; {"lost": N} before it where something is missing."""
        if self._source is None:
            return []
        records, lost = self._source.read(BATCH)
        records.sort(key=lambda record: record.began + record.took)
        tick_s, now_ticks, now_s = self._tick_s(), ticks_now(), time.time()
        missing: list[dict[str, Any]] = [{"lost": lost}] if lost else []
        return missing + [
            document(record, tick_s=tick_s, now_ticks=now_ticks, now_s=now_s) for record in records
        ]

    async def chunks(self) -> AsyncIterator[bytes]:
        """Lines of JSON, some at a time: requests, {"lost": N}, empty ones; the last is {"end": why}, where
        why is "limit", "detached" or "stopping"."""
        silent_s = ALIVE_S  # so that a client knows at once that it is on
        while True:
            why = self._why
            found = self._rest if why else self._documents()
            lines, full = self._limited(found), len(found) >= BATCH
            why = "limit" if self._left == 0 else why
            if why:
                lines += json.dumps({"end": why}) + "\n"
            if lines or silent_s >= ALIVE_S:
                silent_s = 0.0
                yield (lines or "\n").encode()
            if why:
                return
            pause_s = BREATH_S if full else LOOK_S
            silent_s += pause_s
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._ended.wait()

    def _limited(self, documents: list[dict[str, Any]]) -> str:
        lines = []
        for each in documents:
            if self._left == 0:
                break
            if self._left is not None and "lost" not in each:
                self._left -= 1
            lines.append(json.dumps(each) + "\n")
        return "".join(lines)
