"""Bytes of a device that a cache directory has, read beside whoever serves it: nothing is fetched."""

from __future__ import annotations

import mmap

from tierblk.cache.layers import LayerRecord
from tierblk.cache.view import View
from tierblk.core import PAGE_BYTES, PAGES_PER_BLOCK

_TRIES = 4


class CachedBytes:
    """What a volume over a base, or one of them, reads as. Methods block."""

    def __init__(self, view: View, volume: LayerRecord | None, base: LayerRecord | None) -> None:
        top = volume or base
        self.size_bytes = top.size_bytes if top else 0
        self._view = view
        self._volume = view.layer(volume) if volume else None
        self._base = view.layer(base) if base else None
        if volume is None:
            self._base_bytes = self.size_bytes
        else:
            self._base_bytes = volume.base_size_bytes if volume.base else 0

    def read(self, offset: int, length: int) -> bytes | None:
        """Those bytes, fewer behind the device's end; None when not all of them are here. CacheError."""
        end = min(offset + length, self.size_bytes)
        pages = []
        for page in range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)):
            data = self._page(page)
            if data is None:
                return None
            pages.append(data)
        skipped = offset % PAGE_BYTES
        return b"".join(pages)[skipped : skipped + max(0, end - offset)]

    def _page(self, page: int) -> bytes | None:
        """A daemon may give the slot to another block while it is read: then it is read again."""
        for _ in range(_TRIES):
            slot = self._slot(page)
            if slot is None or slot == 0:
                return None if slot is None else bytes(PAGE_BYTES)
            with mmap.mmap(-1, PAGE_BYTES) as buffer:
                self._view.read_slot(slot, page % PAGES_PER_BLOCK, buffer)
                data = buffer[:]
            if self._slot(page) == slot:
                return data
        return None

    def _slot(self, page: int) -> int | None:
        """Where it is; 0: it reads as zeros; None: it is not here."""
        block, bit = page // PAGES_PER_BLOCK, 1 << page % PAGES_PER_BLOCK
        if self._volume is not None:
            entry = self._volume.entry(block)
            if entry.zero & bit:
                return 0
            if entry.cached & bit:
                return entry.slot
            if (entry.present | entry.dirty) & bit:
                return None
        if page * PAGE_BYTES >= self._base_bytes:
            return 0
        if self._base is None:
            return None
        entry = self._base.entry(block)
        return 0 if entry.zero & bit else entry.slot if entry.cached & bit else None
