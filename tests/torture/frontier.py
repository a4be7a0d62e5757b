"""Where readers may read: more with each round, so that there is always something to fetch."""

from __future__ import annotations

import random

MIB = 1 << 20
PIECE_BYTES = MIB
SECTOR_BYTES = 512


class Frontier:
    """The pieces of an image in an order that follows from the seed; `advance` shows the next few of them."""

    def __init__(self, size_bytes: int, rounds: int, seed: int) -> None:
        self._pieces = list(range(size_bytes // PIECE_BYTES))
        random.Random(f"frontier {seed}").shuffle(self._pieces)
        self._each = max(1, len(self._pieces) // (rounds + 1))
        self._shown = self._each

    def advance(self) -> None:
        """The next pieces may be read."""
        self._shown = min(self._shown + self._each, len(self._pieces))

    def choose(self, chance: random.Random, grain: int) -> tuple[int, int]:
        """(offset, length) in bytes, within one piece; every second one in the newest."""
        shown = self._shown
        first = max(0, shown - self._each) if chance.random() < 0.5 else 0
        piece = self._pieces[chance.randrange(first, shown)]
        length = min(int(SECTOR_BYTES * 2048 ** chance.random()) // grain * grain, PIECE_BYTES)
        return piece * PIECE_BYTES + chance.randrange((PIECE_BYTES - length) // grain + 1) * grain, length
