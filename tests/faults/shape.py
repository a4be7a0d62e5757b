"""One link for all connections: bytes are let out at a rate."""

from __future__ import annotations

import asyncio

CREDIT_S = 0.005  # what may be caught up after a timer that fired late
PIECE_S = 0.001


class Link:
    """bytes_per_s None: no limit. Who asks first goes first, piece by piece, so that all get the same."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    @property
    def piece_bytes(self) -> int:
        """How much to send at once."""
        if self.bytes_per_s is None:
            return 256 * 1024
        return int(min(max(self.bytes_per_s * PIECE_S, 1024), 256 * 1024))

    async def pass_through(self, count: int) -> None:
        """Returns when so many bytes may go out."""
        if self.bytes_per_s is None:
            return
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(self._free_at_s, now_s - CREDIT_S) + count / self.bytes_per_s
        if self._free_at_s > now_s:
            await asyncio.sleep(self._free_at_s - now_s)
