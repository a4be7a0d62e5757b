"""The core's sums of pages by cell are those of a count page by page, of rows and of maps."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tierblk.cache.rows import ROW_ENTRY_BYTES, Entry
from tierblk.core import PAGES_PER_BLOCK
from tierblk.core.tally import Share, Tally

MAP_ENTRY_BYTES = 32
REFERENCED = 1
MASKS = st.one_of(st.sampled_from([0, 0xFFFF]), st.integers(0, 0xFFFF))
ENTRIES = st.builds(Entry, st.integers(0, 2**32 - 1), MASKS, MASKS, MASKS, MASKS, st.just(0))
FLAGS = st.integers(0, 31)


@dataclass
class Layer:
    """first: the block of the first entry. stride: of a map's, which has flags, or a row's."""

    stride: int
    first: int
    entries: list[tuple[Entry, int]]
    pages: int

    @property
    def packed(self) -> memoryview:
        if self.stride == ROW_ENTRY_BYTES:
            return memoryview(b"".join(struct.pack("<IHHHH", *entry[:5]) for entry, _ in self.entries))
        packed = (
            struct.pack("<IHHHHHH16s", *e[:5], 0xABCD, flags, b"\xff" * 16) for e, flags in self.entries
        )
        return memoryview(b"".join(packed))

    def at(self, page: int) -> tuple[set[str], bool]:
        """(names of the masks that have a page, whether its block was used lately)."""
        index = page // PAGES_PER_BLOCK - self.first
        if page >= self.pages or not 0 <= index < len(self.entries):
            return set(), False
        entry, flags = self.entries[index]
        bit = 1 << page % PAGES_PER_BLOCK
        masks = {name for name in ("present", "cached", "zero", "dirty") if getattr(entry, name) & bit}
        return masks, self.stride == MAP_ENTRY_BYTES and bool(flags & REFERENCED)


@st.composite
def layers(draw: st.DrawFn, begin: int, end: int) -> Layer:
    first = draw(st.integers(begin, end - 1))
    entries = draw(st.lists(st.tuples(ENTRIES, FLAGS), min_size=1, max_size=end - first))
    pages = draw(st.integers(first * PAGES_PER_BLOCK, end * PAGES_PER_BLOCK))
    return Layer(draw(st.sampled_from([ROW_ENTRY_BYTES, MAP_ENTRY_BYTES])), first, entries, pages)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[list[int], Layer | None, Layer | None]:
    """(bounds of the cells, volume, base)."""
    bounds = sorted(draw(st.sets(st.integers(3, 40), min_size=2, max_size=8)))
    volume, base = (draw(st.none() | layers(bounds[0], bounds[-1])) for _ in range(2))
    return bounds, volume, base


def counted(bounds: list[int], volume: Layer | None, base: Layer | None) -> list[Share]:
    shares = []
    for start, end in pairwise(bounds):
        sums = dict.fromkeys(Share._fields, 0)
        for page in range(start * PAGES_PER_BLOCK, end * PAGES_PER_BLOCK):
            above, used_above = volume.at(page) if volume else (set[str](), False)
            below, used_below = base.at(page) if base else (set[str](), False)
            if above:
                names = {"dirty": "dirty", "zero": "zero", "cached": "volume", "present": "elsewhere"}
                sums[next(name for mask, name in names.items() if mask in above)] += 1
                sums["over_base"] += base is not None and page < base.pages
                sums["used"] += used_above and "cached" in above
            elif "zero" in below:
                sums["base_zero"] += 1
            elif "cached" in below:
                sums["base"] += 1
                sums["used"] += used_below
        shares.append(Share(**sums))
    return shares


@given(pictures())
def test_sums_are_those_of_every_page(picture: tuple[list[int], Layer | None, Layer | None]) -> None:
    bounds, volume, base = picture
    tally = Tally(bounds, bounds[-1] - bounds[0] if volume and base else 0)
    tally.window(bounds[0])
    if volume:
        base_pages = base.pages if base else 0
        tally.add_volume(volume.packed, volume.stride, volume.first, volume.pages, base_pages)
    if base:
        tally.add_base(base.packed, base.stride, base.first, base.pages)
    assert tally.shares() == counted(bounds, volume, base)


def test_a_window_hides_nothing_of_the_next_one() -> None:
    tally = Tally([0, 2, 4], 2)
    whole = memoryview(struct.pack("<IHHHH", 1, 0xFFFF, 0xFFFF, 0, 0) * 2)
    tally.window(0)
    tally.add_volume(whole, ROW_ENTRY_BYTES, 0, 64, 64)
    tally.add_base(whole, ROW_ENTRY_BYTES, 0, 64)
    tally.window(2)
    tally.add_base(whole, ROW_ENTRY_BYTES, 2, 64)
    assert tally.shares() == [Share(volume=32, over_base=32), Share(base=32)]
