"""Checksums behind the writes. What is written goes to its slot unseen, so its sums are made later, out of
the slot, of blocks that nobody has written to for a while (core/sums.c has how that is known). From then on a
bit that flips in a page that nobody else has is found by `tierblk cache verify`, and named.

It costs one read of the SSD for a block that has come to rest, and gives way: beside other requests it takes
little at once."""

from __future__ import annotations

import asyncio
import logging
import mmap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tierblk.core import BLOCK_BYTES, Layer
from tierblk.outlast import to_the_end

_FIND_MAP_PAGES = 64  # 8192 blocks at a time: far below a millisecond
_BATCH_BLOCKS = 16
_PAUSE = 4  # times as long as a batch took: a disk that others keep busy is asked for little
_TRY_AGAIN_S = 3600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settled:
    """blocks: were looked at. ended: the pass is over; what it met the next one may take. busy_s: how long
    the disk was asked."""

    blocks: int
    ended: bool
    busy_s: float


class Settler:
    """Passes over all volumes, a turn at a time, on the event loop.

    layers: all that are open, asked for at each turn. lock: while it is held none of them is emptied, nobody
    else looks for blocks, and the engine is not closed; may_go_on: false when it is.
    """

    def __init__(
        self, layers: Callable[[], Iterable[Layer]], lock: asyncio.Lock, may_go_on: Callable[[], bool]
    ) -> None:
        self._layers = layers
        self._lock = lock
        self._may_go_on = may_go_on
        self._left: list[tuple[Layer, int]] = []  # of this pass: where to go on
        self._unreadable: dict[tuple[int, int], float] = {}  # by layer and block: until when

    async def run(self, every_s: float) -> None:
        """Pass after pass for ever, so long one behind the other, which is how long a block has to rest at
        least; each takes a share of the disk's time."""
        while True:
            while self.lacking:
                turn = await self.turn(_BATCH_BLOCKS)
                if turn.ended:
                    break
                await asyncio.sleep(_PAUSE * turn.busy_s)
            self._left = []
            await asyncio.sleep(every_s)

    @property
    def lacking(self) -> bool:
        """Whether there is anything to do."""
        return self._may_go_on() and any(layer.unsummed_blocks() for layer in self._layers())

    async def turn(self, most_blocks: int) -> Settled:
        """Goes on with the pass, or begins one, until so many blocks have been read. Cancelled, it ends its
        reads first."""
        blocks, busy_s = 0, 0.0
        async with self._lock:
            if self.lacking and not self._left:
                self._left = [(layer, 0) for layer in self._layers() if layer.unsummed_blocks()]
        while blocks < most_blocks:
            async with self._lock:
                if not self._left or not self._may_go_on():
                    self._left = []
                    break
                began_s = time.monotonic()
                found = await self._step(min(_BATCH_BLOCKS, most_blocks - blocks))
                busy_s += time.monotonic() - began_s if found else 0.0
                blocks += found
            await asyncio.sleep(0)
        return Settled(blocks, not self._left, busy_s)

    async def _step(self, most_blocks: int) -> int:
        layer, block = self._left.pop()
        blocks, left = layer.find_unsummed(block, _FIND_MAP_PAGES, most_blocks)
        if left is not None:
            self._left.append((layer, left))
        if blocks:
            await to_the_end(asyncio.to_thread(self._make, layer, blocks))
        return len(blocks)

    def _make(self, layer: Layer, blocks: list[int]) -> None:
        with mmap.mmap(-1, BLOCK_BYTES) as memory, memoryview(memory) as view:
            for block in blocks:
                key = layer.layer_id, block
                if self._unreadable.get(key, 0.0) > time.monotonic():
                    continue
                try:
                    layer.make_sums(block, view)
                except OSError as error:
                    what = f"block {block} of layer {layer.layer_id} has no checksum, and nobody else has it"
                    log.error("%s: it cannot be read: %s", what, error.strerror)
                    self._unreadable[key] = time.monotonic() + _TRY_AGAIN_S
