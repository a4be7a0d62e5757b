"""What the binary objects of a volume share: bytes read with every bound checked, and the hash at the end.
Pure.

Each begins with a magic of 8 bytes and a version (u32), and ends with the sha256 of everything before it.
These stay where they are in every version, so that an old program can tell a newer format from damage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from tierblk.errors import RemoteRefused

MAGIC_BYTES = 8
HASH_BYTES = 32
_VERSION = struct.Struct("<I")


class Malformed(Exception):
    """Bytes that are not of their format; the text is the end of a sentence. It leaves no decode()."""


class Reader:
    """Takes fields off bytes, from the first to the last. Malformed where they end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left_bytes(self) -> int:
        return len(self._data) - self._at

    def take(self, length_bytes: int) -> bytes:
        """The next bytes."""
        if length_bytes > self.left_bytes:
            raise Malformed("it ends too early")
        self._at += length_bytes
        return self._data[self._at - length_bytes : self._at]

    def fields(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields."""
        return layout.unpack(self.take(layout.size))

    def text(self, length_bytes: int) -> str:
        """The next bytes as UTF-8."""
        try:
            return self.take(length_bytes).decode()
        except UnicodeDecodeError:
            raise Malformed("a text in it is not UTF-8") from None

    def times(self, count: int, least_bytes: int) -> Iterator[int]:
        """Counts to `count`, once it is sure that so many items of at least so many bytes can be there."""
        if count * least_bytes > self.left_bytes:
            raise Malformed("it ends too early")
        return iter(range(count))

    def end(self) -> None:
        """Malformed when bytes are left."""
        if self.left_bytes:
            raise Malformed(f"{self.left_bytes} bytes follow its end")


def sealed(body: bytes) -> bytes:
    """The body and its hash."""
    return body + sha256(body).digest()


def unsealed(data: bytes, *, name: str, what: str, magic: bytes, version: int, bytes_max: int) -> Reader:
    """A reader behind magic and version of a body whose hash is right. RemoteRefused: it is not, or no
    `what`."""
    if len(data) > bytes_max:
        raise RemoteRefused(f"{name} has {len(data)} bytes, and no {what} has more than {bytes_max}")
    if not data.startswith(magic):
        raise RemoteRefused(f"{name} is no {what}: it does not begin like one")
    least_bytes = MAGIC_BYTES + _VERSION.size + HASH_BYTES
    if len(data) < least_bytes:
        raise RemoteRefused(f"{name} is damaged: a {what} has more than {len(data)} bytes")
    (found,) = _VERSION.unpack_from(data, MAGIC_BYTES)
    if found > version:
        raise RemoteRefused(
            f"{name} was made by a newer tierblk: its format is {found}, this version knows {version}",
            "use that version of tierblk",
        )
    if found != version:
        raise RemoteRefused(f"{name} is no {what}: there was no format {found}")
    if sha256(memoryview(data)[:-HASH_BYTES]).digest() != data[-HASH_BYTES:]:
        raise RemoteRefused(f"{name} is damaged: its sha256 is not the one that it ends with")
    reader = Reader(data[:-HASH_BYTES])
    reader.take(MAGIC_BYTES + _VERSION.size)
    return reader
