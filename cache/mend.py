"""Writes pages back into their slots, in a directory that nobody serves: bytes that the SSD has lost, and
their sums. Nothing else is touched; the index says the same as before."""

from __future__ import annotations

import mmap
import os
from types import TracebackType
from typing import Self

from tierblk.cache.directory import SLOTS, SUMS, SUMS_BYTES_PER_SLOT
from tierblk.cache.superblock import SLOT_BYTES
from tierblk.cache.view import View
from tierblk.core import PAGE_BYTES, crc32c
from tierblk.errors import CacheError

_SUM_BYTES = 4


class Mender:
    """A context manager; what was put is durable behind it. CacheError: somebody uses the directory, or it
    cannot be written."""

    def __init__(self, view: View) -> None:
        self._path = view.path
        view.alone()
        try:
            self._slots_fd = os.open(view.path / SLOTS, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            try:
                self._sums_fd = os.open(view.path / SUMS, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                os.close(self._slots_fd)
                raise
        except OSError as error:
            raise self._unwritable(error) from None
        self._page = mmap.mmap(-1, PAGE_BYTES)

    def put(self, slot: int, page: int, data: bytes) -> None:
        """A page of a slot, 4096 bytes."""
        self._page[:] = data
        at_bytes = slot * SLOT_BYTES + page * PAGE_BYTES
        sum_at_bytes = slot * SUMS_BYTES_PER_SLOT + page * _SUM_BYTES
        try:
            if os.pwrite(self._slots_fd, self._page, at_bytes) != PAGE_BYTES:
                raise OSError("short write")
            os.pwrite(self._sums_fd, crc32c(data).to_bytes(_SUM_BYTES, "little"), sum_at_bytes)
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.fdatasync(self._slots_fd)
            os.fdatasync(self._sums_fd)
        except OSError as failed:
            raise self._unwritable(failed) from None
        finally:
            os.close(self._slots_fd)
            os.close(self._sums_fd)

    def _unwritable(self, error: OSError) -> CacheError:
        return CacheError(f"{self._path} cannot be repaired: {error.strerror or error}")
