"""Doors: ways into a layer, or a volume over one, whose threads are C's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tierblk.core._core import ffi, lib
from tierblk.core.calls import check, counters
from tierblk.core.traces import Trace, switch_off, switch_on

if TYPE_CHECKING:
    from tierblk.core import Engine, Layer

FOR_EVER_MS = 2**32 - 1
_HOT_BYTES_MIN: int = 8 * lib.TB_BLOCK_BYTES  # a set of frames (hot.c)


class Door:
    """A way into a layer, with a thread for each of its queues. `end_fds` are readable once these threads
    have ended."""

    def __init__(self, queues: Sequence[Any], depth: int) -> None:
        """queues: of C, which `close` frees; depth: requests in flight of each."""
        self._queues = list(queues)
        self._traces = 0
        self.depth = depth
        self.end_fds: tuple[int, ...] = tuple(lib.tb_door_end_fd(queue) for queue in queues)

    @property
    def queues(self) -> Sequence[Any]:
        if not self._queues:
            raise ValueError("the door is closed")
        return self._queues

    def stats(self) -> dict[str, int]:
        """Counters of tb_stats: requests and bytes; `waiting`, `active` and `oldest_wait_ms` are levels."""
        each = []
        for queue in self.queues:
            out = ffi.new("tb_stats *")
            lib.tb_door_stats(queue, out)
            each.append(counters(out))
        total = {name: sum(stats[name] for stats in each) for name in each[0]}
        return {**total, "oldest_wait_ms": max(stats["oldest_wait_ms"] for stats in each)}

    def latencies(self) -> list[tuple[list[int], int]]:
        """For each tier (hit, zero, miss, memory, write, flush) how many requests, by bucket (cdef.h), and
        how long all of them took together, in ticks."""
        buckets, tiers = lib.TB_LATENCY_BUCKETS, lib.TB_TIERS
        counts, ticks = ffi.new("uint64_t[]", tiers * buckets), ffi.new("uint64_t[]", tiers)
        for queue in self.queues:
            lib.tb_door_latencies(queue, counts, ticks)
        all_counts: Any = ffi.unpack(counts, tiers * buckets)
        return [(all_counts[tier * buckets :][:buckets], ticks[tier]) for tier in range(tiers)]

    def trace(self, **wanted: Any) -> Trace:
        """What requests do from now on; wanted: see Trace. It is on while one of its traces is not closed.
        OSError ENOMEM."""
        queues = self.queues
        if not self._traces:
            switch_on(queues)
        self._traces += 1
        return Trace(queues, self._trace_closed, **wanted)

    def _trace_closed(self) -> None:
        self._traces -= 1
        if not self._traces:
            switch_off(self._queues)  # none of a door that is closed

    def drain(self) -> None:
        """Ends every parked and later miss in EIO; hits go on. Before STOP_DEV, always."""
        for queue in self.queues:
            lib.tb_door_drain(queue)

    def leave(self) -> None:
        """Hand-over of a device with user recovery: the threads end soon and complete nothing any more; the
        driver issues what is left to the next daemon. Other doors drain and quit."""
        for queue in self.queues:
            lib.tb_door_leave(queue)

    def set_patience(self, patience_s: float) -> None:
        """How long a request may wait for a fill: math.inf, or until GIVE_UP (0), or seconds, after which it
        ends in EIO whatever the event loop does."""
        ms = FOR_EVER_MS if math.isinf(patience_s) else min(round(patience_s * 1000), FOR_EVER_MS - 1)
        for queue in self.queues:
            lib.tb_door_set_patience(queue, ms)

    def quit(self) -> None:
        """Asks the threads to end when no request is active."""
        for queue in self.queues:
            lib.tb_door_quit(queue)

    def close(self) -> None:
        """Waits for the threads and frees the door. Blocks: not on the event loop."""
        queues, self._queues = self._queues, []
        for queue in queues:
            lib.tb_door_close(queue)


class UblkDoor(Door):
    """All hardware queues of a ublk device. Open it after SET_PARAMS, before START_DEV. Raises OSError."""

    def __init__(
        self,
        engine: Engine,
        base: Layer | None,
        *,
        volume: Layer | None = None,
        size_bytes: int | None = None,
        cdev_fd: int,
        dev_id: int,
        queue_depth: int,
        cpus: Sequence[bytes],
        zero_copy: bool,
        hot_bytes: int = 0,
    ) -> None:
        """cpus: for each queue a mask of the processors that its thread may run on, b"" for any.
        zero_copy: what ADD_DEV has granted. hot_bytes: of the memory tier of all queues together; each gets
        at least 512 KiB, or none when it is 0."""
        super().__init__([], queue_depth)
        stack = _stack(base, volume, size_bytes)
        try:
            for q_id, mask in enumerate(cpus):
                out = ffi.new("tb_queue **")
                rc = lib.tb_ublk_open(
                    engine.handle,
                    stack,
                    cdev_fd,
                    dev_id,
                    q_id,
                    queue_depth,
                    zero_copy,
                    max(hot_bytes // len(cpus), _HOT_BYTES_MIN) if hot_bytes else 0,
                    mask,
                    len(mask),
                    out,
                )
                check(rc, f"cannot serve queue {q_id} of ublk device {dev_id}")
                self._queues.append(out[0])
        except OSError:
            if self._queues:  # no request came yet
                self.leave()
                self.close()
            raise
        super().__init__(self._queues, queue_depth)


class LocalDoor(Door):
    """Calls from this process. All raise OSError, may come from any thread, and block it without the GIL.
    Offsets and lengths in bytes, multiples of 512."""

    def __init__(
        self,
        engine: Engine,
        base: Layer | None,
        *,
        volume: Layer | None = None,
        size_bytes: int | None = None,
        queue_depth: int = 16,
        hot_bytes: int = 0,
    ) -> None:
        """Of a base, a volume, or a volume over a base; size_bytes: of the device, if it is not the topmost
        layer's."""
        out = ffi.new("tb_queue **")
        stack = _stack(base, volume, size_bytes)
        rc = lib.tb_local_open(engine.handle, stack, queue_depth, hot_bytes, out)
        check(rc, "cannot open a local door")
        super().__init__([out[0]], queue_depth)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """The device's bytes."""
        out = ffi.new("uint8_t[]", length_bytes)
        rc = lib.tb_local_read(self.queues[0], offset_bytes, length_bytes, out)
        check(rc, f"read of {length_bytes} bytes at {offset_bytes}")
        return bytes(ffi.buffer(out))

    def write(self, offset_bytes: int, data: bytes, *, fua: bool = False) -> None:
        """fua: durable when it returns."""
        op = lib.TB_OP_WRITE | (lib.TB_OP_FUA if fua else 0)
        self._call(op, offset_bytes, len(data), ffi.from_buffer("uint8_t[]", data))

    def flush(self) -> None:
        """What was written before it is durable when it returns."""
        self._call(lib.TB_OP_FLUSH, 0, 0, ffi.NULL)

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Whole pages of the range read as zeros afterwards."""
        self._call(lib.TB_OP_DISCARD, offset_bytes, length_bytes, ffi.NULL)

    def write_zeroes(self, offset_bytes: int, length_bytes: int, *, fua: bool = False) -> None:
        """The range reads as zeros afterwards, to the byte. fua: durable when it returns."""
        op = lib.TB_OP_ZEROES | (lib.TB_OP_FUA if fua else 0)
        self._call(op, offset_bytes, length_bytes, ffi.NULL)

    def _call(self, op: int, offset_bytes: int, length_bytes: int, data: Any) -> None:
        rc = lib.tb_local_call(self.queues[0], op, offset_bytes, length_bytes, data)
        check(rc, f"{_OPERATIONS[op & 0xFF]} of {length_bytes} bytes at {offset_bytes}")


@contextmanager
def local_door(
    engine: Engine, base: Layer, *, queue_depth: int = 16, hot_bytes: int = 0
) -> Iterator[LocalDoor]:
    """A local door for a while; at the end its misses are drained, so it closes whatever the remote does."""
    door = LocalDoor(engine, base, queue_depth=queue_depth, hot_bytes=hot_bytes)
    try:
        yield door
    finally:
        door.drain()
        door.quit()
        door.close()


def _stack(base: Layer | None, volume: Layer | None, size_bytes: int | None) -> Any:
    top = volume or base
    if top is None:
        raise ValueError("a device has a volume, or a base, or both")
    return ffi.new(
        "tb_stack *",
        {
            "volume": volume.handle if volume else ffi.NULL,
            "base": base.handle if base else ffi.NULL,
            "size_bytes": top.size_bytes if size_bytes is None else size_bytes,
        },
    )


_OPERATIONS = ("read", "write", "flush", "discard", "write of zeros")
