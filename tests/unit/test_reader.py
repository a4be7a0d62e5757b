"""Which pieces of a device an export reads."""

from __future__ import annotations

import os
import tempfile

import pytest

from tierblk.cache import LayerRecord, LayerView
from tierblk.core import BLOCK_BYTES, MAP_HEADER_BYTES, map_bytes
from tierblk.reader import WINDOW_BYTES, windows
from tierblk.units import MIB

SIZE_BYTES = (1 << 44) + 5 * BLOCK_BYTES + 512
LAST = SIZE_BYTES // WINDOW_BYTES * WINDOW_BYTES


@pytest.mark.parametrize(
    ("known", "base_bytes", "wanted"),
    [
        ([], 0, []),
        ([], 1, [0]),
        ([], WINDOW_BYTES + 1, [0, WINDOW_BYTES]),
        ([0, LAST + BLOCK_BYTES], 0, [0, LAST]),
        ([9 * MIB, 1 << 40], 10 * MIB, [0, 8 * MIB, 1 << 40]),
        ([100 * MIB], WINDOW_BYTES, [0, 96 * MIB]),
    ],
)
def test_what_a_block_map_knows_nothing_of_is_passed_over(
    known: list[int], base_bytes: int, wanted: list[int]
) -> None:
    """A page of a map is 128 blocks: as much as a window."""
    record = LayerRecord(1, "local", "", SIZE_BYTES, "", 0, name="v")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(map_bytes(SIZE_BYTES))
        for at in known:
            os.pwrite(file.fileno(), b"\1" * 32, MAP_HEADER_BYTES + at // BLOCK_BYTES * 32)
        view = LayerView(record, file.fileno(), None, None)
        found = list(windows(SIZE_BYTES, view, base_bytes))
    assert [offset for offset, _ in found] == wanted
    assert all(length == min(WINDOW_BYTES, SIZE_BYTES - offset) for offset, length in found)


def test_a_device_without_a_volume_is_read_as_a_whole() -> None:
    assert list(windows(WINDOW_BYTES + 1, None, 0)) == [(0, WINDOW_BYTES), (WINDOW_BYTES, 1)]
