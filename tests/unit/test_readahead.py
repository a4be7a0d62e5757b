"""What is fetched beyond what was asked: streams, scattered reads, and how a request is rounded."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from tierblk.readahead import STREAMS_MAX, Ahead, Streams, round_out

BLOCKS = 1 << 14
MOST = 128


def read_in_order(streams: Streams, first_block: int, blocks: int) -> list[Ahead]:
    """A reader that takes block after block, and comes to the marks as it does; what was fetched ahead."""
    there: set[int] = set()
    marks: set[int] = set()
    found = []
    for block in range(first_block, first_block + blocks):
        more = None
        if block in marks:
            more = streams.read_on(block)
        elif block not in there:
            more = streams.missed(block * 16, block * 16 + 16)[1]
        if more is not None:
            assert more.first > block, "the reader is never overtaken by what is fetched ahead of it"
            there |= set(range(more.first, more.first + more.count))
            marks.add(more.first)
            found.append(more)
    return found


def test_windows_grow_with_a_stream_to_the_most_and_follow_each_other() -> None:
    found = read_in_order(Streams(BLOCKS, MOST), 100, 3000)
    counts = [more.count for more in found]
    assert counts[0] == 2  # 128 KiB
    assert counts == sorted(counts)
    assert counts[-1] == MOST
    assert all(one.first + one.count == other.first for one, other in itertools.pairwise(found))


def test_the_next_window_is_on_its_way_while_one_is_read() -> None:
    """The reader misses at the beginning only."""
    streams = Streams(BLOCKS, MOST)
    missed = []
    there: dict[int, bool] = {}
    for block in range(2000):
        if block not in there:
            missed.append(block)
            more = streams.missed(block * 16, block * 16 + 16)[1]
        elif there[block]:
            more = streams.read_on(block)
        else:
            more = None
        if more is not None:
            there.update((each, each == more.first) for each in range(more.first, more.first + more.count))
    assert len(missed) <= 5


def test_nothing_is_fetched_behind_the_end() -> None:
    found = read_in_order(Streams(300, MOST), 0, 300)
    assert max(more.first + more.count for more in found) == 300


def test_a_short_run_brings_nothing_ahead() -> None:
    assert read_in_order(Streams(BLOCKS, MOST), 50, 3) == []


def test_switched_off() -> None:
    assert read_in_order(Streams(BLOCKS, 0), 0, 500) == []


def test_several_readers_in_order_are_told_apart() -> None:
    streams = Streams(BLOCKS, MOST)
    ahead: dict[int, int] = {}
    for step in range(8):
        for reader in range(10):
            block = reader * 1000 + step
            more = streams.missed(block * 16, block * 16 + 16)[1]
            if more is not None:
                ahead[reader] = more.first
    assert sorted(ahead) == list(range(10))
    assert all(first // 1000 == reader for reader, first in ahead.items())


def test_the_quietest_reader_is_forgotten() -> None:
    streams = Streams(BLOCKS, MOST)
    read_in_order(streams, 0, 100)
    for number in range(STREAMS_MAX):
        streams.missed(4000 * 16 + number * 64 * 16, 4000 * 16 + number * 64 * 16 + 1)
    assert all(streams.read_on(block) is None for block in range(200))


def test_scattered_reads_get_what_they_ask_for_once_the_pattern_is_clear() -> None:
    streams = Streams(1 << 20, MOST)
    rng = random.Random(3)
    granules = []
    for _ in range(400):
        page = rng.randrange(1 << 24)
        granule, more = streams.missed(page, page + 1)
        assert more is None
        granules.append(granule)
    assert granules[0] == 16
    assert max(granules[100:]) <= 4


def test_reads_that_come_near_each_other_get_their_blocks() -> None:
    streams = Streams(1 << 20, MOST)
    rng = random.Random(4)
    for _ in range(400):
        page = rng.randrange(16) * 4096 + rng.randrange(64)
        assert streams.missed(page, page + 1)[0] == 16


@given(st.integers(1, 0xFFFF), st.integers(0, 0xFFFF), st.sampled_from([1, 4, 16]))
def test_rounding_brings_what_is_missing_and_nothing_that_is_there(
    want: int, other: int, granule: int
) -> None:
    missing = want | other
    first, stop = round_out(want, missing, granule)
    fetched = (1 << stop) - (1 << first)
    assert fetched & ~missing == 0
    low, high = (want & -want).bit_length() - 1, want.bit_length()
    assert fetched >> low & 1, "each time the first page wanted comes, so that asking again ends"
    assert fetched & want == want or not missing >> stop & 1, "it ends before what is wanted at a hole only"
    assert first >= low // granule * granule
    assert stop <= -(-high // granule) * granule


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 40), st.booleans()), max_size=60))
def test_whatever_is_read_what_is_fetched_ahead_lies_inside(reads: list[tuple[int, int, bool]]) -> None:
    streams = Streams(64, 16)
    for block, pages, mark in reads:
        stop = min(block * 16 + pages, 64 * 16)
        more = streams.read_on(block) if mark else streams.missed(block * 16, stop)[1]
        if more is not None:
            assert 0 <= more.first < more.first + more.count <= 64
            assert more.count <= 16
