"""Sources behind file://: a regular file, read in threads.

The version is what stat says (device, inode, size, mtime). It is looked at again after every piece and before
the piece counts as read, so a file that is written to under us ends reads instead of mixing two versions. A
file that is replaced by another one (renamed over) stays as it was opened.

A network filesystem whose server is away holds whoever reads for as long as it likes, and nothing ends that.
So threads read into memory of their own, never into the caller's: who is cancelled, or waited for
read_timeout, can leave at once (I6, R5), and what still comes is thrown away.
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.source import REPIN_HINT, Identity, Progress
from tierblk.remote.threads import THREADS_MAX, Threads

PIECE_BYTES = 256 * 1024  # how often progress is told
KIND = "stat:"  # how the validator of a file begins

T = TypeVar("T")


class FileSource:
    """One open file. Made by open_file; see Source for what its methods promise."""

    def __init__(self, url: str, path: str, timeout_s: float | None) -> None:
        self._url = url
        self._path = path
        self._timeout_s = timeout_s
        self._fd: int | None = None  # None: not opened yet, or closed
        self._closed = False
        self._identity: Identity | None = None
        self._version = ""
        self._threads = Threads()
        self._free: list[bytearray] = []  # memory that no thread has

    @property
    def identity(self) -> Identity:
        """The version that was opened. Known once open_file has returned."""
        assert self._identity is not None
        return self._identity

    def trust(self, identity: Identity) -> None:
        """Serve this version; reads look for it at the path."""
        self._identity, self._version = identity, identity.validator.removeprefix(KIND)

    async def open(self) -> None:
        """Open the file and pin its version."""
        self._fd, found = await self._opened(RemoteRefused)
        self.trust(Identity(self._url, found.st_size, f"{KIND}{_version(found)}"))

    async def _opened(self, absent: type[TierblkError]) -> tuple[int, os.stat_result]:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._threads.run(
                    lambda: _open(self._url, self._path, absent), lambda late: os.close(late[0])
                )
        except TimeoutError:
            raise RemoteUnavailable(
                f"{self._url}: {self._path} could not be opened within {self._timeout_s:g} s"
            ) from None

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """See Source.read_into."""
        if self._fd is None:
            await self._reopen(offset_bytes)
        view = buffer.cast("B")
        for begin in range(0, len(view), PIECE_BYTES):
            piece = view[begin : begin + PIECE_BYTES]
            await self._read(offset_bytes + begin, piece)
            progress(begin + len(piece))

    async def aclose(self) -> None:
        """See Source.aclose. A thread that hangs is left to itself; the file is closed when it is done."""
        if self._closed:
            return
        self._closed = True
        fd, self._fd = self._fd, None
        closed = RemoteRefused(f"{self._url}: this source is closed")
        self._threads.end(closed, lambda: None if fd is None else os.close(fd))

    async def _reopen(self, offset_bytes: int) -> None:
        """Find the pinned version at the path. RemoteUnavailable while nothing is there."""
        if not self._closed:
            fd, found = await self._opened(RemoteUnavailable)
            if _version(found) != self._version:
                os.close(fd)
                raise self._changed(found)
            if self._fd is None and not self._closed:
                self._fd = fd
            else:  # another read was faster, or the source was closed meanwhile
                os.close(fd)
        if self._fd is None:
            raise self._is_closed(offset_bytes)

    def _is_closed(self, offset_bytes: int) -> RemoteRefused:
        return RemoteRefused(
            f"{self._url}: asked for bytes from {offset_bytes} on, but this source is closed"
        )

    def _changed(self, found: os.stat_result) -> RemoteRefused:
        return RemoteRefused(
            f"{self._url} has changed: it was opened as {self._version}, and is now {_version(found)} "
            "(device-inode-bytes-mtime)",
            REPIN_HINT,
        )

    async def _read(self, offset_bytes: int, piece: memoryview) -> None:
        """Fill the piece, when all of it has come and counts."""
        if self._fd is None:
            raise self._is_closed(offset_bytes)
        fd, memory = self._fd, self._free.pop() if self._free else bytearray(PIECE_BYTES)
        own = memoryview(memory)[: len(piece)]
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._threads.run(lambda: self._fill(fd, offset_bytes, own))
        except TimeoutError:
            raise RemoteUnavailable(
                f"{self._asked(offset_bytes, piece)}, but nothing came for {self._timeout_s:g} s"
            ) from None
        piece[:] = own
        if len(self._free) < THREADS_MAX:
            self._free.append(memory)  # only here: whoever left early left it to the thread

    def _asked(self, offset_bytes: int, piece: memoryview) -> str:
        return f"{self._url}: asked for bytes {offset_bytes}-{offset_bytes + len(piece) - 1}"

    def _fill(self, fd: int, offset_bytes: int, piece: memoryview) -> None:
        """In a thread: read the piece, then see that the file is still the one that was opened."""
        asked = self._asked(offset_bytes, piece)
        filled_bytes = 0
        try:
            while filled_bytes < len(piece):
                count = os.preadv(fd, [piece[filled_bytes:]], offset_bytes + filled_bytes)
                if not count:
                    break
                filled_bytes += count
            found = os.fstat(fd)
        except OSError as error:
            raise RemoteUnavailable(f"{asked}, but the file cannot be read: {error.strerror}") from error
        if _version(found) != self._version:
            raise self._changed(found)
        if filled_bytes < len(piece):
            raise RemoteRefused(f"{asked}, but the file ends after {offset_bytes + filled_bytes} bytes")


async def open_file(url: str, pin: Identity | None = None, *, timeout_s: float | None = None) -> FileSource:
    """Open the file and pin its version. RemoteRefused for an address or a file that cannot be a source.

    pin: serve exactly that version; the file is only looked for when something is read. timeout_s: how long
    opening and each piece may take before it is RemoteUnavailable; None: for ever.
    """
    source = FileSource(url, _path(url), timeout_s)
    if pin is not None:
        source.trust(pin)
        return source
    try:
        await source.open()
    except BaseException:
        await source.aclose()
        raise
    return source


def _path(url: str) -> str:
    """The path that a file URL names."""
    parts = urlsplit(url)
    path = unquote(parts.path, errors="surrogateescape")
    if parts.netloc not in ("", "localhost") or not path.startswith("/"):
        raise RemoteRefused(
            f"{url} does not name a file by its whole path", "write file:///srv/images/disk.raw"
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise RemoteRefused(f"{url} has a ? or # in it", "write %3F for ? and %23 for # in a file's name")
    if "\0" in path:
        raise RemoteRefused(f"{url} has a zero byte in it")
    return path


def _open(url: str, path: str, absent: type[TierblkError] = RemoteRefused) -> tuple[int, os.stat_result]:
    """In a thread. absent: what it is called when nothing can be opened there.

    O_NONBLOCK: to open a FIFO would wait for its writer.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise absent(f"{url}: there is no file {path}") from None
    except OSError as error:
        raise absent(f"{url}: {path} cannot be opened: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise _no_regular_file(url, path, found.st_mode)
    return fd, found


def _no_regular_file(url: str, path: str, mode: int) -> RemoteRefused:
    if stat.S_ISDIR(mode):
        return RemoteRefused(f"{url}: {path} is a directory", "name the image in it")
    if stat.S_ISBLK(mode):
        # Nothing about it tells that it was written to, so what is cached could be wrong without a sign.
        return RemoteRefused(
            f"{url}: {path} is a block device, which has no version to pin", "use an image file of it"
        )
    return RemoteRefused(f"{url}: {path} is not a regular file")


def _version(found: os.stat_result) -> str:
    return f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
