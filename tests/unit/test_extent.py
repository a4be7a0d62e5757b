"""Half-open extents, judged by sets of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.extent import BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK, Extent, block_count, block_extent

small = st.builds(Extent, st.integers(0, 60), st.integers(0, 60))
large = st.builds(Extent, st.integers(0, 2**50), st.integers(0, 2**22))


def members(extent: Extent) -> set[int]:
    return set(range(extent.offset, extent.end))


def test_the_sizes_fit_together() -> None:
    assert PAGES_PER_BLOCK * PAGE_BYTES == BLOCK_BYTES


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
def test_nothing_negative(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="negative"):
        Extent(offset, length)


@given(small, small)
def test_overlap_is_the_set_of_common_bytes(a: Extent, b: Extent) -> None:
    assert members(a.overlap(b)) == members(a) & members(b)
    assert a.touches(b) == b.touches(a) == bool(members(a) & members(b))


@given(small, st.integers(0, 80))
def test_clamp_keeps_what_lies_below(a: Extent, size_bytes: int) -> None:
    assert members(a.clamp(size_bytes)) == {n for n in members(a) if n < size_bytes}


@given(small, st.integers(1, 20))
def test_split_is_the_same_bytes_cut_at_multiples(a: Extent, unit_bytes: int) -> None:
    pieces = a.split(unit_bytes)
    assert all(pieces)
    assert [n for piece in pieces for n in range(piece.offset, piece.end)] == sorted(members(a))
    assert all(piece.offset % unit_bytes == 0 for piece in pieces[1:])
    assert all(piece.end % unit_bytes == 0 for piece in pieces[:-1])


@given(large)
def test_blocks_and_pages_are_those_that_are_touched(a: Extent) -> None:
    for numbers, unit_bytes in ((a.blocks(), BLOCK_BYTES), (a.pages(), PAGE_BYTES)):
        assert all(Extent(n * unit_bytes, unit_bytes).touches(a) for n in (numbers[:1] or [])) or not a
        assert sum(Extent(n * unit_bytes, unit_bytes).overlap(a).length for n in numbers) == a.length


@given(st.integers(0, 10 * BLOCK_BYTES))
def test_the_blocks_of_a_size_cover_it(size_bytes: int) -> None:
    blocks = [block_extent(n, size_bytes) for n in range(block_count(size_bytes))]
    assert sum(block.length for block in blocks) == size_bytes
    assert all(blocks)
    assert not block_extent(block_count(size_bytes), size_bytes)
