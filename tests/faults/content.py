"""What the server serves: the bytes of one version of one object."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

_TURNED_OVER = bytes(255 - value for value in range(256))


class Content:
    """Bytes in memory, or of a file, with the strong ETag that stands for them."""

    def __init__(self, source: bytes | Path | str, etag: str | None = None) -> None:
        """etag: with its quotes; None: made of the bytes, or of a file's size and modification time. A file
        must not be empty and must keep its length while it is served. Raises OSError."""
        if isinstance(source, bytes):
            self.view = memoryview(source)
            sign = hashlib.blake2b(source, digest_size=8).hexdigest()
        else:
            with open(source, "rb") as file:
                stat = os.fstat(file.fileno())
                self.view = memoryview(mmap.mmap(file.fileno(), stat.st_size, prot=mmap.PROT_READ))
            sign = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
        self.etag = f'"{sign}"' if etag is None else etag

    @property
    def size_bytes(self) -> int:
        return len(self.view)

    def turned_over(self, first: int, count: int) -> bytes:
        """So many bytes from there on with every bit turned over; behind the end come zeros."""
        return bytes(self.view[first : first + count]).translate(_TURNED_OVER).ljust(count, b"\0")
