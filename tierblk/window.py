"""Windows: what one GET brings. Planning them is pure; a Window also has the state of its fetch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tierblk.core import PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.layer import Filled
from tierblk.readahead import Ahead, Streams, round_out
from tierblk.remote import Priority, Ticket


@dataclass(frozen=True, slots=True)
class Need:
    """A MISS: masks of the pages wanted and of all that are missing. ahead: nobody waits for it."""

    block: int
    token: int
    want: int
    missing: int
    ahead: bool


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring pages [first_page, stop_page) of a layer, and the token of each block that they touch.
    size_bytes: of the image, whose last page may be cut."""

    first_page: int
    stop_page: int
    tokens: tuple[int, ...]
    size_bytes: int
    ahead: bool


class Window:
    """Pages that one fetch brings. `unfilled` are blocks that are not complete yet; `waited` those that
    somebody waits for, as far as the engine has told."""

    def __init__(self, base: Filled, span: Span) -> None:
        self.base = base
        self.first_page, self.stop_page = span.first_page, span.stop_page
        self.tokens = span.tokens
        self.blocks = range(span.first_page // PAGES_PER_BLOCK, (span.stop_page - 1) // PAGES_PER_BLOCK + 1)
        self.start_bytes = span.first_page * PAGE_BYTES
        self.length_bytes = min(span.stop_page * PAGE_BYTES, span.size_bytes) - self.start_bytes
        self.ticket = Ticket(Priority.READAHEAD if span.ahead else Priority.DEMAND)
        self.unfilled = set(self.blocks)
        self.waited = set() if span.ahead else set(self.blocks)
        self.failed: set[int] = set()
        self.first_place: int | None = None
        self.kept_places: list[int] = []  # of blocks that ended while the fetch may still write there
        self.passed_pages = 0
        self.fetching = True
        self.task: asyncio.Task[None] | None = None
        self.given_up = False  # the task was cancelled because nobody waited
        self._size_bytes = span.size_bytes

    @property
    def is_ahead(self) -> bool:
        """Whether nobody waits for it (yet)."""
        return self.ticket.priority is Priority.READAHEAD

    def split(self, count: int) -> Window:
        """Keeps its first `count` blocks; the window of the others. While it has no place."""
        rest = Window(
            self.base,
            Span(
                (self.blocks.start + count) * PAGES_PER_BLOCK,
                self.stop_page,
                self.tokens[count:],
                self._size_bytes,
                self.is_ahead,
            ),
        )
        rest.waited &= self.waited
        self.stop_page, self.length_bytes = rest.first_page, rest.start_bytes - self.start_bytes
        self.tokens, self.blocks = self.tokens[:count], self.blocks[:count]
        self.unfilled, self.waited = set(self.blocks), self.waited & set(self.blocks)
        return rest

    def may_lend_again(self, block: int) -> bool:
        """Whether the network is done with a block's place: its bytes are complete, or the fetch has ended
        (R5)."""
        return not self.fetching or (block not in self.unfilled and block not in self.failed)


def plan(
    needs: Sequence[Need], streams: Streams, max_blocks: int, size_bytes: int
) -> tuple[list[Span], list[Ahead]]:
    """The GETs for a batch of misses of one layer, and what else to fetch.

    Blocks that lie together, and of which nothing between is cached, become one GET of at most max_blocks."""
    ordered = sorted(needs, key=lambda need: need.block)
    granules, ahead = _ask(ordered, streams)
    spans: list[Span] = []
    for need in ordered:
        granule = PAGES_PER_BLOCK if need.ahead else granules[need.block]
        low, high = round_out(need.want, need.missing, granule)
        first, stop = need.block * PAGES_PER_BLOCK + low, need.block * PAGES_PER_BLOCK + high
        last = spans[-1] if spans else None
        joins = (
            last is not None
            and last.stop_page == first
            and first % PAGES_PER_BLOCK == 0
            and last.ahead == need.ahead
            and len(last.tokens) < max_blocks
        )
        if last is not None and joins:
            spans[-1] = Span(last.first_page, stop, (*last.tokens, need.token), size_bytes, need.ahead)
        else:
            spans.append(Span(first, stop, (need.token,), size_bytes, need.ahead))
    return spans, ahead


def _ask(ordered: Sequence[Need], streams: Streams) -> tuple[dict[int, int], list[Ahead]]:
    """What the readers' habits say: for each block that is waited for the granule of its request, and what to
    fetch ahead. Neighbouring blocks are one read."""
    granules: dict[int, int] = {}
    ahead: list[Ahead] = []
    waited = [need for need in ordered if not need.ahead]
    begin = 0
    for i, need in enumerate(waited):
        if i + 1 < len(waited) and waited[i + 1].block == need.block + 1:
            continue
        run, begin = waited[begin : i + 1], i + 1
        first = run[0].block * PAGES_PER_BLOCK + (run[0].want & -run[0].want).bit_length() - 1
        stop = need.block * PAGES_PER_BLOCK + need.want.bit_length()
        granule, more = streams.missed(first, stop)
        granules.update((each.block, granule) for each in run)
        if more is not None:
            ahead.append(more)
    return granules, ahead
