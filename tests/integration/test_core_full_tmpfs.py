"""A full tmpfs under the block map: an error of the request that needs room, and of no other."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_rig import Rig
from tierblk.core import BLOCK_BYTES


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with room for two pages."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", mount], check=True, timeout=10)
    yield mount
    subprocess.run(["umount", mount], check=True, timeout=10)


def test_no_room_for_a_map_page_is_enospc_and_no_signal(tmp_path: Path, small_tmpfs: Path) -> None:
    image = random.Random(1).randbytes(4096) + bytes(600 * BLOCK_BYTES)
    rig = Rig(tmp_path, image, 8, map_directory=small_tmpfs)
    reads = [rig.read(block * BLOCK_BYTES, 512) for block in (0, 130, 260, 390, 520)]
    rig.until(lambda: len(rig.asked) + sum(read.done() for read in reads) == len(reads))
    rig.finish(*reads)
    failed = [read for read in reads if read.exception(10) is not None]
    assert failed
    assert len(failed) < len(reads)
    for read in failed:
        with pytest.raises(OSError, match="No space left"):
            read.result()
    again = [block for block, read in zip((0, 130, 260, 390, 520), reads, strict=True) if read not in failed]
    for block in again:  # what had its page goes on
        assert rig.read(block * BLOCK_BYTES, 512).result(10) == rig.expect(block * BLOCK_BYTES, 512)
    rig.close()
