"""What a user may want of what is cached: blocks that go at once, blocks that never go, images that nobody
needs any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tierblk.cache.rows import entries_of
from tierblk.core import ENTRIES_PER_ROW, PAGE_BYTES, Engine, Layer
from tierblk.errors import CacheError, TooMuch
from tierblk.extent import BLOCK_BYTES
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cache.layers import LayerRecord

PINNED_SHARE = 2
"""Half of the slots may be pinned: the other half is for what is read, and written, beside it."""

_ROWS_AT_ONCE = 256
_BLOCKS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Evicted:
    """In bytes of pages. dirty: stay, nobody else has them; busy: were in use at that moment."""

    evicted_bytes: int = 0
    dirty_bytes: int = 0
    busy_bytes: int = 0

    def __add__(self, other: Evicted) -> Evicted:
        return Evicted(
            self.evicted_bytes + other.evicted_bytes,
            self.dirty_bytes + other.dirty_bytes,
            self.busy_bytes + other.busy_bytes,
        )


async def evict(layer_of: Callable[[], Layer], first_block: int, end_block: int) -> Evicted:
    """All of these blocks that can go is not cached any more; slots are free behind the next commit (I4).
    Pinned ones go too, and are pinned when they come again. layer_of: asked again whenever others have run,
    who may have closed the cache."""
    layer = layer_of()
    evicted = dirty = busy = 0
    first_row, end_row = first_block // ENTRIES_PER_ROW, -(-end_block // ENTRIES_PER_ROW)
    for row in range(first_row, min(end_row, layer.rows)):
        if row % _ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
            layer = layer_of()
        if not (packed := layer.peek_row(row)):
            continue
        for block, entry in enumerate(entries_of(packed), row * ENTRIES_PER_ROW):
            if not (entry.cached and first_block <= block < end_block):
                continue
            gone = layer.drop(block)
            clean = (entry.cached & ~entry.dirty).bit_count()
            evicted += gone or 0
            busy += clean if gone is None else 0
            dirty += (entry.cached & entry.dirty).bit_count()
    return Evicted(evicted * PAGE_BYTES, dirty * PAGE_BYTES, busy * PAGE_BYTES)


def check_pins(records: Iterable[LayerRecord], engine: Engine) -> None:
    """TooMuch: more is pinned than a cache of this size may hold on to."""
    wanted = sum(end - first for record in records for first, end in record.pins)
    most = engine.slot_count // PINNED_SHARE
    if wanted > most:
        raise TooMuch(
            f"{format_size(wanted * BLOCK_BYTES)} would be pinned, and this cache may keep "
            f"{format_size(most * BLOCK_BYTES)} pinned",
            "pin less, or give it a larger cache.size",
        )


def with_pins(record: LayerRecord, first_block: int, end_block: int, *, pinned: bool) -> LayerRecord:
    """The record with these blocks pinned, or not."""
    left = [
        part
        for first, end in record.pins
        for part in ((first, min(end, first_block)), (max(first, end_block), end))
        if part[0] < part[1]
    ]
    if pinned:
        left.append((first_block, end_block))
    joined: list[tuple[int, int]] = []
    for first, end in sorted(left):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return replace(record, pins=tuple(joined))


async def apply_pins(layer: Layer, first_block: int, end_block: int, *, pinned: bool) -> None:
    """Tells the engine. CacheError: the map's tmpfs is full."""
    for block in range(first_block, min(end_block, layer.blocks)):
        _pin(layer, block, pinned)
        if block % _BLOCKS_AT_ONCE == 0:
            await asyncio.sleep(0)


def apply_all_pins(records: Iterable[LayerRecord], layers: Mapping[int, Layer]) -> None:
    """At an opening. CacheError."""
    for record in records:
        for first, end in record.pins:
            for block in range(first, min(end, layers[record.layer_id].blocks)):
                _pin(layers[record.layer_id], block, True)


def _pin(layer: Layer, block: int, pinned: bool) -> None:
    try:
        layer.pin(block, pinned)
    except OSError as error:
        raise CacheError(f"block {block} cannot be pinned: {error.strerror}") from None


def unused(
    records: Collection[LayerRecord],
    in_use: Collection[int],
    needed: Collection[tuple[str, int, str]],
    before_unix_s: float,
) -> list[LayerRecord]:
    """Bases that can go: no device shows them (in_use: layer ids; needed: identities of devices that wait),
    no volume lies over them, nothing of them is pinned, and they were used last before then."""
    below = {record.base for record in records} | set(needed)
    return [
        record
        for record in records
        if not record.is_volume
        and record.layer_id not in in_use
        and (record.url, record.size_bytes, record.validator) not in below
        and not record.pins
        and record.used_unix_s < before_unix_s
    ]
