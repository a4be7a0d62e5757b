"""The cache directory on real filesystems: made whole or not at all, locked, never mistaken."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import EIO, ENOSPC, EPERM
from pathlib import Path
from uuid import UUID

import pytest

from tests.cache_rig import mounted
from tierblk.cache import filesystem, lockers, superblock
from tierblk.cache.directory import Directory, open_directory
from tierblk.errors import CacheError
from tierblk.units import MIB

SIZE_BYTES = 16 * MIB


def make_index(path: Path, uuid: UUID, slot_count: int) -> None:
    """In the place of LMDB: a folder with the file that it makes."""
    path.mkdir()
    (path / "data.mdb").write_text(f"{uuid} {slot_count}")


@contextmanager
def opened(path: Path, size_bytes: int = SIZE_BYTES, lock_wait_s: float = 0) -> Iterator[Directory]:
    directory = open_directory(path, size_bytes, path.parent / "run", make_index, lock_wait_s)
    try:
        yield directory
    finally:
        directory.close()


def refused(path: Path, size_bytes: int = SIZE_BYTES) -> str:
    """The message with which the directory is not opened."""
    with pytest.raises(CacheError) as caught, opened(path, size_bytes):
        pass
    assert "\n" not in caught.value.message
    return caught.value.message


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A cache directory that was made and closed."""
    with opened(tmp_path / "cache"):
        pass
    return tmp_path / "cache"


def test_a_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "cache"
    with opened(path) as directory:
        block = directory.superblock
        assert (block.slot_count, block.session, block.confirmed) == (256, 0, 0)
        assert os.fstat(directory.slots_fd).st_size == SIZE_BYTES
        assert os.fstat(directory.slots_fd).st_blocks * 512 >= SIZE_BYTES, "preallocated"
        assert os.fstat(directory.sums_fd).st_size == 256 * 64
        assert os.fstat(directory.sums_fd).st_blocks * 512 >= 256 * 64, "preallocated"
        assert os.stat(path).st_mode & 0o777 == 0o700
        assert os.fstat(directory.slots_fd).st_mode & 0o777 == 0o600
        assert (path / "index" / "data.mdb").read_text() == f"{block.uuid} 256"
        assert sorted(p.name for p in path.iterdir()) == ["index", "slots", "sums"]
        for descriptor in (directory.slots_fd, directory.sums_fd):
            assert not os.get_inheritable(descriptor)
        assert directory.dio_align_bytes in (512, 1024, 2048, 4096)


def test_the_slots_file_is_open_as_a_hit_wants_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(made) as directory:
        flags = fcntl.fcntl(directory.slots_fd, fcntl.F_GETFL)
        assert flags & os.O_DIRECT
        assert flags & os.O_NONBLOCK
        assert flags & os.O_NOATIME
        assert fcntl.fcntl(directory.slots_fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL:
            raise PermissionError(EPERM, "not the owner")
        return real(fd, command, argument)

    real = fcntl.fcntl
    monkeypatch.setattr("tierblk.cache.directory.fcntl.fcntl", refuse)
    with opened(made) as directory:
        assert not real(directory.slots_fd, fcntl.F_GETFL) & os.O_NOATIME


def test_it_is_opened_again_as_it_was(made: Path) -> None:
    with opened(made) as directory:
        first = directory.superblock
        directory.write_superblock(replace(first, sequence=first.sequence + 1, session=5))
    with opened(made) as directory:
        assert directory.superblock == replace(first, sequence=first.sequence + 1, session=5)


def test_r8_a_superblock_is_durable_when_it_is_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(made) as directory:
        later = replace(directory.superblock, sequence=directory.superblock.sequence + 1, session=9)
        at_sync: list[bytes] = []

        def fdatasync(descriptor: int) -> None:
            assert descriptor == directory.slots_fd
            at_sync.append((made / "slots").read_bytes()[later.offset_bytes :][:4096])

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        directory.write_superblock(later)
    assert at_sync == [superblock.pack(later)]


def test_a_disk_that_refuses_the_superblock(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(descriptor: int) -> None:
        raise OSError(EIO, os.strerror(EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with opened(made) as directory:
        before = directory.superblock
        with pytest.raises(CacheError, match=r"^cannot write the superblock of .*: Input/output error$"):
            directory.write_superblock(replace(before, session=9))
        assert directory.superblock == before


def test_a_directory_has_its_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `slots` a creation begins anew, so all of it is durable before that name is there."""
    rename, fsync = os.rename, os.fsync
    synced: list[str] = []

    def noting_fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        assert synced[-1] == "slots.new"
        assert {"sums", "index"} < set(synced)
        assert (target.parent / "index" / "data.mdb").exists()
        rename(source, target)
        synced.append("renamed")

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    with opened(tmp_path / "cache"):
        assert synced[-2:] == ["renamed", "cache"]


def test_an_empty_folder_is_used_and_what_mkfs_puts_there_too(tmp_path: Path) -> None:
    (tmp_path / "cache" / "lost+found").mkdir(parents=True)
    with opened(tmp_path / "cache"):
        pass
    assert (tmp_path / "cache" / "lost+found").is_dir()


@pytest.mark.parametrize("name", ["holiday.jpg", "sums", "index"])
def test_a_foreign_folder_is_refused_untouched(tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    (path / name).write_text("mine")
    assert refused(path) == f"{path} is not empty and not a cache directory: it holds {name!r}"
    assert contents(path) == {name: b"mine"}


def test_a_foreign_file_beside_a_creation_that_did_not_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    for name in ("slots.new", "letters"):
        (path / name).write_text("mine")
    assert "not a cache directory: it holds 'letters'" in refused(path)
    assert len(contents(path)) == 2


def test_a_foreign_slots_file_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    (path / "slots").write_bytes(b"one-armed bandits" * 4096)
    assert refused(path) == f"{path}/slots is not a slots file of tierblk"
    assert contents(path) == {"slots": b"one-armed bandits" * 4096}


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    assert refused(tmp_path / "cache") == f"cannot use the cache directory {tmp_path}/cache: Not a directory"
    assert "Not a directory" in refused(tmp_path / "cache" / "below")


def test_a_creation_that_was_killed_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    (path / "index").mkdir(parents=True)
    for name in ("slots.new", "sums", "index/data.mdb", "index/lock.mdb"):
        (path / name).write_bytes(b"half" * 100)
    with opened(path) as directory:
        assert directory.superblock.slot_count == 256
    assert sorted(contents(path)) == ["index/data.mdb", "slots", "sums"]


def test_a_creation_that_runs_is_left_alone(tmp_path: Path) -> None:
    def make_index_meanwhile(path: Path, uuid: UUID, slot_count: int) -> None:
        assert refused(tmp_path / "cache") == (
            f"another daemon is making the cache in {tmp_path}/cache at this moment"
        )
        make_index(path, uuid, slot_count)

    open_directory(tmp_path / "cache", SIZE_BYTES, tmp_path, make_index_meanwhile).close()


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_creation_leaves_nothing_behind(tmp_path: Path, existed: bool) -> None:
    def fail(path: Path, uuid: UUID, slot_count: int) -> None:
        make_index(path, uuid, slot_count)
        raise CacheError("the index does not want to")

    path = tmp_path / "a" / "cache"
    if existed:
        path.mkdir(parents=True)
    with pytest.raises(CacheError, match="does not want to"):
        open_directory(path, SIZE_BYTES, tmp_path, fail)
    assert (list(path.iterdir()) == []) if existed else not (tmp_path / "a").exists()


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=12m") as disk:
        message = refused(disk / "cache")
        assert message == f"the cache in {disk}/cache needs 24 MiB of disk, 12 MiB are free"
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space that was free when it was looked at has gone: the same sentence, and nothing left behind."""

    def fallocate(descriptor: int, offset: int, length: int) -> None:
        os.ftruncate(descriptor, length // 2)
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert f"the cache in {tmp_path}/cache needs 24 MiB of disk, " in refused(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_read_only_filesystem(tmp_path: Path, made: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "ro") as disk:
        assert refused(disk / "cache") == (
            f"cannot use the cache directory {disk}/cache: Read-only file system"
        )
    (tmp_path / "view").mkdir()
    subprocess.run(["mount", "--bind", made, tmp_path / "view"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path / "view"], check=True)
        assert "Read-only file system" in refused(tmp_path / "view")
    finally:
        subprocess.run(["umount", tmp_path / "view"], check=True)


def test_a_filesystem_without_o_direct(tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path / "disk") as disk:
        assert (
            refused(disk / "cache") == f"the filesystem of {disk}/cache/slots.new does not support O_DIRECT"
        )
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize(("magic", "name"), [(0x6969, "NFS"), (0xFE534D42, "SMB"), (0x65735546, "FUSE")])
def test_network_filesystems_are_refused(tmp_path: Path, magic: int, name: str) -> None:
    with pytest.raises(CacheError, match=rf"is on a network filesystem \({name}\)"):
        filesystem.refuse_network_filesystem(tmp_path, magic)
    filesystem.refuse_network_filesystem(tmp_path)
    filesystem.refuse_network_filesystem(tmp_path, magic=0xEF53)


def test_the_filesystem_type_is_that_of_statfs(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk") as disk:
        assert filesystem.MEMORY_FILESYSTEMS[filesystem.filesystem_type(disk)] == "tmpfs"
    with pytest.raises(FileNotFoundError):
        filesystem.filesystem_type(tmp_path / "none")


def test_a_directory_keeps_the_size_that_it_has(made: Path) -> None:
    """Another one is given to it later, when its index is open."""
    before = contents(made)
    with opened(made, 24 * MIB) as directory:
        assert directory.superblock.slot_count == 256
    assert contents(made) == before


def test_a_size_is_rounded_down_to_whole_slots(tmp_path: Path) -> None:
    with opened(tmp_path / "cache", SIZE_BYTES + 65535) as directory:
        assert directory.superblock.slot_count == 256
    with opened(tmp_path / "cache", SIZE_BYTES):
        pass


def test_one_daemon_at_a_time(made: Path) -> None:
    with opened(made) as directory:
        run = made.parent / "run" / str(directory.superblock.uuid)
        run.mkdir(parents=True)
        assert f"{made} is in use by another process (pid {os.getpid()}, " in refused(made)
        (run / "daemon.json").write_text(json.dumps({"pid": os.getpid()}))
        with pytest.raises(CacheError) as caught, opened(made, lock_wait_s=600):  # a living holder: at once
            pass
        assert caught.value.message == f"the cache in {made} is in use by another daemon (pid {os.getpid()})"
        for unreadable in ("{", "[]", '{"pid": "x"}', "{}"):
            (run / "daemon.json").write_text(unreadable)
            assert f"{made} is in use by another process (pid {os.getpid()}, " in refused(made)
    with opened(made):
        pass


def test_who_has_the_lock_may_be_unknown(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(made):
        monkeypatch.setattr(lockers, "pids", lambda fd: [])
        assert refused(made) == f"the cache in {made} is in use by another process"


HOLD = """
import fcntl, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_daemon_is_waited_for(made: Path) -> None:
    """R8: its last writes may still be on their way to the disk, and hold the lock until they are there."""
    with opened(made) as directory:
        run = made.parent / "run" / str(directory.superblock.uuid)
    run.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, made / "slots"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        dead = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # a zombie is as dead as one that is gone
        for _ in range(2):
            (run / "daemon.json").write_text(json.dumps({"pid": dead.pid}))
            said = f"the cache in {made} is in use by another process (pid {holder.pid}, {sys.executable} -c"
            assert refused(made).startswith(said)
            dead.wait()
        holder.kill()
        with opened(made, lock_wait_s=20):
            pass


def test_a_newer_format_is_refused_untouched(made: Path) -> None:
    with opened(made) as directory:
        newer = replace(directory.superblock, version=3)
    with (made / "slots").open("r+b") as slots:
        slots.write(superblock.pack(newer))
    before = contents(made)
    assert refused(made) == (
        f"{made}/slots was made by a newer tierblk: its format is 3, this version knows 2"
    )
    assert contents(made) == before


@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_superblock_is_survived(made: Path, copy: int, caplog: pytest.LogCaptureFixture) -> None:
    with (made / "slots").open("r+b") as slots:
        slots.seek(copy * 4096 + 100)
        slots.write(b"\xff" * 8)
    with caplog.at_level(logging.WARNING), opened(made) as directory:
        assert directory.superblock.sequence == 1 - copy
        repaired = replace(directory.superblock, sequence=directory.superblock.sequence + 1)
        directory.write_superblock(repaired)
    assert caplog.messages == [f"{made}/slots: one of the two superblocks is damaged; the other one is used"]
    caplog.clear()
    with opened(made) as directory:
        assert directory.superblock.sequence == 2 - copy
    assert caplog.messages == []  # the next copy went over the damaged one


def test_both_superblocks_damaged(made: Path) -> None:
    with (made / "slots").open("r+b") as slots:
        for at in (100, 4196):
            slots.seek(at)
            slots.write(b"\xff")
    before = contents(made)
    assert refused(made) == f"both superblocks of {made}/slots are damaged"
    assert contents(made) == before


@pytest.mark.parametrize("length", [4096, 5000, 8192, SIZE_BYTES - 1])
def test_slots_that_were_cut(made: Path, length: int) -> None:
    os.truncate(made / "slots", length)
    assert refused(made) == (
        f"{made}/slots is damaged: it has {length} bytes, its superblock says {SIZE_BYTES}"
    )


@pytest.mark.parametrize("length", [0, 1000])
def test_slots_cut_before_the_superblock_ends(made: Path, length: int) -> None:
    os.truncate(made / "slots", length)
    assert f"{made}/slots" in refused(made)


def test_sums_cut_or_missing(made: Path) -> None:
    os.truncate(made / "sums", 100)
    assert refused(made) == f"{made}/sums is damaged: it has 100 bytes, its superblock says 16384"
    (made / "sums").unlink()
    assert refused(made) == (
        f"cannot use the cache directory {made}: No such file or directory ({made}/sums)"
    )
