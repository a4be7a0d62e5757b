"""A cache that gets another size, on real files: what stays, what goes, and crashes at every step."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO, ENOSPC
from pathlib import Path

import pytest

from tests.cache_rig import (
    CACHE_BYTES,
    CacheRig,
    Killed,
    changed_index,
    check_files,
    copy_cache,
    image_bytes,
    index_rows,
    kill_at,
    layer_rows,
    make_engine,
    mounted,
    read_superblock,
    run_directory,
    session,
    settings,
)
from tierblk.cache import Cache
from tierblk.cache.directory import Directory
from tierblk.cache.index import Index
from tierblk.cache.layers import LayerRecord
from tierblk.cache.maps import Maps
from tierblk.cache.rows import Entry, entries_of, pack_row
from tierblk.cache.start import StartMode
from tierblk.core import BLOCK_BYTES
from tierblk.errors import CacheError
from tierblk.units import MIB

LARGE, SMALL = 24 * MIB, CACHE_BYTES
IMAGE = image_bytes(1, 300)
OTHER = image_bytes(2, 40) + bytes(BLOCK_BYTES // 2) + image_bytes(3, 1)[BLOCK_BYTES // 2 :]
ALL = {(1, block) for block in range(300)} | {(2, block) for block in range(41)}
Slots = dict[tuple[int, int], int]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        yield path


def slots_of(rig: CacheRig) -> Slots:
    """(layer, block) -> slot of all that is in slots."""
    return {
        (layer.layer_id, row * 64 + i): entry.slot
        for layer in layer_rows(rig.cache)
        for row, packed in layer.rows.items()
        for i, entry in enumerate(entries_of(packed))
        if entry.slot
    }


def lengths(directory: Path) -> tuple[int, int, int]:
    """Slots by the superblock, by the length of `slots`, by the length of `sums`."""
    return (
        read_superblock(directory).slot_count,
        (directory / "slots").stat().st_size // BLOCK_BYTES,
        (directory / "sums").stat().st_size // 64,
    )


async def make(directory: Path, run_dir: Path, left: str, size_bytes: int) -> Slots:
    """A cache with all of both images, as far as it has slots, as a clean stop, a kill or a power cut leaves
    it. Returns its slots; the last block of OTHER is in the last one.
    """
    async with session(directory, run_dir, left == "clean", size_bytes) as rig:
        slots = rig.cache.stats()["slots"]
        await rig.fill(await rig.base(IMAGE), *range(min(300, slots - 41)))
        await rig.fill(await rig.base(OTHER, "b"), *range(41))
        await rig.cache.commit()
        made = slots_of(rig)
    if left == "cut":
        shutil.rmtree(run_dir / str(read_superblock(directory).uuid))
    assert made[2, 40] == max(made.values())
    return made


def change(directory: Path, run_dir: Path, left: str, last: Entry) -> None:
    """Another entry for the last block of OTHER, where the next opening looks for it."""
    if left == "killed":
        maps = run_dir / str(read_superblock(directory).uuid) / "maps"
        with (maps / "2.map").open("r+b") as file:
            file.seek(4096 + 40 * 32)
            file.write(pack_row([last])[:12])
        return
    with changed_index(directory) as index:
        entries = entries_of(dict(index.rows(2))[0])
        entries[40] = last
        index.write_rows({2: [(0, pack_row(entries))]})


async def read_all(rig: CacheRig) -> set[tuple[int, int]]:
    """Reads both images, compares, and returns what was fetched for it."""
    before = len(rig.fetched)
    for image, name in ((IMAGE, "a"), (OTHER, "b")):
        assert await rig.read(await rig.base(image, name), 0, len(image) // BLOCK_BYTES) == image
        await rig.settle()
    return set(rig.fetched[before:])


def resizes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [log.getMessage() for log in caplog.records if log.getMessage().startswith("resize")]


MODES = {"clean": StartMode.CLEAN, "killed": StartMode.WARM, "cut": StartMode.UNCLEAN}


@pytest.mark.parametrize("left", MODES)
async def test_a_cache_grows(
    tmp_path: Path, run_dir: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    caplog.set_level(logging.INFO)
    slots = await make(directory, run_dir, left, SMALL)
    assert lengths(directory) == (256, 256, 256)
    async with session(directory, run_dir, size_bytes=LARGE) as rig:
        assert resizes(caplog) == [f"resize of {directory}: from 16MiB to 24MiB, 0 cached blocks dropped"]
        assert rig.cache.start_mode is MODES[left]
        assert lengths(directory) == (384, 384, 384)
        for name, size_bytes in (("slots", LARGE), ("sums", 384 * 64)):
            assert (directory / name).stat().st_blocks * 512 >= size_bytes, "preallocated"
        assert slots_of(rig) == slots
        assert rig.cache.stats()["slots"] == rig.cache.engine.slot_count - 1 == 383
        assert rig.cache.stats()["free"] == 128
        assert await read_all(rig) == ALL - slots.keys()
        assert slots_of(rig).keys() == ALL
    caplog.clear()
    async with session(directory, run_dir, size_bytes=LARGE) as rig:
        assert resizes(caplog) == []
        assert await read_all(rig) == set()


@pytest.mark.parametrize("left", MODES)
async def test_a_cache_shrinks(
    tmp_path: Path, run_dir: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies before the new end stays; so do zeros, which need no slot, wherever they are."""
    directory = tmp_path / "cache"
    caplog.set_level(logging.INFO)
    slots = await make(directory, run_dir, left, LARGE)
    kept = {block: slot for block, slot in slots.items() if slot < 256}
    assert (len(slots), len(kept)) == (341, 255)
    change(directory, run_dir, left, Entry(slots[2, 40], cached=0xFF00, zero=0x00FF))
    async with session(directory, run_dir, size_bytes=SMALL) as rig:
        assert resizes(caplog) == [f"resize of {directory}: from 24MiB to 16MiB, 86 cached blocks dropped"]
        assert rig.cache.start_mode is MODES[left]
        assert lengths(directory) == (256, 256, 256)
        assert slots_of(rig) == kept
        assert entries_of(rig.cache.engine.layers[2].peek_row(0))[40] == Entry(zero=0xFF)
        stats = rig.cache.stats()
        assert (stats["slots"], stats["free"], stats["quarantined"]) == (255, 0, 0)
        assert await read_all(rig) == ALL - kept.keys()
    assert check_files(directory) == []


async def test_an_image_of_which_all_goes_is_forgotten(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, size_bytes=LARGE) as rig:
        await rig.fill(await rig.base(IMAGE), *range(280))
        await rig.fill(await rig.base(OTHER, "b"), *range(5))
    async with session(directory, run_dir, size_bytes=SMALL) as rig:
        assert list(rig.cache.engine.layers) == [1]
    assert [layer.layer_id for layer in index_rows(directory)] == [1]


async def test_slots_that_only_the_index_names_still_wait(tmp_path: Path, run_dir: Path) -> None:
    """R8: blocks were evicted, no commit came, the daemon was killed: their slots are not free yet."""
    directory = tmp_path / "cache"
    async with session(directory, run_dir, False, LARGE) as rig:
        await rig.fill(await rig.base(IMAGE), *range(300))
        await rig.cache.commit()
        assert await rig.evict(100) == 100
        kept = {block: slot for block, slot in slots_of(rig).items() if slot < 256}
    async with session(directory, run_dir, size_bytes=SMALL) as rig:
        assert slots_of(rig) == kept
        assert rig.cache.stats()["quarantined"] == 255 - len(kept)
        await rig.cache.commit()
        assert rig.cache.stats()["free"] == 255 - len(kept)


STEPS = [
    ("grow", os, "posix_fallocate", 1),
    ("grow", os, "posix_fallocate", 2),
    ("grow", Directory, "write_superblock", 1),
    ("grow", Directory, "write_superblock", 2),
    ("grow", Index, "begin_session", 1),
    ("shrink", Maps, "forget_slots", 1),
    ("shrink", Maps, "forget_slots", 2),
    ("shrink", Index, "write_rows", 1),
    ("shrink", Index, "write_rows", 2),
    ("shrink", Directory, "write_superblock", 1),
    ("shrink", Directory, "write_superblock", 2),
    ("shrink", os, "ftruncate", 1),
    ("shrink", os, "ftruncate", 2),
    ("shrink", Index, "begin_session", 1),
    ("shrink", Directory, "write_superblock", 4),
]


@pytest.mark.parametrize("after", [False, True], ids=["before, goes on", "after, goes back"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0]}-{step[2]}-{step[3]}")
@pytest.mark.parametrize("left", MODES)
async def test_a_crash_in_the_middle(
    tmp_path: Path,
    run_dir: Path,
    step: tuple[str, object, str, int],
    after: bool,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it leaves can be opened with either size, serves right bytes, and has all that has to stay."""
    directory = tmp_path / "cache"
    way, owner, method, call = step
    if method == "forget_slots" and left != "killed":
        owner, method = Index, "meta"
    old, new = (SMALL, LARGE) if way == "grow" else (LARGE, SMALL)
    slots = await make(directory, run_dir, left, old)
    kept = {block: slot for block, slot in slots.items() if way == "grow" or slot < 256}
    for _ in range(2):
        with monkeypatch.context() as patch:
            kill_at(patch, owner, method, call, after)
            try:
                cache = Cache.open(settings(directory, new), run_dir, make_engine)
            except Killed:
                pass
            else:  # it had got so far the first time that this step did not come again
                await cache.close(clean=False)
        assert check_files(directory) == []
        slot_count, *files = lengths(directory)
        assert min(files) >= slot_count
    if left == "cut":
        shutil.rmtree(run_dir / str(read_superblock(directory).uuid), ignore_errors=True)
    async with session(directory, run_dir, size_bytes=old if after else new) as rig:
        assert rig.cache.start_mode is not StartMode.DISCARDED
        found = slots_of(rig)
        assert found.items() >= kept.items()
        assert await read_all(rig) == ALL - found.keys()
        assert len(set(lengths(directory))) == 1
    assert check_files(directory) == []


async def test_nothing_is_cut_before_all_have_forgotten_it(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps first: killed now, the daemon after this one believes them. That each step is durable before the
    next is the business of who does it.
    """
    directory, done = tmp_path / "cache", list[str]()
    await make(directory, run_dir, "killed", LARGE)
    for owner, method in (
        (Maps, "forget_slots"),
        (Index, "write_rows"),
        (Directory, "write_superblock"),
        (os, "ftruncate"),
        (Index, "begin_session"),
    ):
        note_calls(monkeypatch, owner, method, done)
    await (await CacheRig.open(directory, run_dir, SMALL)).end(clean=False)
    assert done[: done.index("begin_session")] == [
        *["forget_slots"] * 2,
        *["write_rows"] * 2,
        *["write_superblock"] * 2,
        *["ftruncate"] * 2,
        "write_superblock",
    ]


def note_calls(monkeypatch: pytest.MonkeyPatch, owner: object, method: str, done: list[str]) -> None:
    original = getattr(owner, method)

    def noting(*args: object, **kwargs: object) -> object:
        done.append(method)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, noting)


async def test_either_superblock_knows_the_new_size(tmp_path: Path, run_dir: Path) -> None:
    """The files are cut: a copy of before would call them damaged when the other one is."""
    directory = tmp_path / "cache"
    await make(directory, run_dir, "clean", LARGE)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Index, "begin_session", 1, after=False)
        with pytest.raises(Killed):
            Cache.open(settings(directory, SMALL), run_dir, make_engine)
    newest = read_superblock(directory)
    with (directory / "slots").open("r+b") as file:
        file.seek(newest.offset_bytes + 100)
        file.write(b"\xff")
    assert read_superblock(directory).slot_count == 256
    async with session(directory, run_dir) as rig:
        assert len(await read_all(rig)) == 341 - 255


async def refusal(directory: Path, run_dir: Path, size_bytes: int) -> str:
    """The sentence with which an opening ends that leaves everything as it was."""
    before = copy_cache(directory, directory.with_name("before"))
    with pytest.raises(CacheError) as caught:
        await CacheRig.open(directory, run_dir, size_bytes)
    assert "\n" not in caught.value.message
    for path in ("slots", "sums", "index/data.mdb"):
        assert (directory / path).read_bytes() == (before / path).read_bytes()
    return caught.value.message


async def test_no_room_to_grow(tmp_path: Path, run_dir: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=28m") as disk:
        directory = disk / "cache"
        async with session(directory, run_dir) as rig:
            await rig.fill(await rig.base(OTHER), *range(41))
        before = {p.name: p.stat().st_size for p in directory.iterdir() if p.is_file()}
        with pytest.raises(CacheError) as caught:
            await CacheRig.open(directory, run_dir, 64 * MIB)
        assert caught.value.message == (
            f"the cache in {directory} cannot grow from 16MiB to 64MiB: that needs 52 MiB more, "
            f"{caught.value.message.rpartition(', ')[2]}"
        )
        assert caught.value.message.endswith("MiB are free")
        assert {p.name: p.stat().st_size for p in directory.iterdir() if p.is_file()} == before
        async with session(directory, run_dir) as rig:
            await rig.fill(await rig.base(OTHER), *range(41))
            assert rig.fetched == []


@pytest.mark.parametrize("errno", [ENOSPC, EIO])
@pytest.mark.parametrize("call", [1, 2])
async def test_a_disk_that_fails_while_it_grows(
    tmp_path: Path, run_dir: Path, errno: int, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that was free when it was looked at is not: what was taken is given back."""
    directory = tmp_path / "cache"
    await make(directory, run_dir, "clean", SMALL)
    fallocate, calls = os.posix_fallocate, 0

    def failing(descriptor: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        fallocate(descriptor, offset, length // 2 if calls == call else length)
        if calls == call:
            raise OSError(errno, os.strerror(errno))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing)
        message = await refusal(directory, run_dir, LARGE)
    expected = "that needs 12 MiB more, " if errno == ENOSPC else os.strerror(errno)
    assert message.startswith(f"the cache in {directory} cannot grow from 16MiB to 24MiB: {expected}")
    async with session(directory, run_dir) as rig:
        assert len(await read_all(rig)) == 341 - 255


async def test_a_limit_on_the_size_of_files(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    await make(directory, run_dir, "clean", SMALL)
    with file_size_limit(20 * MIB):
        message = await refusal(directory, run_dir, LARGE)
    assert message.endswith("cannot grow from 16MiB to 24MiB: File too large")


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """RLIMIT_FSIZE, whose signal Python ignores: a write beyond it ends in EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("left", MODES)
async def test_i3_a_dirty_page_is_never_dropped(tmp_path: Path, run_dir: Path, left: str) -> None:
    directory = tmp_path / "cache"
    slots = await make(directory, run_dir, left, LARGE)
    assert slots[2, 40] >= 256
    change(directory, run_dir, left, Entry(slots[2, 40], 0xFF00, 0xFF00, 0x00FF, 0x0100))
    assert await refusal(directory, run_dir, SMALL) == (
        f"the cache in {directory} cannot shrink from 24MiB to 16MiB: pages of http://images.example/b.raw "
        "that nothing else has are in the part that would go"
    )


async def test_what_cannot_be_served_is_not_resized_either(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    await make(directory, run_dir, "clean", LARGE)
    with changed_index(directory) as index:
        index.put_layer(LayerRecord(3, "volume", "s3://bucket/v", 1 << 30, "", 0))
    for size_bytes in (SMALL, 32 * MIB):
        assert "holds a volume, which this version cannot serve" in await refusal(
            directory, run_dir, size_bytes
        )


async def test_a_cache_that_runs_keeps_its_size(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir):
        with pytest.raises(CacheError, match="is in use by another process"):
            await CacheRig.open(directory, run_dir, LARGE)
        assert lengths(directory) == (256, 256, 256)


@pytest.mark.parametrize("size_bytes", [SMALL, SMALL + 65535, LARGE])
async def test_what_lies_beyond_the_end_is_cut(tmp_path: Path, run_dir: Path, size_bytes: int) -> None:
    directory = tmp_path / "cache"
    slots = await make(directory, run_dir, "clean", SMALL)
    os.truncate(directory / "slots", SMALL + 5 * BLOCK_BYTES + 4096)
    os.truncate(directory / "sums", 300 * 64)
    async with session(directory, run_dir, size_bytes=size_bytes) as rig:
        assert set(lengths(directory)) == {size_bytes // BLOCK_BYTES}
        assert slots_of(rig) == slots


async def test_a_cache_on_a_full_disk_can_be_made_smaller(tmp_path: Path, run_dir: Path) -> None:
    """Rows are forgotten with the room that the index keeps for that."""
    with mounted("tmpfs", tmp_path / "disk", "size=40m") as disk:
        directory = disk / "cache"
        async with session(directory, run_dir, size_bytes=LARGE):
            pass
        with changed_index(directory) as index:
            index.put_layer(LayerRecord(1, "base", "http://images.example/large.raw", 1 << 40, "1", 0))
            index.write_rows({1: [(slot * 700, pack_row([Entry(slot, cached=1)])) for slot in range(1, 384)]})
        with (disk / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, os.statvfs(disk).f_bavail * 4096)
        cache = Cache.open(settings(directory, SMALL), run_dir, make_engine)
        assert cache.stats()["free"] == 0
        await cache.close()
        assert lengths(directory) == (256, 256, 256)
        (layer,) = index_rows(directory)
        assert sorted(layer.rows) == [slot * 700 for slot in range(1, 256)]
