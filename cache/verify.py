"""A cache directory looked through, beside a daemon too: every invariant that its files can show, and every
page that has a sum against it. Changes nothing.

What was filled or uploaded has one, and what was written when it has come to rest (settle.py). Of another
dirty page nobody but its slot knows what it should be: its block is counted, and what its masks and its
slot's owner say is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tierblk.cache.census import count
from tierblk.cache.invariants import Violation, check_masks, check_session
from tierblk.cache.layers import LayerRecord
from tierblk.cache.pagecheck import Bad, PageCheck, Place
from tierblk.cache.rows import Entry
from tierblk.cache.superblock import Superblock
from tierblk.cache.view import LayerView, State, View, look
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, PAGE_BYTES, PAGES_PER_BLOCK

Progress = Callable[[int, int], None]
"""Is told (slots looked at, slots to look at)."""

KEPT_MAX = 100_000
_LOOKS = 3


@dataclass
class LayerFound:
    """A layer, how many bytes of it are here, and of those how many nobody else has. unchecked_blocks: that
    have dirty pages in their slot, and no sums of them yet. bad: what does not fit its sum."""

    record: LayerRecord
    cached_bytes: int = 0
    dirty_bytes: int = 0
    zero_bytes: int = 0
    unchecked_blocks: int = 0
    bad: list[Bad] = field(default_factory=list)


@dataclass
class Found:
    """What a look at a directory brought. clean: the last daemon ended in order. bad_superblocks: of its two
    copies how many cannot be read. violations: the first KEPT_MAX, left_off: how many more. unsettled_blocks:
    changed too fast, beside a daemon, to be judged. complete: it was not interrupted."""

    superblock: Superblock
    state: State
    clean: bool
    bad_superblocks: int
    layers: list[LayerFound]
    violations: list[Violation] = field(default_factory=list)
    left_off: int = 0
    checked_slots: int = 0
    unsettled_blocks: int = 0
    complete: bool = True

    @property
    def ok(self) -> bool:
        """Nothing is wrong, as far as it came."""
        return not self.violations

    def add(self, violation: Violation) -> None:
        """One more."""
        if len(self.violations) < KEPT_MAX:
            self.violations.append(violation)
        else:
            self.left_off += 1


def verify(path: Path, run_root: Path, progress: Progress = lambda done, total: None) -> Found:
    """Looks through a cache directory. Blocks as long as it takes to read what is cached; a KeyboardInterrupt
    ends it with what was found so far. CacheError when it cannot be looked into: it is none, is damaged
    beyond reading, or was made by a newer version.
    """
    with look(path, run_root, lenient=True) as view:
        layers = [view.layer(record) for record in view.records]
        found = Found(
            view.superblock,
            view.state,
            view.meta.clean,
            view.bad_superblocks,
            [LayerFound(record) for record in view.records],
        )
        for fault in view.faults:
            found.add(Violation(fault.invariant, None, None, fault.text))
        for violation in check_session(view.superblock, view.meta.session, view.meta.clean, running=False):
            found.add(violation)
        try:
            slots = _Structure(view, layers, found).check()
            _check_pages(view, layers, found, slots, progress)
        except KeyboardInterrupt:
            found.complete = False
        return found


class _Structure:
    """What entries show: rows are whole (R9), masks agree (R2, I3), slots have one owner (I4)."""

    def __init__(self, view: View, layers: list[LayerView], found: Found) -> None:
        self._slot_count = view.superblock.slot_count
        self._live = view.state is State.SERVED
        self._layers = layers
        self._found = found
        self._owned = bytearray(self._slot_count // 8 + 1)  # a bit a slot
        self._twice: set[int] = set()

    def check(self) -> int:
        """How many slots have pages with sums."""
        slots = 0
        for layer, counts in zip(self._layers, self._found.layers, strict=True):
            is_volume = layer.record.is_volume
            whole_blocks = layer.record.size_bytes // BLOCK_BYTES
            for block, entry in layer.entries():
                slots += entry.checkable != 0
                counts.unchecked_blocks += entry.cached & entry.dirty & ~entry.summed != 0
                if block >= whole_blocks or not _is_plain(entry, is_volume=is_volume):
                    self._check_masks(layer, block, entry)
                if entry.slot:
                    self._check_slot(layer, block, entry)
            _count(counts, layer)
            for row, text in layer.row_faults.items():
                self._found.add(Violation("R9", layer.record.layer_id, row * ENTRIES_PER_ROW, text))
        if self._twice:
            self._find_owners()
        return slots

    def _check_masks(self, layer: LayerView, block: int, entry: Entry) -> None:
        wrong = list(check_masks(layer.record, block, entry))
        if wrong and self._is_still(layer, block, entry):
            for violation in wrong:
                self._found.add(violation)

    def _check_slot(self, layer: LayerView, block: int, entry: Entry) -> None:
        slot = entry.slot
        if slot >= self._slot_count:
            text = f"slot {slot} does not exist: there are {self._slot_count}"
            if self._is_still(layer, block, entry):
                self._found.add(Violation("I4", layer.record.layer_id, block, text))
            return
        at, bit = slot >> 3, 1 << (slot & 7)
        if self._owned[at] & bit and len(self._twice) < KEPT_MAX:
            self._twice.add(slot)
        self._owned[at] |= bit

    def _is_still(self, layer: LayerView, block: int, entry: Entry) -> bool:
        """An entry is changed by one store, so what it says now it says at an instant; one more look costs
        nothing."""
        return not self._live or layer.entry(block)[:5] == entry[:5]

    def _find_owners(self) -> None:
        """Beside a daemon most of these slots have changed hands between the looks at two blocks."""
        owners: dict[int, list[tuple[LayerView, int]]] = {}
        for layer in self._layers:
            for block, entry in layer.entries():
                if entry.slot in self._twice:
                    owners.setdefault(entry.slot, []).append((layer, block))
        for slot, (first, *others) in owners.items():
            for other in others:
                if not self._live or _both_have(slot, first, other):
                    text = f"slot {slot} is also that of block {first[1]} of layer {first[0].record.layer_id}"
                    self._found.add(Violation("I4", other[0].record.layer_id, other[1], text))


def _both_have(slot: int, one: tuple[LayerView, int], other: tuple[LayerView, int]) -> bool:
    """Whether a slot is that of two blocks at once: one has it before and after the other is looked at."""
    looks = (one, other, one) * _LOOKS
    return all(layer.entry(block).slot == slot for layer, block in looks)


def _is_plain(entry: Entry, *, is_volume: bool) -> bool:
    """What most blocks are, cached without a contradiction: said faster than by check_masks."""
    slot, present, cached, zero, dirty, _ = entry
    if not slot or not cached or zero:
        return False
    return not (dirty & ~cached or cached & ~present) if is_volume else not (present or dirty)


def _count(counts: LayerFound, layer: LayerView) -> None:
    census = count(layer)
    counts.cached_bytes = census.cached_pages * PAGE_BYTES
    counts.zero_bytes = census.zero_pages * PAGE_BYTES
    counts.dirty_bytes = census.dirty_pages * PAGE_BYTES


def _check_pages(view: View, layers: list[LayerView], found: Found, slots: int, progress: Progress) -> None:
    """I5: what entries name is in the slots file."""
    counts = {layer.record.layer_id: each for layer, each in zip(layers, found.layers, strict=True)}
    # Closed here, also by a Ctrl-C: its threads read files that the view closes.
    with closing(PageCheck(view).check(_places(view, layers, found))) as results:
        for checked in results:
            found.checked_slots += checked.places
            found.unsettled_blocks += checked.unsettled
            for bad in checked.bad:
                counts[bad.layer.record.layer_id].bad.append(bad)
                for text in _texts(bad):
                    found.add(Violation("I5", bad.layer.record.layer_id, bad.block, text))
            progress(found.checked_slots, max(slots, found.checked_slots))


def _places(view: View, layers: list[LayerView], found: Found) -> Iterator[Place]:
    """What has pages with sums, in slots that the files have."""
    end = view.whole_slots
    for layer in layers:
        for block, entry in layer.entries():
            if not entry.checkable:
                continue
            if not 0 < entry.slot < end:
                if entry.slot:
                    text = f"slot {entry.slot} lies beyond the end of the slots file or of its sums"
                    found.add(Violation("I5", layer.record.layer_id, block, text))
                continue
            yield Place(layer, block, entry)


def _texts(bad: Bad) -> Iterator[str]:
    if bad.trouble:
        yield bad.trouble
    for page in range(PAGES_PER_BLOCK):
        if bad.pages >> page & 1:
            lost = ", and nobody else has it" if bad.dirty >> page & 1 else ""
            yield f"page {page} in slot {bad.slot} is not what was written there{lost}"
