"""What clients of the control interface may do to the cache of a running daemon; see tending.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tierblk import tending
from tierblk.cache import Cache
from tierblk.extent import Extent
from tierblk.tending import Document


class Care:
    """Of one cache. All of it belongs to the event loop."""

    def __init__(
        self, cache: Cache, in_use: Collection[int], needed: Callable[[], list[tuple[str, int, str]]]
    ) -> None:
        """in_use: ids of the layers that are open at any moment. needed: images of devices that nobody serves
        yet, or that are being opened."""
        self._cache = cache
        self._in_use = in_use
        self._needed = needed

    async def evict(self, layer_id: int, ranges: Sequence[Extent]) -> Document:
        """See tending.evict."""
        return await tending.evict(self._cache, layer_id, ranges)

    async def pin(self, layer_id: int, ranges: Sequence[Extent], *, pinned: bool) -> Document:
        """See tending.pin."""
        return await tending.pin(self._cache, layer_id, ranges, pinned=pinned)

    def drop(self, layer_id: int, pages: Sequence[tuple[int, int]]) -> Document:
        """See tending.drop."""
        return tending.drop(self._cache, layer_id, pages)

    async def collect(self, *, older_s: float, dry_run: bool) -> Document:
        """See tending.collect."""
        return await tending.collect(
            self._cache, older_s=older_s, dry_run=dry_run, in_use=self._in_use, needed=self._needed
        )
