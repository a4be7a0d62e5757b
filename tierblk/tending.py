"""What can be asked of a cache by hand: evict, pin, collect. The same for a daemon, which is asked over its
control socket, and for a directory that nobody serves (workshop.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tierblk.cache import Cache, LayerRecord, tend
from tierblk.cache.tend import Evicted
from tierblk.core import PAGE_BYTES
from tierblk.errors import DeviceError
from tierblk.extent import BLOCK_BYTES, Extent

Document = dict[str, Any]


def _record(cache: Cache, layer_id: int) -> LayerRecord:
    found = next((record for record in cache.records if record.layer_id == layer_id), None)
    if found is None:
        raise DeviceError(f"{cache.path} has no layer {layer_id}", "`tierblk cache ls` shows them")
    return found


async def evict(cache: Cache, layer_id: int, ranges: Sequence[Extent]) -> Document:
    """What can go of the blocks that lie in these ranges in whole is gone when this returns, durably.
    CacheError, DeviceError.

    {"layer_id", "evicted_bytes", "dirty_bytes": stay since nobody else has them, "busy_bytes": were in use}.
    """
    size_bytes, total = _record(cache, layer_id).size_bytes, Evicted()
    for wanted in ranges:
        first, end = _whole_blocks(wanted, size_bytes)
        if first < end:
            total += await cache.evict(layer_id, first, end)
    return {
        "layer_id": layer_id,
        "evicted_bytes": total.evicted_bytes,
        "dirty_bytes": total.dirty_bytes,
        "busy_bytes": total.busy_bytes,
    }


def drop(cache: Cache, layer_id: int, pages: Sequence[tuple[int, int]]) -> Document:
    """These pages, (block, mask) each, are not cached any more, as far as they are clean and not in use.
    CacheError. {"layer_id", "dropped_pages", "busy_blocks": of which nothing went}."""
    _record(cache, layer_id)
    layer = cache.layer(layer_id)
    found = [(block, layer.drop(block, mask)) for block, mask in pages if block < layer.blocks]
    return {
        "layer_id": layer_id,
        "dropped_pages": sum(count or 0 for _, count in found),
        "busy_blocks": [block for block, count in found if count is None],
    }


async def pin(cache: Cache, layer_id: int, ranges: Sequence[Extent], *, pinned: bool) -> Document:
    """The blocks that these ranges touch are never evicted from now on, or may be again; durable when it
    returns. CacheError. {"layer_id", "pins": [[offset, length], ...] in bytes, all that the layer has}."""
    size_bytes = _record(cache, layer_id).size_bytes
    for wanted in ranges:
        blocks = wanted.clamp(size_bytes).blocks()
        if blocks:
            await cache.pin(layer_id, blocks.start, blocks.stop, pinned=pinned)
    return {"layer_id": layer_id, "pins": pins_of(_record(cache, layer_id))}


def pins_of(record: LayerRecord) -> list[list[int]]:
    """[offset, length] in bytes."""
    return [[first * BLOCK_BYTES, (end - first) * BLOCK_BYTES] for first, end in record.pins]


async def collect(
    cache: Cache,
    *,
    older_s: float,
    dry_run: bool,
    in_use: Collection[int] = (),
    needed: Callable[[], Collection[tuple[str, int, str]]] = tuple,
) -> Document:
    """Bases that nobody uses, see tend.unused, are gone when this returns; dry_run: only named. in_use and
    needed are looked at again before each goes, since attaches go on meanwhile. CacheError.

    {"layers": [{"layer_id", "what", "validator", "used_unix_s", "cached_bytes"}], "cached_bytes"}."""
    before_unix_s = time.time() - older_s

    def unused() -> list[LayerRecord]:
        return tend.unused(cache.records, in_use, needed(), before_unix_s)

    layers = []
    for record in unused():
        cached_bytes = cache.layer(record.layer_id).cached_pages() * PAGE_BYTES
        if dry_run or await cache.drop_base(record.layer_id, lambda known: known in unused()):
            layers.append(
                {
                    "layer_id": record.layer_id,
                    "what": record.shown,
                    "validator": record.validator,
                    "used_unix_s": record.used_unix_s,
                    "cached_bytes": cached_bytes,
                }
            )
    return {"layers": layers, "cached_bytes": sum(int(str(layer["cached_bytes"])) for layer in layers)}


def _whole_blocks(wanted: Extent, size_bytes: int) -> tuple[int, int]:
    """(first, behind the last) of the blocks that lie in a range in whole; the layer's last one may be
    short."""
    found = wanted.clamp(size_bytes)
    end = found.end if found.end < size_bytes else -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
    return -(-found.offset // BLOCK_BYTES), end // BLOCK_BYTES
