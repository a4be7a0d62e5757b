"""What was fetched when, held against what the block map already had: nothing is fetched twice."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.control import Control
from tests.torture.leftovers import BLOCK_PAGES, PAGE_BYTES, map_pages

SHOWN_MAX = 5


class Memory:
    """For each page since when it has been in the block map, and what the server was asked for.

    Holds for a cache into which the image fits (no eviction) and a daemon that sends no second requests.
    """

    def __init__(self, control: Control, maps_dir: Path) -> None:
        """maps_dir: of this cache; a daemon that another test killed may have left maps elsewhere."""
        self._control = control
        self._maps_dir = maps_dir
        self._since_s: dict[int, float] = {}
        self._lost: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._next = 0
        self.between = 0  # cached pages that were fetched with their neighbours

    def remember(self) -> bool:
        """Looks at the map and at the server's log; whether the server was in the middle of an answer."""
        pages: set[int] = set()
        for path in self._maps_dir.glob("*.map"):
            pages |= map_pages(path)
        now_s = time.monotonic()
        lost = self._since_s.keys() - pages
        if pages and lost:
            self._lost.append(
                f"{len(lost)} pages were in the map and are not any more, page {min(lost)} first"
            )
        for page in pages:
            self._since_s.setdefault(page, now_s)
        return self._read_log()

    def verdict(self) -> list[str]:
        """A sentence for each request for pages that were in the map when it came.

        Not for cached pages between missing ones of their block: those are fetched with them, on purpose.
        """
        self._read_log()
        wrong = list(self._lost)
        for entry in self._entries:
            again = [page for page in _pages(entry) if self._had(page, entry)]
            self.between += len(again)
            ends = [page for page in again if self._is_end(page, entry)]
            if ends:
                wrong.append(
                    f"{len(again)} pages were fetched again that were in the map, page {ends[0]} first, "
                    f"by request {entry['n']} for bytes {entry['first']} to {entry['last']}"
                )
        return wrong[:SHOWN_MAX] + ([f"and {len(wrong) - SHOWN_MAX} more"] if len(wrong) > SHOWN_MAX else [])

    def _had(self, page: int, entry: dict[str, Any]) -> bool:
        at_s: float = entry["at_s"]
        return self._since_s.get(page, at_s) < at_s

    def _is_end(self, page: int, entry: dict[str, Any]) -> bool:
        """Whether only cached pages are before it, or behind it, in what the request covers of its block."""
        pages = _pages(entry)
        block = page // BLOCK_PAGES * BLOCK_PAGES
        before = range(max(pages.start, block), page)
        after = range(page + 1, min(pages.stop, block + BLOCK_PAGES))
        return any(all(self._had(other, entry) for other in side) for side in (before, after))

    def summary(self) -> dict[str, Any]:
        """How often pages were asked for: more than once only what was under way when a daemon died."""
        times = Counter(page for entry in self._entries for page in _pages(entry))
        return {
            "requests": len(self._entries),
            "pages": len(times),
            "pages_again": sum(count - 1 for count in times.values()),
            "most_often": max(times.values(), default=0),
            "pages_again_between": self.between,
        }

    def _read_log(self) -> bool:
        """Takes over what is new; whether its last lines have requests that were not over."""
        under_way = False
        while True:
            new = self._control.ask("log", since=self._next)["log"]
            under_way = any(not entry["ended"] for entry in new)
            if not new:
                return under_way
            # One byte is a daemon's first look at the image.
            self._entries += [entry for entry in new if entry["last"] > entry["first"]]
            self._next = new[-1]["n"] + 1
            if len(new) < 1000:
                return under_way


def _pages(entry: dict[str, Any]) -> range:
    return range(entry["first"] // PAGE_BYTES, entry["last"] // PAGE_BYTES + 1)
