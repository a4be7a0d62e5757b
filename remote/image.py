"""Images: how the blocks of a base layer lie in a source."""

from __future__ import annotations

from tierblk.errors import RemoteRefused
from tierblk.extent import SECTOR_BYTES, Extent, block_count, block_extent
from tierblk.remote.source import Identity, Source

SIZE_BYTES_MAX = 1 << 60  # the kernel counts a device's bytes in 63 bits; no image comes near


class RawImage:
    """A raw image: byte n of the disk is byte n of the source."""

    def __init__(self, source: Source) -> None:
        """RemoteRefused when the source's size cannot be that of a disk."""
        url, size_bytes = source.identity.shown, source.identity.size_bytes
        if size_bytes == 0:
            raise RemoteRefused(f"{url} is empty (0 bytes)", "an image has at least one sector of 512 bytes")
        if size_bytes > SIZE_BYTES_MAX:
            raise RemoteRefused(f"{url} claims to have {size_bytes} bytes: no block device is that large")
        if size_bytes % SECTOR_BYTES:
            padded_bytes = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
            raise RemoteRefused(
                f"{url} has {size_bytes} bytes, which is no multiple of {SECTOR_BYTES}: no raw disk image",
                f"if it is one that was cut short, pad it: truncate -s {padded_bytes} FILE",
            )
        self.source = source

    @property
    def identity(self) -> Identity:
        """What the layer is keyed by."""
        return self.source.identity

    @property
    def size_bytes(self) -> int:
        """Size of the disk, a multiple of 512."""
        return self.source.identity.size_bytes

    @property
    def blocks(self) -> int:
        """How many blocks of 64 KiB it has, the short last one included."""
        return block_count(self.size_bytes)

    def extent(self, block: int) -> Extent:
        """Where a block lies in the source; the last one may be short. ValueError: there is no such block."""
        if not 0 <= block < self.blocks:
            raise ValueError(f"block {block} is not one of {self.blocks}")
        return block_extent(block, self.size_bytes)
