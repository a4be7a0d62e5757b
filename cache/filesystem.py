"""What the cache asks of a filesystem: that it is local, gives space for sure, and keeps names."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from errno import EDQUOT, ENOSPC, ENOTDIR
from pathlib import Path

from tierblk.durable import sync_directory
from tierblk.errors import CacheError
from tierblk.units import format_size

# f_type of statfs(2). On these another machine may change the file, flock may hold on one host only, or
# nobody can say when a synced byte is durable. FUSE is here because most of what is mounted with it is of
# that kind.
NETWORK_FILESYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x01021997: "9p",
    0x65735546: "FUSE",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x786F4256: "vboxsf",
}
MEMORY_FILESYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


def filesystem_type(path: Path) -> int:
    """f_type of the filesystem that holds path, a magic number of 32 bits. OSError as statfs(2) has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(512)  # struct statfs is about 120 bytes; its first word is f_type
    if libc.statfs(os.fsencode(path), buffer):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(path))
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def refuse_network_filesystem(path: Path, magic: int | None = None) -> None:
    """CacheError when path lies on a filesystem of which R8 cannot be promised. `magic`: its f_type, if
    known.
    """
    name = NETWORK_FILESYSTEMS.get(filesystem_type(path) if magic is None else magic)
    if name is not None:
        raise CacheError(
            f"{path} is on a network filesystem ({name}), where a cache cannot be kept safely",
            "put cache.dir on a local disk",
        )


def free_bytes(path: Path) -> int:
    """What an ordinary user could still write; the reserve for root is not ours to use up."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require_space(path: Path, needed_bytes: int) -> None:
    """CacheError that names both sizes when the filesystem has less than that free."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise no_space(path, needed_bytes, free)


def no_space(path: Path, needed_bytes: int, free: int) -> CacheError:
    """The error of a filesystem that has not enough room for a cache."""
    return CacheError(
        f"the cache in {path} needs {format_size(needed_bytes)} of disk, {format_size(free)} are free",
        "make cache.size smaller, or free some space",
    )


def is_no_space(error: OSError) -> bool:
    """Whether a full disk or a full quota is what went wrong."""
    return error.errno in (ENOSPC, EDQUOT)


def make_directories(path: Path, undo: ExitStack) -> None:
    """mkdir -p with mode 0700; what was made is removed again when `undo` unwinds. OSError."""
    missing = []
    while not path.is_dir():
        if path.exists():
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(path))
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700)
        undo.callback(directory.rmdir)
        sync_directory(directory.parent)


def create_preallocated(path: Path, size_bytes: int) -> None:
    """A new file of mode 0600 whose blocks are all allocated: writing into it never fails for lack of space.
    OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
