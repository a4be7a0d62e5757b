"""Checksums behind the writes. What is written goes to its slot unseen, so its sums are made later, out of
the slot, of blocks that nobody has written to for a while (core/sums.c has how that is known). From then on a
bit that flips in a page that nobody else has is found by `tierblk cache verify`, and named.

It costs one read of the SSD for a block that has come to rest, and gives way: beside other requests it takes
little at once."""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tierblk.core import BLOCK_BYTES, Layer
from tierblk.outlast import to_the_end

_FIND_MAP_PAGES = 64  # 8192 blocks at a time: far below a millisecond
_BATCH_BLOCKS = 16
_PAUSE = 4  # times as long as a batch took: a disk that others keep busy is asked for little
_FAILED_SHOWN = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settled:
    """blocks: have their sums now. ended: the pass is over; what it met the next one may take."""

    blocks: int
    ended: bool


class Settler:
    """Passes over all volumes, a turn at a time, on the event loop.

    layers: all that are open, asked for at each turn. lock: while it is held none of them is emptied, and the
    engine is not closed; may_go_on: asked with the lock.
    """

    def __init__(
        self, layers: Callable[[], Iterable[Layer]], lock: asyncio.Lock, may_go_on: Callable[[], bool]
    ) -> None:
        self._layers = layers
        self._lock = lock
        self._may_go_on = may_go_on
        self._left: list[tuple[Layer, int]] = []  # of this pass: where to go on
        self._failed = 0

    async def run(self, every_s: float) -> None:
        """Turn after turn for ever: a pass begins so long after the last one began, which is how long a block
        has to rest, and takes a share of the disk's time."""
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            while self.lacking:
                turn_s = loop.time()
                if (await self.turn(_BATCH_BLOCKS)).ended:
                    break
                await asyncio.sleep(_PAUSE * (loop.time() - turn_s))
            await asyncio.sleep(max(0.0, began_s + every_s - loop.time()))

    @property
    def lacking(self) -> bool:
        """Whether there is anything to do."""
        return any(layer.unsummed_blocks() for layer in self._layers())

    async def turn(self, most_blocks: int) -> Settled:
        """Goes on with the pass, or begins one, until so many blocks have been read. Cancelled, it ends its
        reads first."""
        if not self._left:
            self._left = [(layer, 0) for layer in self._layers() if layer.unsummed_blocks()]
        done = 0
        while self._left and done < most_blocks:
            async with self._lock:
                if not self._may_go_on():
                    self._left = []
                    break
                done += await self._step(min(_BATCH_BLOCKS, most_blocks - done))
            await asyncio.sleep(0)
        return Settled(done, ended=not self._left)

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
                try:
                    layer.make_sums(block, view)
                except OSError as error:
                    self._failed += 1
                    if self._failed <= _FAILED_SHOWN:
                        what = f"block {block} of layer {layer.layer_id}, which nobody else has,"
                        log.error("%s has no checksum: %s", what, error.strerror)
