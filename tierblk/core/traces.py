"""What each request of a door did, for whoever asks while it happens (trace.c)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tierblk.core._core import ffi, lib
from tierblk.core.calls import check

ALL = 2**32 - 1
RECORDS: int = lib.TB_TRACE_RECORDS
"""That each queue keeps for its readers; who is further behind has lost some."""

_RECORD = struct.Struct("=QQQQBBHhH")


class Traced(NamedTuple):
    """A request that has ended. began, took: ticks of the engine's clock. offset_bytes, length_bytes: as it
    was asked for. op: TB_OP_*; tier: its place in latency.TIERS, or behind them where none served it; error:
    an errno or 0."""

    began: int
    took: int
    offset_bytes: int
    length_bytes: int
    op: int
    tier: int
    tag: int
    error: int
    fua: bool
    queue: int


class Trace:
    """One reader of a door's trace. All belongs to the thread that the door was opened for, usually the event
    loop; nothing may be called once the door is closed."""

    def __init__(
        self,
        queues: Sequence[Any],
        on_close: Callable[[], None],
        *,
        ops: int = ALL,
        tiers: int = ALL,
        min_ticks: int = 0,
        within: tuple[int, int] | None = None,
    ) -> None:
        """ops, tiers: masks of those that are wanted; within: bytes of the device, (start, end), of which a
        request must touch one."""
        start, end = within or (0, 0)
        self._queues = queues
        self._on_close: Callable[[], None] | None = on_close
        self._positions = [ffi.new("uint64_t *", lib.tb_door_trace_end(queue)) for queue in queues]
        self._lost = ffi.new("uint64_t *")
        self._first = 0
        self._filter = ffi.new(
            "tb_trace_filter *",
            {
                "min_ticks": min_ticks,
                "start": start,
                "end": end,
                "ops": ops,
                "tiers": tiers,
                "ranged": within is not None,
            },
        )

    def read(self, records_max: int) -> tuple[list[Traced], int]:
        """(what has ended since the last time and is wanted, how many were lost since then, wanted or not).
        Of each queue in order. As many as `records_max`: perhaps there are more."""
        found: list[Traced] = []
        self._lost[0] = 0
        out = ffi.new("tb_traced[]", records_max)
        count = len(self._queues)
        self._first = (self._first + 1) % count  # or a busy queue would leave no room for the others
        for i in range(count):
            number = (self._first + i) % count
            room = records_max - len(found)
            queue, position = self._queues[number], self._positions[number]
            got = lib.tb_door_trace_read(queue, position, self._filter, out, room, self._lost)
            data = ffi.buffer(out, got * _RECORD.size)
            for began, took, offset, length, op, tier, tag, result, flags in _RECORD.iter_unpack(data):
                fua = bool(flags & lib.TB_TRACE_FUA)
                found.append(Traced(began, took, offset, length, op, tier, tag, -result, fua, number))
        return found, int(self._lost[0])

    def close(self) -> None:
        """Nobody reads it any more; the last one of a door switches its tracing off. Can be called twice."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


def switch_on(queues: Sequence[Any]) -> None:
    """Of all queues, or of none and OSError ENOMEM."""
    try:
        for queue in queues:
            check(lib.tb_door_trace_start(queue), "cannot trace requests")
    except OSError:
        switch_off(queues)
        raise


def switch_off(queues: Sequence[Any]) -> None:
    for queue in queues:
        lib.tb_door_trace_stop(queue)


def ticks_now() -> int:
    """On the clock that `Traced` has."""
    return int(lib.tb_ticks_now())
