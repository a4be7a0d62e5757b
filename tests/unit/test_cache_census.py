"""Counting a layer, and the fast judgement of entries, against doing it one entry after the other."""

from __future__ import annotations

import os
import random
import struct
from itertools import product

import pytest

from tierblk.cache.census import Census, count
from tierblk.cache.invariants import check_masks
from tierblk.cache.layers import LayerRecord
from tierblk.cache.maps import ENTRY_BYTES
from tierblk.cache.rows import Entry, pack_entries
from tierblk.cache.verify import _is_plain
from tierblk.cache.view import LayerView, Piece
from tierblk.core import BLOCK_BYTES, MAP_HEADER_BYTES


def record(kind: str, blocks: int) -> LayerRecord:
    return LayerRecord(1, kind, "http://x", blocks * BLOCK_BYTES, "v", 0, "" if kind == "base" else "vol")


def random_entries(blocks: int) -> list[Entry]:
    dice = random.Random(blocks)
    return [
        Entry()
        if dice.random() < 0.3
        else Entry(dice.randrange(9), *(dice.randrange(1 << 16) for _ in "pczd"))
        for _ in range(blocks)
    ]


class Rows(LayerView):
    """With pieces as an index has them."""

    given: tuple[Entry, ...] = ()

    def pieces(self, first_block: int = 0, end_block: int | None = None):  # type: ignore[no-untyped-def]
        for at in range(0, len(self.given), 64):
            yield Piece(at, pack_entries(self.given[at : at + 64]), 12)


@pytest.mark.parametrize("of_map", [True, False])
def test_census(of_map: bool) -> None:
    entries = random_entries(1000)
    wanted = Census(
        sum(1 for each in entries if each.slot),
        sum(each.cached.bit_count() for each in entries),
        sum(each.zero.bit_count() for each in entries),
        sum((each.cached & each.dirty).bit_count() for each in entries),
        sum((each.zero & each.dirty).bit_count() for each in entries),
    )
    if of_map:
        fd = os.memfd_create("map")
        packed = (struct.pack("<IHHHH20s", *each[:5], os.urandom(20)) for each in entries)
        os.pwrite(fd, b"".join(packed).ljust(1000 * ENTRY_BYTES, b"\0"), MAP_HEADER_BYTES)
        found = count(LayerView(record("local", 1000), fd, None, None))
        os.close(fd)
    else:
        layer = Rows(record("local", 1000), None, None, None)
        layer.given = tuple(entries)
        found = count(layer)
    assert found == wanted


@pytest.mark.parametrize("kind", ["base", "local"])
def test_what_is_plain_has_no_contradiction(kind: str) -> None:
    """And of what has none, a cached block without zeros is plain."""
    plain = 0
    for slot, *masks in product((0, 5), (0, 1, 3), (0, 1, 3), (0, 2), (0, 1, 2)):
        entry = Entry(slot, *masks)
        wrong = list(check_masks(record(kind, 4), 1, entry))
        is_plain = _is_plain(entry, is_volume=kind != "base")
        plain += is_plain
        assert is_plain == (not wrong and entry.cached != 0 and entry.zero == 0), entry
    assert plain
