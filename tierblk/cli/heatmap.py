"""The heat map of a device as a value, for those that draw it: cells, totals, partitions and what these hold.

All of it comes from the cache directory: the partition table and the filesystems are known only as far as
their first bytes are cached."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tierblk import contents, partition
from tierblk.cache.heat import Heat, heat, knows_use, total
from tierblk.cache.reading import Reader
from tierblk.cache.view import State, View
from tierblk.cli.target import CachedDevice
from tierblk.contents import Contents
from tierblk.core import BLOCK_BYTES
from tierblk.extent import SECTOR_BYTES, Extent, block_count
from tierblk.partition import Partition

CLASSES = {
    "dirty": "dirty, only here",
    "volume": "cached, of the volume",
    "base": "cached, of the image",
    "zero": "zeros",
    "stored": "in the volume's store, not here",
    "lost": "lost",
    "absent": "absent, would be fetched",
}
"""What a page can be, in the order of pictures, with its name for people; fields of Heat."""

STATES = {
    State.SERVED: "beside its daemon",
    State.ENDED: "its daemon has ended",
    State.KILLED: "its daemon was killed",
    State.CUT: "after a power cut",
    State.STRANGE: "its index is of another time: nothing cached counts",
}

EXTENDED = frozenset({"0x05", "0x0f", "0x85"})


@dataclass(frozen=True)
class Part:
    """A partition, what is cached of it, and what it holds. contents: None when that is not known, which
    unread explains: its first bytes are not cached."""

    partition: Partition
    heat: Heat
    contents: Contents | None
    unread: bool

    @property
    def is_extended(self) -> bool:
        """Whether it is only there for others in it."""
        return self.partition.kind in EXTENDED

    @property
    def type_name(self) -> str:
        """Of the table, for people."""
        return contents.type_name(self.partition.kind)

    @property
    def holds(self) -> str:
        """The filesystem, for people."""
        if self.contents is not None:
            return self.contents.kind
        return "not cached" if self.unread else "-"


@dataclass(frozen=True)
class HeatMap:
    """A range of a device. bounds: in blocks, of cells that are all but the last one cell_bytes large.

    table: kind of the partition table; None: none was found, or table_unread. device_contents: of an image
    that has no table."""

    name: str
    layers: tuple[str, ...]
    state: State
    size_bytes: int
    range: Extent
    cell_bytes: int
    cells: list[Heat]
    knows_use: bool
    table: str | None = None
    table_unread: bool = False
    parts: list[Part] = field(default_factory=list)
    device_contents: Contents | None = None
    volume_only: bool = False

    def text_of(self, name: str) -> str:
        """A class for people."""
        return "not written" if name == "absent" and self.volume_only else CLASSES[name]

    @property
    def total(self) -> Heat:
        return total(self.cells)

    @property
    def present(self) -> list[str]:
        """The classes that there are."""
        sums = self.total
        return [name for name in CLASSES if getattr(sums, name)]

    @property
    def notes(self) -> list[str]:
        """What the picture cannot show."""
        found = []
        if self.table_unread:
            found.append("The partition table is not known: the device's first sectors are not cached.")
        elif self.table is None and self.device_contents is not None:
            holds = self.device_contents
            label = f' "{holds.label}"' if holds.label else ""
            found.append(f"There is no partition table: the device holds {holds.kind}{label}.")
        elif self.table is None:
            found.append("There is no partition table.")
        if not self.knows_use:
            found.append(
                "What was used lately is not known: only a daemon that runs does, of what it may evict."
            )
        return found


def draw(
    view: View,
    device: CachedDevice,
    columns: int,
    rows: int,
    extent: Extent | None = None,
    *,
    layer: str | None = None,
) -> HeatMap:
    """A map of at most so many rows of so many cells, a power of two of blocks each. extent: of the device,
    made larger to whole blocks. layer: "volume" or "base", which is then shown without the other one; the
    partitions are the device's. CacheError."""
    wanted = extent or Extent(0, device.size_bytes)
    first, end = wanted.offset // BLOCK_BYTES, block_count(wanted.end)
    step = 1
    while -(-(end - first) // step) > columns * rows:
        step *= 2
    table, parts, unread, whole = _partitions(Reader(view, device.layers, device.size_bytes))
    edges = sorted({*range(first, end, step), end, *(b for p in parts for b in _clip(p[0], first, end))})
    volume = None if layer == "base" else device.volume
    base = None if layer == "volume" else device.base
    fine = heat(view, volume, base, edges)

    def within(start: int, stop: int) -> Heat:
        return total(fine[bisect_left(edges, start) : bisect_left(edges, stop)])

    return HeatMap(
        name=device.name,
        layers=tuple(
            record.shown if not record.is_volume else f"{record.kind} volume {record.name}"
            for record in (volume, base)
            if record is not None
        ),
        state=view.state,
        size_bytes=device.size_bytes,
        range=Extent(first * BLOCK_BYTES, min(end * BLOCK_BYTES, device.size_bytes) - first * BLOCK_BYTES),
        cell_bytes=step * BLOCK_BYTES,
        cells=[within(start, min(start + step, end)) for start in range(first, end, step)],
        knows_use=knows_use(view, volume, base),
        table=table,
        table_unread=unread,
        parts=[Part(one, within(*_clip(one, first, end)), *probed) for one, probed in parts],
        device_contents=whole,
        volume_only=layer == "volume",
    )


def _clip(part: Partition, first: int, end: int) -> tuple[int, int]:
    """The blocks of a partition that the range has, to a block."""
    start, stop = part.start_bytes // BLOCK_BYTES, block_count(part.end_bytes)
    return min(max(start, first), end), min(max(stop, first), end)


_Found = list[tuple[Partition, contents.Probed]]


def _partitions(reader: Reader) -> tuple[str | None, _Found, bool, Contents | None]:
    """(kind of the table, its partitions, whether it could not be read, what is there without one)."""
    size_bytes = reader.size_bytes
    whole = reader.peek(0, partition.HEAD_BYTES)
    head = whole or reader.peek(0, SECTOR_BYTES)  # which is enough for an MBR
    table = partition.parse(head, size_bytes) if head else None
    if table is None or head is None:
        holds = contents.probe(reader.peek).contents
        return None, [], whole is None and holds is None, holds
    parts = list(table.partitions)
    reads = partition.logical(head, size_bytes)
    try:
        wanted = next(reads)
        while True:
            wanted = reads.send(reader.peek(*wanted) or b"")
    except StopIteration as stop:
        parts += stop.value
    return table.kind, [(one, _probe(reader, one)) for one in parts], False, None


def _probe(reader: Reader, part: Partition) -> contents.Probed:
    if part.kind in EXTENDED:
        return contents.Probed(None, False)

    def within(offset: int, length: int) -> bytes | None:
        stop = min(offset + length, part.length_bytes)
        return reader.peek(part.start_bytes + offset, max(0, stop - offset))

    return contents.probe(within)


def document(drawn: HeatMap) -> dict[str, Any]:
    """As JSON: sizes in bytes; of cells a list for each class."""
    return {
        "device": drawn.name,
        "layers": list(drawn.layers),
        "state": drawn.state.value,
        "size_bytes": drawn.size_bytes,
        "range": {"offset_bytes": drawn.range.offset, "length_bytes": drawn.range.length},
        "total": _heat(drawn.total, drawn),
        "cell_bytes": drawn.cell_bytes,
        "cells": _columns(drawn.cells, drawn),
        "partition_table": drawn.table,
        "partition_table_cached": not drawn.table_unread,
        "contents": _contents(drawn.device_contents),
        "partitions": [_part(part, drawn) for part in drawn.parts],
    }


def _names(drawn: HeatMap) -> list[str]:
    return [*CLASSES, "used"] if drawn.knows_use else [*CLASSES]


def _heat(one: Heat, drawn: HeatMap) -> dict[str, int]:
    return {f"{name}_bytes": getattr(one, name) for name in _names(drawn)}


def _columns(cells: Sequence[Heat], drawn: HeatMap) -> dict[str, list[int]]:
    return {f"{name}_bytes": [getattr(one, name) for one in cells] for name in _names(drawn)}


def _contents(holds: Contents | None) -> dict[str, Any] | None:
    if holds is None:
        return None
    return {
        "kind": holds.kind,
        "label": holds.label or None,
        "uuid": holds.uuid or None,
        "total_bytes": holds.total_bytes,
        "used_bytes": holds.used_bytes,
    }


def _part(part: Part, drawn: HeatMap) -> dict[str, Any]:
    return {
        "number": part.partition.number,
        "type": part.partition.kind,
        "type_name": part.type_name,
        "name": part.partition.name or None,
        "start_bytes": part.partition.start_bytes,
        "length_bytes": part.partition.length_bytes,
        "in_range": _heat(part.heat, drawn),
        "contents": _contents(part.contents),
        "contents_cached": not part.unread,
    }
