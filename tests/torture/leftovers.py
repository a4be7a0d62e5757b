"""What a stopped cache directory holds, read as docs/formats.md says and compared with the image."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from tests.torture.image import open_image
from tierblk.core import crc32c

PAGE_BYTES = 4096
BLOCK_BYTES = 65536
BLOCK_PAGES = 16
ROW_BLOCKS = 64
ENTRY = struct.Struct("<IHHHH")
KEY = struct.Struct(">IQ")
MAP_HEADER_BYTES = 4096
MAP_ENTRY_BYTES = 32


@dataclass(frozen=True)
class Entry:
    """A block that is cached, or known to be zeros, in part or as a whole: masks, page 0 lowest."""

    block: int
    slot: int
    cached: int
    zero: int


@dataclass
class Leftovers:
    """What was found: pages in slots, pages known as zeros, and a sentence for each thing that is wrong."""

    cached_pages: int = 0
    zero_pages: int = 0
    wrong: list[str] = field(default_factory=list)


def check_directory(cache_dir: Path, image: Path) -> Leftovers:
    """Compares every page that the index names, and its checksum; one image is in the cache, no daemon is."""
    found = Leftovers()
    wanted = open_image(image)
    sums = (cache_dir / "sums").read_bytes()
    slots = os.open(cache_dir / "slots", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    owners: dict[int, int] = {}
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        for entry in index_entries(cache_dir):
            if entry.slot:
                os.preadv(slots, [buffer], entry.slot * BLOCK_BYTES)
                if entry.slot in owners:
                    found.wrong.append(
                        f"slot {entry.slot} is of blocks {owners[entry.slot]} and {entry.block} (I4)"
                    )
                owners[entry.slot] = entry.block
            _check_entry(found, entry, buffer[:], wanted, sums)
    os.close(slots)
    return found


def _check_entry(found: Leftovers, entry: Entry, kept: bytes, wanted: mmap.mmap, sums: bytes) -> None:
    if entry.cached & entry.zero or (entry.cached and not entry.slot):
        found.wrong.append(f"masks of block {entry.block} contradict each other: {entry}")
    for page in range(BLOCK_PAGES):
        at = entry.block * BLOCK_BYTES + page * PAGE_BYTES
        # The last page of an image may be short; zeros follow.
        right = wanted[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
        if entry.cached >> page & 1:
            found.cached_pages += 1
            got = kept[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            (stored,) = struct.unpack_from("<I", sums, (entry.slot * BLOCK_PAGES + page) * 4)
            if got != right:
                found.wrong.append(f"page {page} of block {entry.block} is wrong in slot {entry.slot}")
            elif stored != crc32c(got):
                found.wrong.append(
                    f"the sum of page {page} of block {entry.block} is wrong, its bytes are right"
                )
        elif entry.zero >> page & 1:
            found.zero_pages += 1
            if right.strip(b"\0"):
                found.wrong.append(f"page {page} of block {entry.block} is called zeros and has others")


def index_entries(cache_dir: Path) -> Iterator[Entry]:
    """What the index of a stopped cache names."""
    with (
        lmdb.open(str(cache_dir / "index"), readonly=True, max_dbs=8, lock=False) as index,
        index.begin(db=index.open_db(b"rows", create=False)) as transaction,
    ):
        for key, row in transaction.cursor():
            _, number = KEY.unpack(key)
            for position in range(ROW_BLOCKS):
                slot, _, cached, zero, _ = ENTRY.unpack_from(row, position * ENTRY.size)
                if cached or zero:
                    yield Entry(number * ROW_BLOCKS + position, slot, cached, zero)


def map_pages(path: Path) -> set[int]:
    """Numbers of the pages that a block map, of a daemon that runs or was killed, calls cached or zero."""
    data = path.read_bytes()[MAP_HEADER_BYTES:]
    pages: set[int] = set()
    for block in range(len(data) // MAP_ENTRY_BYTES):
        _, _, cached, zero, _ = ENTRY.unpack_from(data, block * MAP_ENTRY_BYTES)
        mask = cached | zero
        if mask == 0xFFFF:
            pages.update(range(block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES))
        elif mask:
            pages.update(block * BLOCK_PAGES + page for page in range(BLOCK_PAGES) if mask >> page & 1)
    return pages
