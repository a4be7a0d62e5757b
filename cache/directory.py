"""The cache directory: its files, its lock, its superblock (R8).

    slots    slot_count x 64 KiB, preallocated, O_DIRECT; slot 0 holds the superblock; its open file is the
    lock sums     slot_count x 64 bytes, preallocated index/   LMDB; see index.py journal  see journal.py

A directory is made as `slots.new`, which becomes `slots` as the last step: while there is no `slots`,
whatever else is there is the rest of a creation that did not end, or not ours.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EINVAL
from pathlib import Path
from uuid import UUID, uuid4

from tierblk.cache import lockers
from tierblk.cache import superblock as superblocks
from tierblk.cache.filesystem import (
    create_preallocated,
    free_bytes,
    is_no_space,
    make_directories,
    no_space,
    refuse_network_filesystem,
    require_space,
)
from tierblk.cache.superblock import COPIES, COPY_BYTES, SLOT_BYTES, Superblock
from tierblk.durable import sync_directory
from tierblk.errors import CacheError

SUMS_BYTES_PER_SLOT = 64
INDEX_RESERVE_BYTES = 4 << 20
JOURNAL_BYTES = (4 << 20) + 4096
LOCK_WAIT_S = 5.0
_LOCK_RETRY_S = 0.02
SLOTS, NEW_SLOTS, SUMS, INDEX, JOURNAL = "slots", "slots.new", "sums", "index", "journal"
# What a filesystem puts into its own root, so that a fresh disk can be the cache directory.
_NOT_FOREIGN = {"lost+found"}

_log = logging.getLogger(__name__)

# Makes the index of a new directory: (path of index/, uuid, slot count).
MakeIndex = Callable[[Path, UUID, int], None]


class Directory:
    """An open, locked cache directory. `close` gives up the lock, so it comes after all I/O on slots_fd."""

    def __init__(self, path: Path, slots_fd: int, sums_fd: int, superblock: Superblock) -> None:
        self.path = path
        self.slots_fd = slots_fd
        self.sums_fd = sums_fd
        self.superblock = superblock

    @property
    def index_path(self) -> Path:
        """The folder of the LMDB environment."""
        return self.path / INDEX

    @property
    def journal_path(self) -> Path:
        return self.path / JOURNAL

    @property
    def dio_align_bytes(self) -> int:
        """What O_DIRECT on the slots file asks of offsets, lengths and memory; found by trying."""
        with mmap.mmap(-1, COPY_BYTES) as buffer, memoryview(buffer) as view:
            for align_bytes in (512, 1024, 2048):
                try:
                    with view[align_bytes : 2 * align_bytes] as part:
                        os.preadv(self.slots_fd, [part], align_bytes)
                except OSError as error:
                    if error.errno != EINVAL:
                        raise
                else:
                    return align_bytes
        return COPY_BYTES

    def write_superblock(self, superblock: Superblock) -> None:
        """Durable when it returns; the copy that was valid before stays. CacheError when the disk refuses."""
        try:
            _write_copy(self.slots_fd, superblock)
            os.fdatasync(self.slots_fd)
        except OSError as error:
            raise CacheError(
                f"cannot write the superblock of {self.path / SLOTS}: {error.strerror}"
            ) from None
        self.superblock = superblock

    def close(self) -> None:
        """Gives up the lock and closes the files. All I/O on slots_fd has ended (R8).

        Unlocked by name: an io_uring that had the file registered lets go of it some time after its end.
        """
        fcntl.flock(self.slots_fd, fcntl.LOCK_UN)
        os.close(self.sums_fd)
        os.close(self.slots_fd)


def open_directory(
    path: Path, size_bytes: int, run_dir: Path, make_index: MakeIndex, lock_wait_s: float = LOCK_WAIT_S
) -> Directory:
    """Opens the cache directory, or makes it when there is none yet; locked before anything is read.

    size_bytes: cache.size, of which whole slots are used, for a directory that is made; one that is there
    keeps its size (resize.py). run_dir: where daemons say who they are, to tell one that holds the lock from
    one that was killed and whose last writes have not landed; for the latter it waits lock_wait_s. CacheError
    for everything that can be wrong; then nothing was changed, and what a creation had made is gone again.
    """
    slot_count = size_bytes // SLOT_BYTES
    try:
        with ExitStack() as undo:
            make_directories(path, undo)
            refuse_network_filesystem(path)
            slots_fd = _open_slots(path / SLOTS)
            if slots_fd is None:
                slots_fd = _create(path, slot_count, make_index, undo)
            else:
                undo.callback(os.close, slots_fd)
                _lock(slots_fd, path, run_dir, lock_wait_s)
            directory = _check(path, slots_fd, undo)
            undo.pop_all()
            return directory
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise CacheError(f"cannot use the cache directory {path}: {error.strerror}{where}") from None


def _open_slots(path: Path, flags: int = 0) -> int | None:
    """The slots file as all I/O on it needs it, None when there is none. O_NONBLOCK: io_uring then needs no
    worker. O_NOATIME, which is its owner's to have: 2 % fewer of the kernel's instructions a hit.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o600)
        with suppress(OSError):  # it only saves time
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)
        return fd
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == EINVAL:
            raise CacheError(
                f"the filesystem of {path} does not support O_DIRECT", "put cache.dir on ext4, xfs or btrfs"
            ) from None
        raise


def _lock(slots_fd: int, path: Path, run_dir: Path, wait_s: float) -> None:
    """flock on the open file through which all I/O goes: free only when the last write has landed."""
    give_up_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(slots_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pid = _holder(slots_fd, run_dir)
        alive = pid is not None and _is_alive(pid)
        if alive or time.monotonic() >= give_up_s:
            raise _in_use(slots_fd, path, pid if alive else None)
        time.sleep(_LOCK_RETRY_S)


def _in_use(slots_fd: int, path: Path, daemon_pid: int | None) -> CacheError:
    """Who has it: a daemon, or for as long as it takes a command that looks into a directory that nobody
    serves (`cache verify`, say)."""
    if daemon_pid is not None:
        return CacheError(
            f"the cache in {path} is in use by another daemon (pid {daemon_pid})",
            "stop that daemon, or use another directory",
        )
    shown = lockers.shown(slots_fd)
    if shown is None:
        return CacheError(
            f"the cache in {path} is in use by another process",
            "a daemon, or a command such as `tierblk cache verify`: wait for its end, or end it",
        )
    return CacheError(
        f"the cache in {path} is in use by another process ({shown})", "wait for its end, or end it"
    )


def _holder(slots_fd: int, run_dir: Path) -> int | None:
    """The pid that the last daemon of this cache has left in run_dir, if it can be found."""
    try:
        superblock, _ = superblocks.choose(_read_copies(slots_fd), "")
        pid = json.loads((run_dir / str(superblock.uuid) / "daemon.json").read_text())["pid"]
    except (CacheError, OSError, ValueError, KeyError, TypeError):
        return None
    return pid if isinstance(pid, int) else None


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def _create(path: Path, slot_count: int, make_index: MakeIndex, undo: ExitStack) -> int:
    """Makes the files of a new directory and returns the locked slots file. Undone by `undo` when anything
    fails.
    """
    slots_fd = _claim(path, undo)
    slots_bytes, sums_bytes = slot_count * SLOT_BYTES, slot_count * SUMS_BYTES_PER_SLOT
    needed_bytes = slots_bytes + sums_bytes + INDEX_RESERVE_BYTES + JOURNAL_BYTES
    superblock = Superblock(uuid4(), slot_count, int(time.time()), sequence=0, session=0, confirmed=0)
    try:
        require_space(path, needed_bytes)
        os.posix_fallocate(slots_fd, 0, slots_bytes)
        undo.callback(_remove, path / SUMS)
        create_preallocated(path / SUMS, sums_bytes)
        undo.callback(_remove_index, path / INDEX)
        make_index(path / INDEX, superblock.uuid, slot_count)
        sync_directory(path / INDEX)
        for sequence in range(COPIES):
            _write_copy(slots_fd, superblocks.renumbered(superblock, sequence))
        os.fsync(slots_fd)
    except OSError as error:
        if is_no_space(error):
            raise no_space(path, needed_bytes, free_bytes(path)) from None
        raise
    os.rename(path / NEW_SLOTS, path / SLOTS)
    undo.callback(_remove, path / SLOTS)
    sync_directory(path)
    return slots_fd


def _claim(path: Path, undo: ExitStack) -> int:
    """A locked, empty `slots.new` in a directory that holds nothing else. CacheError when the directory is
    not ours.
    """
    names = {entry.name for entry in path.iterdir()} - _NOT_FOREIGN
    if SLOTS in names:
        raise _in_the_making(path)
    if (NEW_SLOTS not in names and names) or names - {NEW_SLOTS, SUMS, INDEX}:
        raise CacheError(
            f"{path} is not empty and not a cache directory: it holds {sorted(names)[0]!r}",
            "use another directory",
        )
    try:
        slots_fd = _open_slots(path / NEW_SLOTS, os.O_CREAT)
    except CacheError:  # the file is made before O_DIRECT is refused
        _remove(path / NEW_SLOTS)
        raise
    assert slots_fd is not None  # O_CREAT makes it, or the call raises
    undo.callback(os.close, slots_fd)
    try:
        fcntl.flock(slots_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(slots_fd), os.stat(path / NEW_SLOTS))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        raise _in_the_making(path)
    undo.callback(_remove, path / NEW_SLOTS)
    _remove(path / SUMS)
    _remove_index(path / INDEX)
    os.ftruncate(slots_fd, 0)
    return slots_fd


def _in_the_making(path: Path) -> CacheError:
    return CacheError(f"another daemon is making the cache in {path} at this moment", "try again")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _remove_index(path: Path) -> None:
    """Removes what LMDB makes, and nothing else: a folder that holds more stays, and the error says so."""
    if path.is_dir():
        for name in ("data.mdb", "lock.mdb"):
            _remove(path / name)
        path.rmdir()


def _check(path: Path, slots_fd: int, undo: ExitStack) -> Directory:
    """What the files say about themselves and against each other."""
    superblock, damaged = superblocks.choose(_read_copies(slots_fd), str(path / SLOTS))
    sums_fd = os.open(path / SUMS, os.O_RDWR | os.O_CLOEXEC)
    undo.callback(os.close, sums_fd)
    _check_length(path / SLOTS, slots_fd, superblock.slot_count * SLOT_BYTES)
    _check_length(path / SUMS, sums_fd, superblock.slot_count * SUMS_BYTES_PER_SLOT)
    if damaged:
        _log.warning("%s: one of the two superblocks is damaged; the other one is used", path / SLOTS)
    return Directory(path, slots_fd, sums_fd, superblock)


def _check_length(path: Path, descriptor: int, least_bytes: int) -> None:
    """A file that is longer is what a resize left that did not end; resize.py cuts it."""
    length = os.fstat(descriptor).st_size
    if length < least_bytes:
        raise CacheError(
            f"{path} is damaged: it has {length} bytes, its superblock says {least_bytes}",
            "remove the cache directory to begin with an empty one",
        )


def _read_copies(slots_fd: int) -> list[bytes]:
    """Both superblock copies as they are; short where the file is. mmap: O_DIRECT wants aligned memory."""
    with mmap.mmap(-1, COPIES * COPY_BYTES) as buffer:
        length = os.preadv(slots_fd, [buffer], 0)
        return [buffer[at : min(at + COPY_BYTES, length)] for at in range(0, COPIES * COPY_BYTES, COPY_BYTES)]


def _write_copy(slots_fd: int, superblock: Superblock) -> None:
    with mmap.mmap(-1, COPY_BYTES) as buffer:
        buffer[:] = superblocks.pack(superblock)
        if os.pwrite(slots_fd, buffer, superblock.offset_bytes) != COPY_BYTES:
            raise OSError(EINVAL, "short write")
