"""The invariants of DESIGN 10 and rules of DESIGN 12 that rows and slots can show, as functions that can be
run.

Property tests call them after every step, crash tests on what a crash has left, an inspection on a whole
cache. They judge packed rows (rows.py), from the engine or from the index, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tierblk.cache.rows import NO_ENTRY, Entry, entries_of, unpack_row
from tierblk.cache.superblock import Superblock
from tierblk.core import ENTRIES_PER_ROW, crc32c
from tierblk.extent import BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK, block_count

SUM_BYTES = 4


class Violation(NamedTuple):
    """One thing that must never be. invariant: its number in DESIGN; layer, block: where, as far as that is
    known.
    """

    invariant: str
    layer: int | None
    block: int | None
    text: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f" layer {self.layer}"
        where += "" if self.block is None else f" block {self.block}"
        return f"{self.invariant}{where}: {self.text}"


@dataclass(frozen=True, slots=True)
class LayerRows:
    """A layer and its packed rows by number; b"" and a missing row are the same: nothing."""

    layer_id: int
    kind: str
    size_bytes: int
    rows: Mapping[int, bytes]


class Shape(Protocol):
    """Of a layer what its entries are judged by."""

    @property
    def layer_id(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class SlotCounts(NamedTuple):
    """Slots that no block has, as the engine counts them while no fill runs."""

    free: int
    quarantined: int
    bad: int = 0
    pinned: int = 0  # only a sealed epoch has them


def check(layers: Iterable[LayerRows], slot_count: int, counts: SlotCounts | None = None) -> list[Violation]:
    """What holds at every instant: rows are whole (R9), masks agree (R2, I3), slots have one owner (I4)."""
    violations: list[Violation] = []
    owners: dict[int, tuple[int, int]] = {}
    for layer in layers:
        for block, entry in _entries(layer, violations):
            violations += check_masks(layer, block, entry)
            violations += _check_slot(layer, block, entry, slot_count, owners)
    if counts is not None and len(owners) + sum(counts) != slot_count - 1:
        violations.append(
            Violation(
                "I4",
                None,
                None,
                f"{len(owners)} slots are owned, {counts.free} free, {counts.quarantined} in quarantine, "
                f"{counts.bad} bad: not the {slot_count - 1} that there are",
            )
        )
    return violations


def check_index(
    index: Iterable[LayerRows], maps: Iterable[LayerRows], counts: SlotCounts | None = None
) -> list[Violation]:
    """I4 between crash and now: a slot that the durable index names has had no other owner since, and is not
    free either (R8). counts: of the engine that has these maps.
    """
    violations: list[Violation] = []
    owners = {
        entry.slot: (layer.layer_id, block)
        for layer in maps
        for block, entry in _entries(layer, violations)
        if entry.slot
    }
    only_index = set[int]()
    for layer in index:
        for block, entry in _entries(layer, violations):
            here = (layer.layer_id, block)
            if entry.slot and (other := owners.get(entry.slot, here)) != here:
                text = (
                    f"the index names slot {entry.slot}, which block {other[1]} of layer {other[0]} has now"
                )
                violations.append(Violation("I4", *here, text))
            if entry.slot and entry.slot not in owners:
                only_index.add(entry.slot)
    if counts is not None and len(only_index) > sum(counts) - counts.free:
        text = (
            f"only the index names {len(only_index)} slots, {counts.quarantined} are in quarantine, "
            f"{counts.bad} bad and {counts.pinned} pinned: the others are free, and could be written before "
            "the index forgets them"
        )
        violations.append(Violation("R8", None, None, text))
    return violations


def check_committed(index: Iterable[LayerRows], maps: Iterable[LayerRows]) -> list[Violation]:
    """R6 while nothing counts as changed and no cycle runs: the durable index says what the maps say, of
    every block; nothing would ever write a row that differs. A row goes only when nothing is left of it (R2).
    """
    violations: list[Violation] = []
    durable, current = (
        {(layer.layer_id, block): entry for layer in side for block, entry in _entries(layer, violations)}
        for side in (index, maps)
    )
    for here in sorted(durable.keys() | current.keys()):
        if (said := durable.get(here, NO_ENTRY)) != (now := current.get(here, NO_ENTRY)):
            text = (
                f"the index says {_shown(said)}, the map {_shown(now)}, and the row does not count as changed"
            )
            violations.append(Violation("R6", *here, text))
    return violations


def check_session(
    superblock: Superblock, index_session: int, index_clean: bool, *, running: bool
) -> list[Violation]:
    """R8: slots and index are of the same time. running: while a daemon has them, who may write slots."""
    texts = []
    if not superblock.confirmed <= index_session <= superblock.session:
        texts.append(
            f"the index is of session {index_session}, the slots of {superblock.confirmed} to "
            f"{superblock.session}: what it names cannot be trusted"
        )
    if running and superblock.confirmed != superblock.session:
        texts.append(f"session {superblock.session} is served and the slots do not say so")
    if running and index_clean:
        texts.append("slots may be written while the index says that the last session ended in order")
    return [Violation("R8", None, None, text) for text in texts]


def check_bytes(
    layers: Iterable[LayerRows], read: Callable[[int, int], bytes], sums: bytes | memoryview
) -> list[Violation]:
    """I5: what rows name is in the slots file. read(offset_bytes, length_bytes): of that file; sums: that
    file.

    Only of clean pages (R9): which dirty ones have sums is not in rows.
    """
    violations: list[Violation] = []
    for layer in layers:
        for block, entry in _entries(layer, violations):
            if not entry.cached & ~entry.dirty:
                continue
            data = read(entry.slot * BLOCK_BYTES, BLOCK_BYTES)
            kept = sums[entry.slot * PAGES_PER_BLOCK * SUM_BYTES :][: PAGES_PER_BLOCK * SUM_BYTES]
            if len(data) != BLOCK_BYTES or len(kept) != PAGES_PER_BLOCK * SUM_BYTES:
                text = f"slot {entry.slot} lies beyond the end of the slots file or of its sums"
                violations.append(Violation("I5", layer.layer_id, block, text))
                continue
            for page in _pages(entry.cached & ~entry.dirty):
                expected = int.from_bytes(kept[page * SUM_BYTES : (page + 1) * SUM_BYTES], "little")
                if crc32c(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) != expected:
                    text = f"page {page} in slot {entry.slot} is not what was written there"
                    violations.append(Violation("I5", layer.layer_id, block, text))
    return violations


def _shown(entry: Entry) -> str:
    slot, *masks = entry[:5]
    named = zip(("present", "cached", "zero", "dirty"), masks, strict=True)
    return f"slot {slot}" + "".join(f" {name} {mask:#06x}" for name, mask in named if mask)


def _pages(mask: int) -> Iterator[int]:
    return (page for page in range(PAGES_PER_BLOCK) if mask >> page & 1)


def _entries(layer: LayerRows, violations: list[Violation]) -> Iterator[tuple[int, Entry]]:
    """(block, entry) of all entries that hold anything; rows that cannot be read become violations of R9."""
    for row, packed in sorted(layer.rows.items()):
        try:
            entries = unpack_row(packed) if packed else entries_of(packed)
        except ValueError as error:
            violations.append(Violation("R9", layer.layer_id, row * ENTRIES_PER_ROW, str(error)))
            continue
        for block, entry in enumerate(entries, row * ENTRIES_PER_ROW):
            if any(entry):
                yield block, entry


def check_masks(layer: Shape, block: int, entry: Entry) -> Iterator[Violation]:
    """What one entry shows by itself."""

    def violation(invariant: str, text: str) -> Violation:
        return Violation(invariant, layer.layer_id, block, text)

    pages = -(-(layer.size_bytes - block * BLOCK_BYTES) // PAGE_BYTES)
    beyond = -1 << max(0, min(pages, PAGES_PER_BLOCK))
    if (
        block >= block_count(layer.size_bytes)
        or (entry.present | entry.cached | entry.zero | entry.dirty) & beyond
    ):
        yield violation("R9", "the entry holds something beyond the end of the layer")
    if entry.cached & entry.zero:
        yield violation("R2", f"pages are both cached and zero: {entry.cached & entry.zero:#06x}")
    if entry.cached and not entry.slot:
        yield violation("R2", f"pages are cached without a slot: {entry.cached:#06x}")
    if entry.dirty & ~entry.present:
        yield violation("I3", f"dirty pages are not present: {entry.dirty & ~entry.present:#06x}")
    if entry.dirty & ~(entry.cached | entry.zero):
        yield violation("I3", f"dirty pages are nowhere: {entry.dirty & ~(entry.cached | entry.zero):#06x}")
    if layer.kind != "base" and (absent := (entry.cached | entry.zero) & ~(entry.present | entry.dirty)):
        yield violation("I3", f"pages are here and not present: {absent:#06x}")
    if layer.kind == "base" and entry.dirty:
        yield violation("I3", f"pages of a base, which nobody writes, are dirty: {entry.dirty:#06x}")
    if layer.kind == "base" and entry.present & ~entry.dirty:
        yield violation("R9", f"pages of a base, which nobody writes, are present: {entry.present:#06x}")
    if entry.slot and not entry.cached:
        yield violation("R2", f"slot {entry.slot} is held by a block of which nothing is cached")


def _check_slot(
    layer: LayerRows, block: int, entry: Entry, slot_count: int, owners: dict[int, tuple[int, int]]
) -> Iterator[Violation]:
    if not entry.slot:
        return
    here = (layer.layer_id, block)
    if entry.slot >= slot_count:
        yield Violation("I4", *here, f"slot {entry.slot} does not exist: there are {slot_count}")
    elif (other := owners.setdefault(entry.slot, here)) != here:
        yield Violation(
            "I4", *here, f"slot {entry.slot} is also that of block {other[1]} of layer {other[0]}"
        )
