"""Stores behind file://: a folder. An object is a file that is complete and synced before it gets its name.

The name is given by link(2), which fails when there is one, on local filesystems and on NFS alike. A rename
would replace what is there.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from tierblk.durable import sync_directory
from tierblk.errors import RemoteRefused, RemoteUnavailable
from tierblk.remote.store import Bytes, Found, check_name
from tierblk.remote.threads import Threads

_UNFINISHED = ".new-"  # how a file begins that has no name yet; no object's name does
_WORTH_RETRYING = {
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
}

T = TypeVar("T")


class DirectoryStore:
    """See Store for what its methods promise."""

    def __init__(self, url: str) -> None:
        """RemoteRefused when the address is no folder on this machine. Nothing is looked at yet."""
        self._shown = url
        parts = urlsplit(url)
        path = unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
            raise RemoteRefused(f"{url!r:.200} is no folder on this machine", "use file:///PATH")
        self._root = Path(path)
        self._threads = Threads()
        self._is_closed = False

    @property
    def shown(self) -> str:
        """See Store.shown."""
        return self._shown

    @property
    def clock_unix_s(self) -> float:
        """See Store.clock_unix_s: this machine's, which also dates the files of a local folder."""
        return time.time()

    async def create(self, name: str, pieces: Sequence[Bytes]) -> bool:
        """See Store.create."""
        check_name(name)
        return await self._run(f"create {name}", lambda: _create(self._root, name, pieces))

    async def read(self, name: str, limit_bytes: int) -> bytes | None:
        """See Store.read."""
        check_name(name)
        data = await self._run(f"read {name}", lambda: _read(self._root / name, limit_bytes + 1))
        if data is not None and len(data) > limit_bytes:
            raise RemoteRefused(f"{self.shown}/{name} has more than {limit_bytes} bytes, which none has")
        return data

    async def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """See Store.read_into. The thread reads into memory of its own: who is cancelled leaves at once."""
        check_name(name)
        view = buffer.cast("B")
        data = await self._run(
            f"read {name}", lambda: _read_range(self._root / name, offset_bytes, len(view))
        )
        if data is None or len(data) != len(view):
            what = "is not there" if data is None else f"ends before byte {offset_bytes + len(view)}"
            raise RemoteRefused(f"{self.shown}/{name} {what}")
        view[:] = data

    async def names(self, folder: str, after: str = "") -> list[Found]:
        """See Store.names."""
        check_name(folder)
        return await self._run(f"list {folder}", lambda: sorted(_names(self._root, folder, after)))

    async def delete(self, name: str) -> None:
        """See Store.delete."""
        check_name(name)
        await self._run(f"delete {name}", lambda: (self._root / name).unlink(missing_ok=True))

    async def aclose(self) -> None:
        """See Store.aclose."""
        if not self._is_closed:
            self._is_closed = True
            self._threads.end(RemoteRefused(f"{self.shown} is closed"), lambda: None)

    async def _run(self, what: str, function: Callable[[], T]) -> T:
        if self._is_closed:
            raise RemoteRefused(f"{self.shown} is closed")
        with self._translated(what):
            return await self._threads.run(function)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{self.shown}: cannot {what}: {error.strerror or error}"
            if error.errno in _WORTH_RETRYING:
                raise RemoteUnavailable(message) from error
            raise RemoteRefused(message, "the daemon's user needs a folder that it may write to") from error


def _create(root: Path, name: str, pieces: Sequence[Bytes]) -> bool:
    target = root / name
    _make_folder(target.parent)
    unfinished = target.parent / f"{_UNFINISHED}{os.urandom(16).hex()}"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while len(view):
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(unfinished, target)
        except FileExistsError:
            return False
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(target.parent)
    return True


def _make_folder(path: Path) -> None:
    """Durable, with those above it."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    sync_directory(path.parent)


def _open(path: Path) -> int | None:
    """For reading; None when there is none. OSError for what is no regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file")


def _read(path: Path, most_bytes: int) -> bytes | None:
    return _read_range(path, 0, most_bytes)


def _read_range(path: Path, offset_bytes: int, most_bytes: int) -> bytes | None:
    descriptor = _open(path)
    if descriptor is None:
        return None
    data = bytearray()
    try:
        while len(data) < most_bytes:
            piece = os.pread(descriptor, min(1 << 20, most_bytes - len(data)), offset_bytes + len(data))
            if not piece:
                break
            data += piece
    finally:
        os.close(descriptor)
    return bytes(data)


def _names(root: Path, folder: str, after: str) -> Iterator[Found]:
    try:
        entries = list(os.scandir(root / folder))
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{folder}/{entry.name}"
        if entry.name.startswith(".") or name <= after:
            continue
        with suppress(FileNotFoundError):  # deleted meanwhile
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(found.st_mode):
                yield Found(name, found.st_size, found.st_mtime)
