"""A cache disk that is full, failing or read-only: reads go on, status says why, opening fails in a line."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from errno import EIO, EROFS
from pathlib import Path

import pytest

from tests.cache_rig import (
    CacheRig,
    copy_cache,
    image_bytes,
    mounted,
    read_superblock,
    run_directory,
    session,
)
from tierblk.cache.room import VolumesLoad
from tierblk.cache.start import StartMode
from tierblk.errors import CacheError
from tierblk.units import MIB

IMAGE, OTHER = image_bytes(1, 200), image_bytes(2, 20)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        yield path


@pytest.fixture
async def rig(tmp_path: Path, run_dir: Path) -> AsyncIterator[CacheRig]:
    rig = await CacheRig.open(tmp_path / "cache", run_dir)
    yield rig
    await rig.end(clean=False)


def failing(errno: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno, os.strerror(errno))

    return fail


@contextmanager
def ext4_on_loop(at: Path, memory: Path, size_bytes: int) -> Iterator[Path]:
    """An ext4 on a disk whose blocks come out of the tmpfs `memory` when they are first written: once that is
    full, the disk fails as a thin one does. In blocks of a page: of a write that ends within a page of the
    tmpfs, Linux's loop driver loses the rest without a word.
    """
    backing = memory / "disk"
    with backing.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(
        ["mkfs.ext4", "-q", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0", backing], check=True
    )
    at.mkdir()
    subprocess.run(["mount", "-o", "loop", backing, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


async def test_a_disk_that_stops_to_take_writes(tmp_path: Path, run_dir: Path) -> None:
    """A real one, under a real filesystem: what cannot be kept is passed through, what was kept is served."""
    with (
        mounted("tmpfs", tmp_path / "memory", "size=64m") as memory,
        ext4_on_loop(tmp_path / "disk", memory, 128 * MIB) as disk,
    ):
        rig = await CacheRig.open(disk / "cache", run_dir)
        layer = await rig.base(IMAGE)
        await rig.fill(layer, *range(20))
        await rig.cache.commit()
        with (memory / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, os.statvfs(memory).f_bavail * 4096)
        await rig.fill(layer, *range(20, 60))
        assert rig.cache.stats()["slot_write_errors"] > 0
        before = len(rig.fetched)
        await rig.fill(layer, *range(60))
        again = {block for _, block in rig.fetched[before:]}
        assert again
        assert again <= set(range(20, 60))
        await rig.end(clean=False)


async def test_r7_a_disk_that_turns_read_only_is_told_and_served_from(
    rig: CacheRig, tmp_path: Path, run_dir: Path
) -> None:
    """What ext4 does after an error of its journal: every sync ends in EROFS."""
    layer = await rig.base(IMAGE)
    await rig.fill(layer, *range(10))
    assert rig.cache.stats()["commit_failure"] is None
    began = time.time()
    rig.cache.committer.sync_slots = failing(EROFS)
    for _ in range(2):
        with pytest.raises(CacheError, match=r"could not be synced \(Read-only file system\)"):
            await rig.cache.commit()
    failure = rig.cache.stats()["commit_failure"]
    assert failure["final"]
    assert "nothing more is recorded until the daemon is restarted" in failure["reason"]
    assert began <= failure["since"] <= time.time()
    await rig.fill(layer, *range(10, 20))
    before = len(rig.fetched)
    await rig.fill(layer, *range(20))
    assert len(rig.fetched) == before


async def test_a_known_image_is_attached_though_nothing_can_be_recorded(
    rig: CacheRig, caplog: pytest.LogCaptureFixture
) -> None:
    """A new one is not: without a durable record, its blocks could become another image's after a crash."""
    layer = await rig.base(IMAGE)
    await rig.fill(layer, 0, 1)
    rig.cache._index.broken = "the cache's index could not be written; nothing more is recorded"
    with caplog.at_level(logging.WARNING):
        assert await rig.base(IMAGE) is layer
    assert "could not be recorded: the cache's index could not be written" in caplog.text
    await rig.fill(layer, 0, 1, 2)
    with pytest.raises(CacheError, match="nothing more is recorded"):
        await rig.base(OTHER, "b")
    assert rig.cache.stats()["commit_failure"]["final"]  # the index told, before any commit did
    with pytest.raises(CacheError, match="nothing more is recorded"):
        await rig.cache.commit()


async def test_a_full_disk_is_told_until_there_is_room(
    rig: CacheRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = await rig.base(IMAGE)
    await rig.fill(layer, 0)

    def full(rows: int, load: VolumesLoad) -> None:
        raise CacheError("the cache's index cannot grow: its disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.cache._index, "_grow", full)
        for _ in range(2):
            with pytest.raises(CacheError, match="disk is full"):
                await rig.cache.commit()
        failure = rig.cache.stats()["commit_failure"]
        assert (failure["reason"], failure["final"]) == (
            "the cache's index cannot grow: its disk is full",
            False,
        )
        assert await rig.base(IMAGE) is layer
    await rig.cache.commit()
    assert rig.cache.stats()["commit_failure"] is None


async def opening_fails(directory: Path, run_dir: Path) -> str:
    """The one sentence with which it does."""
    with pytest.raises(CacheError) as caught:
        await CacheRig.open(directory, run_dir)
    assert "\n" not in caught.value.message
    return caught.value.message


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A file or folder that nobody can write to, root included."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.parametrize("what", ["", "slots", "sums", "index", "index/data.mdb"])
async def test_a_read_only_cache_is_refused_untouched(tmp_path: Path, run_dir: Path, what: str) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(5))
    before = copy_cache(directory, tmp_path / "before")
    with read_only(directory / what):
        message = await opening_fails(directory, run_dir)
    assert "read-only" in message.lower()
    assert str(directory) in message
    assert (directory / "slots").read_bytes() == (before / "slots").read_bytes()
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.CLEAN
        await rig.fill(await rig.base(IMAGE), *range(5))
        assert rig.fetched == []


@pytest.mark.parametrize(
    "call",
    ["os.preadv", "os.statvfs", "os.fdatasync", "os.fstat", "lmdb.verify.verify", "pathlib.Path.is_file"],
)
async def test_a_disk_that_fails_while_a_cache_is_opened(
    tmp_path: Path, run_dir: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(5))
    before = read_superblock(directory)
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(call, failing(EIO))
        if call == "os.statvfs":  # asked for by a cache that grows
            with pytest.raises(CacheError, match="Input/output error"):
                await CacheRig.open(directory, run_dir, 24 * MIB)
        else:
            message = await opening_fails(directory, run_dir)
            assert "Input/output error" in message
            assert "damaged" not in message
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert read_superblock(directory).confirmed == before.confirmed
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(5))
        assert rig.fetched == []
