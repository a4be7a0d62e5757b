"""Sources behind file://: a regular file, read in an executor.

The version is what stat says (device, inode, size, mtime). It is looked at again after every piece and before
the piece counts as read, so a file that is written to under us ends reads instead of mixing two versions. A
file that is replaced by another one (renamed over) stays as it was opened.
"""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

from tierblk.errors import RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.remote.source import REPIN_HINT, Identity, Progress

PIECE_BYTES = 256 * 1024  # how often progress is told, and how long a cancelled read goes on at most
THREADS_MAX = 4
KIND = "stat:"  # how the validator of a file begins


class FileSource:
    """One open file. Made by open_file; see Source for what its methods promise."""

    def __init__(self, url: str, path: str, fd: int | None, identity: Identity) -> None:
        """fd None: the file that has this identity is not there yet; reads look for it at the path."""
        self._url = url
        self._path = path
        self._fd = fd
        self._closed = False
        self._version = identity.validator.removeprefix(KIND)
        self._identity = identity
        # Its own threads: a network filesystem that hangs must not take those that the rest of the daemon
        # uses.
        self._executor = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="tierblk-file")
        self._reading: set[asyncio.Future[None]] = set()

    @property
    def identity(self) -> Identity:
        """The version that was opened."""
        return self._identity

    async def read_into(self, offset_bytes: int, buffer: memoryview, progress: Progress) -> None:
        """See Source.read_into."""
        if self._fd is None:
            await self._reopen(offset_bytes)
        view = buffer.cast("B")
        for begin in range(0, len(view), PIECE_BYTES):
            piece = view[begin : begin + PIECE_BYTES]
            await self._in_thread(offset_bytes + begin, piece)
            progress(begin + len(piece))

    async def aclose(self) -> None:
        """See Source.aclose."""
        self._closed = True
        fd, self._fd = self._fd, None
        if fd is None:
            return
        if self._reading:
            await asyncio.wait(self._reading)
        self._executor.shutdown(wait=False)  # its threads have nothing to do any more
        os.close(fd)

    async def _reopen(self, offset_bytes: int) -> None:
        """Find the pinned version at the path. RemoteUnavailable while nothing is there."""
        if not self._closed:
            fd, found = await asyncio.to_thread(_open, self._url, self._path, RemoteUnavailable)
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

    async def _in_thread(self, offset_bytes: int, piece: memoryview) -> None:
        """Fill the piece. A thread cannot be cancelled, so a cancelled caller waits for it (I6)."""
        if self._fd is None:
            raise self._is_closed(offset_bytes)
        work = asyncio.get_running_loop().run_in_executor(
            self._executor, self._fill, self._fd, offset_bytes, piece
        )
        self._reading.add(work)
        work.add_done_callback(self._reading.discard)
        cancelled: asyncio.CancelledError | None = None
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            work.exception()  # seen: nobody is left who wants it
            raise cancelled
        work.result()

    def _fill(self, fd: int, offset_bytes: int, piece: memoryview) -> None:
        """In a thread: read the piece, then see that the file is still the one that was opened."""
        asked = f"{self._url}: asked for bytes {offset_bytes}-{offset_bytes + len(piece) - 1}"
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


async def open_file(url: str, pin: Identity | None = None) -> FileSource:
    """Open the file and pin its version. RemoteRefused for an address or a file that cannot be a source.

    pin: serve exactly that version; the file is only looked for when something is read.
    """
    path = _path(url)
    if pin is not None:
        return FileSource(url, path, None, pin)
    fd, found = await asyncio.to_thread(_open, url, path)
    return FileSource(url, path, fd, Identity(url, found.st_size, f"{KIND}{_version(found)}"))


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
