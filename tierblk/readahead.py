"""What to fetch for a miss beyond what was asked: pure decisions, no I/O, no clock.

Two questions. Does the miss continue a stream, so that what follows is worth fetching ahead? And if it
does not, how much of its block is worth having: all of it, as long as misses tend to come near earlier
ones (a boot, a file system's metadata), or only the pages asked for, once they are scattered (a
database's random reads)?

Readahead goes as the kernel's page cache does it: a window is fetched ahead of the reader and its first
block is marked; when the reader touches the mark, the next window is fetched, in proportion to what was
read in order so far. So while the reader is in one window the next is on its way, and nothing but the
last window is lost on a reader that went elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

PAGES_PER_BLOCK = 16

FIRST_WINDOW_BLOCKS = 2
"""128 KiB, and half of what a reader must have read in order before anything is fetched ahead of it: short
runs are common in a boot, and each costs a window that nobody reads."""

STREAMS_MAX = 32
"""How many readers in order are told apart; the one that was quiet longest is forgotten."""

_BELIEVED_BLOCKS = 32
_GAP_PAGES = 4  # a stream may skip this much and still be one: requests overtake each other
_REGION_PAGES = 64
_REGIONS_MAX = 256
_SCATTERED, _MIXED = 0.15, 0.35
_WEIGHT = 1 / 24


@dataclass(frozen=True, slots=True)
class Ahead:
    """Blocks to fetch though nobody asked for them; the first is to be marked."""

    first: int
    count: int


@dataclass(slots=True)
class _Stream:
    first_page: int
    next_page: int
    window_blocks: int = 0  # of the last readahead; 0: there was none
    ahead_block: int = 0  # behind the last block that was fetched ahead
    mark: int = -1

    def continues(self, first_page: int, stop_page: int) -> bool:
        """Whether these pages do: they begin close to its end, or in what was fetched ahead."""
        begin = self.next_page - (PAGES_PER_BLOCK if self.window_blocks else 0)
        whole = -(-self.next_page // PAGES_PER_BLOCK) * PAGES_PER_BLOCK
        end = max(whole, self.ahead_block * PAGES_PER_BLOCK) + _GAP_PAGES
        return begin <= first_page < end and stop_page >= self.next_page - PAGES_PER_BLOCK


class Streams:
    """The readers of one layer, as far as their misses and marks show them."""

    def __init__(self, blocks: int, max_window_blocks: int) -> None:
        """blocks: of the layer. max_window_blocks: what is fetched ahead at once, at most; 0: nothing is."""
        self._blocks = blocks
        self._max_window_blocks = max_window_blocks
        self._streams: OrderedDict[int, _Stream] = OrderedDict()  # by number, the quietest first
        self._marks: dict[int, int] = {}
        self._number = 0
        self._regions: OrderedDict[int, None] = OrderedDict()
        self._nearness = 1.0

    @property
    def granule_pages(self) -> int:
        """What a miss that continues no stream is rounded to: a power of two, 16 for the whole block."""
        if self._nearness < _SCATTERED:
            return 1
        return 4 if self._nearness < _MIXED else PAGES_PER_BLOCK

    def missed(self, first_page: int, stop_page: int) -> tuple[int, Ahead | None]:
        """Somebody waits for these pages, none of which is there: (what to round the request to, in pages;
        what else to fetch)."""
        number = self._find(first_page, stop_page)
        if number is None:
            self._note_nearness(first_page)
            self._begin(first_page, stop_page)
            return self.granule_pages, None
        stream = self._streams[number]
        self._streams.move_to_end(number)
        stream.next_page = max(stream.next_page, stop_page)
        whole = stream.next_page - stream.first_page > PAGES_PER_BLOCK
        return PAGES_PER_BLOCK if whole else self.granule_pages, self._ahead(number, stream)

    def read_on(self, block: int) -> Ahead | None:
        """A reader came to a block that was marked."""
        number = self._marks.pop(block, None)
        if number is None or number not in self._streams:
            return None
        stream = self._streams[number]
        self._streams.move_to_end(number)
        stream.mark = -1
        stream.next_page = max(stream.next_page, (block + 1) * PAGES_PER_BLOCK)
        return self._ahead(number, stream)

    def _find(self, first_page: int, stop_page: int) -> int | None:
        """The stream that these pages continue, of several the one heard of last. Nearly all are far away,
        and scattered reads come here at each miss: a look at two numbers rules those out."""
        low, high = first_page - PAGES_PER_BLOCK - _GAP_PAGES, first_page + PAGES_PER_BLOCK
        for number, stream in reversed(self._streams.items()):
            if stream.next_page > high or max(stream.next_page, stream.ahead_block * PAGES_PER_BLOCK) <= low:
                continue
            if stream.continues(first_page, stop_page):
                return number
        return None

    def _begin(self, first_page: int, next_page: int) -> None:
        self._number += 1
        self._streams[self._number] = _Stream(first_page, next_page)
        if len(self._streams) > STREAMS_MAX:
            _, oldest = self._streams.popitem(last=False)
            self._marks.pop(oldest.mark, None)

    def _ahead(self, number: int, stream: _Stream) -> Ahead | None:
        """The next window: behind what is fetched ahead already, if the reader has come close to its end."""
        reader = -(-stream.next_page // PAGES_PER_BLOCK)
        if stream.mark >= reader:
            return None  # it has not come to the last window yet
        read_blocks = (stream.next_page - stream.first_page) // PAGES_PER_BLOCK
        if read_blocks < 2 * FIRST_WINDOW_BLOCKS:
            return None
        first = max(reader, stream.ahead_block)
        # Half of what it has read: what a reader that stops here leaves unread is in proportion. One that has
        # come this far is believed.
        window = 2 * read_blocks if read_blocks >= _BELIEVED_BLOCKS else read_blocks // 2
        window = min(window, self._max_window_blocks, self._blocks - first)
        if window <= 0:
            return None
        self._marks.pop(stream.mark, None)
        stream.window_blocks = window
        stream.ahead_block = first + window
        stream.mark = first
        self._marks[first] = number
        return Ahead(first, window)

    def _note_nearness(self, page: int) -> None:
        region = page // _REGION_PAGES
        near = region in self._regions or region - 1 in self._regions or region + 1 in self._regions
        self._nearness += (near - self._nearness) * _WEIGHT
        self._regions[region] = None
        self._regions.move_to_end(region)
        if len(self._regions) > _REGIONS_MAX:
            self._regions.popitem(last=False)


def round_out(want: int, missing: int, granule_pages: int) -> tuple[int, int]:
    """Pages [first, stop) of a block to fetch for the mask `want`, all of which is in the mask `missing`.

    From the first page wanted to the last, and on both sides up to a multiple of granule_pages, as far as
    every page is missing: nothing that is cached is fetched again. What is wanted behind a cached page is
    left out; whoever waits for it asks again.
    """
    first = (want & -want).bit_length() - 1
    stop = want.bit_length()
    holes = ~(missing >> first)
    stop = min(stop, first + (holes & -holes).bit_length() - 1)
    low = first // granule_pages * granule_pages
    high = -(-stop // granule_pages) * granule_pages
    while first > low and missing >> (first - 1) & 1:
        first -= 1
    while stop < high and missing >> stop & 1:
        stop += 1
    return first, stop
