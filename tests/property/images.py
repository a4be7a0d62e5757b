"""The truth: two small images of which every page is known, and none is equal to another but for zeros."""

from __future__ import annotations

import random

from tierblk.core import BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK


def make_image(seed: int, size_bytes: int, zeros: list[tuple[int, int]]) -> bytes:
    """zeros: (first page, pages) that are zero."""
    image = bytearray(random.Random(seed).randbytes(size_bytes))
    for first, count in zeros:
        image[first * PAGE_BYTES : (first + count) * PAGE_BYTES] = bytes(count * PAGE_BYTES)
    return bytes(image)


# "a" has a block of zeros, zero pages among others, and a ragged last page. "b" crosses from one row of the
# index to the next; its last block is not whole either.
IMAGES = {
    "a": make_image(
        1, 12 * BLOCK_BYTES - 5 * 512, [(3 * PAGES_PER_BLOCK, PAGES_PER_BLOCK), (5 * PAGES_PER_BLOCK + 2, 9)]
    ),
    "b": make_image(2, 67 * BLOCK_BYTES + 2 * PAGE_BYTES + 3 * 512, [(65 * PAGES_PER_BLOCK, 1)]),
}
# The blocks that traces touch: few, so that they meet.
HOT = {"a": range(12), "b": range(61, 68)}


def page_count(name: str, block: int) -> int:
    """Pages of the block that the image has, at least in part."""
    left = len(IMAGES[name]) - block * BLOCK_BYTES
    return min(PAGES_PER_BLOCK, -(-left // PAGE_BYTES))


def valid_pages(name: str, block: int) -> int:
    """The same as a mask."""
    return (1 << page_count(name, block)) - 1


def page_of(name: str, block: int, page: int) -> bytes:
    """What the cache has to hold: beyond the image's end, zeros."""
    at = block * BLOCK_BYTES + page * PAGE_BYTES
    return IMAGES[name][at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")


def is_zero(name: str, block: int) -> bool:
    return not any(IMAGES[name][block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


def block_size(name: str, block: int) -> int:
    return min(BLOCK_BYTES, len(IMAGES[name]) - block * BLOCK_BYTES)


def pages_in(mask: int) -> list[int]:
    return [page for page in range(PAGES_PER_BLOCK) if mask >> page & 1]
