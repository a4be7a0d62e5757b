"""Raw images: which sizes are disks, and where a block lies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.errors import RemoteRefused
from tierblk.extent import BLOCK_BYTES, Extent
from tierblk.remote import Identity, Progress, RawImage


class Sized:
    """A source of which only the size matters."""

    def __init__(self, size_bytes: int) -> None:
        self.identity = Identity("http://host/disk.raw", size_bytes, 'etag:"x"')

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass


@given(st.integers(1, 1 << 40))
def test_blocks_cover_the_disk(sectors: int) -> None:
    image = RawImage(Sized(sectors * 512))
    assert image.size_bytes == sectors * 512
    assert image.identity.size_bytes == image.size_bytes
    last = image.extent(image.blocks - 1)
    assert image.extent(0).offset == 0
    assert last.offset == (image.blocks - 1) * BLOCK_BYTES
    assert last.end == image.size_bytes
    assert 0 < last.length <= BLOCK_BYTES


@pytest.mark.parametrize("size_bytes", [(1 << 60) + 512, (1 << 64) - 512, 10**19 // 512 * 512])
def test_a_size_that_no_disk_has(size_bytes: int) -> None:
    with pytest.raises(RemoteRefused, match="no block device is that large"):
        RawImage(Sized(size_bytes))


def test_blocks_outside() -> None:
    image = RawImage(Sized(BLOCK_BYTES + 512))
    assert image.extent(0) == Extent(0, BLOCK_BYTES)
    assert image.extent(1) == Extent(BLOCK_BYTES, 512)
    for block in (-1, 2):
        with pytest.raises(ValueError, match=f"block {block} is not one of 2"):
            image.extent(block)


def test_sizes_that_are_no_disk() -> None:
    with pytest.raises(RemoteRefused, match=r"http://host/disk\.raw is empty \(0 bytes\)"):
        RawImage(Sized(0))
    with pytest.raises(RemoteRefused, match="has 1000 bytes, which is no multiple of 512") as caught:
        RawImage(Sized(1000))
    assert caught.value.hint == "if it is one that was cut short, pad it: truncate -s 1024 FILE"
