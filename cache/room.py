"""How much room a transaction of the index needs in its file, reckoned before it begins, and the file made
that long: a full disk is met there, and not in the middle of a commit. Pages are LMDB's, of 4096 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

from tierblk.cache.layers import VolumeChange

# The file grows to what a transaction may need at most and a reserve, in whole steps. What it did not need is
# given back afterwards.
GROW_BYTES = 1 << 20
RESERVE_BYTES = 512 << 10
_OTHER_PAGES = 16

_KEY_BYTES_MAX = 64
_VALUE_BYTES_MAX = 32 << 10
_VALUE_PAGES = 9  # that the longest value has
_VALUE_IN_LEAF_BYTES = 1950  # a longer one may have pages of its own, beside the leaf that names it
_PAGE_BYTES, _PAGE_HEAD_BYTES = 4096, 16


class Tree(TypedDict):
    """What LMDB says of a database."""

    psize: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int


class VolumesLoad(NamedTuple):
    """What changes of volumes need room for: how many extents they write or delete, and how many pages there
    are more for new values."""

    extents: int = 0
    new_pages: int = 0


def load_of(changes: Iterable[VolumeChange], extents: Tree | None) -> VolumesLoad:
    """How much they write at most. extents: that database, in which a layer that begins anew may have all
    there is. ValueError: a key or value is longer than it may be."""
    touched = new_pages = 0
    for change in changes:
        touched += len(change.extents) + (extents["entries"] if change.anew and extents else 0)
        # In the tree of states: a path, and a leaf beside it.
        new_pages += 5 + _pages_of(change.state)
        for key, value in change.extents:
            if not 0 < len(key) <= _KEY_BYTES_MAX:
                raise ValueError(f"the key of an extent has {len(key)} bytes, not 1 to {_KEY_BYTES_MAX}")
            new_pages += 1 + _pages_of(value) if value else 0
    # Where leaves are split, so are some branches: one in 26, if all are half full of the longest keys.
    return VolumesLoad(touched, new_pages + new_pages // 16)


def _pages_of(value: bytes) -> int:
    """Pages of its own that a value needs. ValueError: it is too long."""
    if len(value) > _VALUE_BYTES_MAX:
        raise ValueError(f"a value has {len(value)} bytes, and at most {_VALUE_BYTES_MAX} are kept")
    return 0 if len(value) <= _VALUE_IN_LEAF_BYTES else -(-(len(value) + _PAGE_HEAD_BYTES) // _PAGE_BYTES)


def pages_added(rows: Tree, count: int, extents: Tree | None, load: VolumesLoad) -> int:
    """How many pages a transaction adds at most that writes or deletes so many rows, and that load."""
    # It copies the pages that it changes, each row's path from the root and a neighbour that is merged with,
    # at most all; a leaf has two new rows at least; the rest is for the other trees and the list of free
    # pages.
    pages = rows["branch_pages"] + rows["leaf_pages"]
    more = min((rows["depth"] + 1) * count, pages) + count // 2 + load.new_pages
    if extents is not None:
        of_extents = extents["branch_pages"] + extents["leaf_pages"]
        copied = min((extents["depth"] + 1) * load.extents, of_extents)
        more += copied
        pages += copied + min(_VALUE_PAGES * load.extents, extents["overflow_pages"])
    return more + (more + pages) // 128 + _OTHER_PAGES


def whole_steps(size_bytes: int) -> int:
    """As many bytes, or more, in steps of GROW_BYTES."""
    return -(-size_bytes // GROW_BYTES) * GROW_BYTES


def allocate(path: Path, size_bytes: int) -> None:
    """Makes a file that long, with room on the disk for all of it. OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)
