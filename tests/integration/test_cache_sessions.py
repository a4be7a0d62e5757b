"""From one session to the next, on the real engine: clean stop, kill, power cut, and tampering."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.cache_rig import (
    SLOTS,
    TIMEOUT_S,
    CacheRig,
    Killed,
    check_files,
    copy_cache,
    image_bytes,
    index_rows,
    kill_at,
    make_engine,
    read_superblock,
    run_directory,
    session,
    settings,
)
from tierblk.cache import Cache, maps
from tierblk.cache.directory import Directory
from tierblk.cache.index import Index
from tierblk.cache.layers import LayerRecord
from tierblk.cache.maps import Maps
from tierblk.cache.start import StartMode
from tierblk.core import BLOCK_BYTES
from tierblk.errors import CacheError

IMAGE = image_bytes(1, 150)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        yield path


async def test_what_was_cached_is_served_without_a_fetch(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.CLEAN
        assert rig.cache.run_dir == run_dir / str(rig.cache.uuid)
        await rig.fill(await rig.base(IMAGE), *range(100))
        assert len(rig.fetched) == 100
    assert list((run_dir / str(read_superblock(directory).uuid) / "maps").iterdir()) == []
    assert check_files(directory) == []
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.CLEAN
        layer = await rig.base(IMAGE)
        assert await rig.read(layer, 0, 100) == IMAGE[: 100 * BLOCK_BYTES]
        assert rig.fetched == []
        stats = rig.cache.stats()
        assert (stats["slots"], stats["free"], stats["quarantined"]) == (SLOTS - 1, SLOTS - 101, 0)
        assert stats["layers"] == [
            {
                "layer_id": 1,
                "kind": "base",
                "name": None,
                "url": "http://images.example/a.raw",
                "size_bytes": len(IMAGE),
                "cached_bytes": 100 * BLOCK_BYTES,
            }
        ]


async def test_a_short_last_block_and_zeros_survive(tmp_path: Path, run_dir: Path) -> None:
    image = image_bytes(2, 3) + bytes(BLOCK_BYTES) + image_bytes(3, 1)[: 3 * 512]
    for fetches in (5, 0):
        async with session(tmp_path / "cache", run_dir) as rig:
            layer = await rig.base(image)
            assert await rig.read(layer, 0, 4) == image[: 4 * BLOCK_BYTES]
            door = rig.door(layer)
            assert await asyncio.to_thread(door.read, 4 * BLOCK_BYTES, 1536) == image[4 * BLOCK_BYTES :]
            await rig.settle()
            assert len(rig.fetched) == fetches
            assert rig.cache.stats()["free"] == SLOTS - 1 - 4  # zeros need no slot


async def test_a_base_is_stored_once_and_another_version_apart(tmp_path: Path, run_dir: Path) -> None:
    async with session(tmp_path / "cache", run_dir) as rig:
        same = await asyncio.gather(
            *(rig.cache.base_layer("http://h/a", 1 << 20, 'etag:"1"') for _ in range(10))
        )
        assert len({layer.layer_id for layer in same}) == 1
        others = [
            await rig.cache.base_layer(*identity)
            for identity in [
                ("http://h/a", 1 << 20, 'etag:"2"'),
                ("http://h/a", 2 << 20, 'etag:"1"'),
                ("http://h/b", 1 << 20, 'etag:"1"'),
            ]
        ]
        assert len({layer.layer_id for layer in [same[0], *others]}) == 4


async def test_the_versions_of_an_address_are_known_the_last_used_last(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_795_000_000.0

    def clock() -> float:
        nonlocal now
        now += 10
        return now

    monkeypatch.setattr("tierblk.cache.cache.time.time", clock)
    async with session(tmp_path / "cache", run_dir) as rig:
        for validator in ("1", "2", "1"):
            layer = await rig.cache.base_layer("http://h/a", 1 << 20, validator)
            rig.images[layer.layer_id] = IMAGE
            await rig.fill(layer, 0)
        await rig.cache.base_layer("http://h/b", 1 << 20, "3")
        known = [("http://h/a", 1 << 20, "2"), ("http://h/a", 1 << 20, "1")]
        assert rig.cache.identities_of("http://h/a") == known
        assert rig.cache.identities_of("http://h/c") == []
    async with session(tmp_path / "cache", run_dir) as rig:
        assert rig.cache.identities_of("http://h/a") == known
        assert rig.cache.identities_of("http://h/b") == []  # nothing of it was cached, so it was forgotten


async def test_images_of_which_nothing_is_cached_are_forgotten(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.base(IMAGE, "a")
        await rig.fill(await rig.base(IMAGE, "b"), 0)
    async with session(directory, run_dir) as rig:
        assert (await rig.base(IMAGE, "b")).layer_id == 2
        assert (await rig.base(IMAGE, "c")).layer_id == 1, "a free number is used again"


async def test_there_is_an_end_to_layers(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierblk.cache.cache.LAYER_ID_MAX", 2)
    async with session(tmp_path / "cache", run_dir) as rig:
        await rig.base(IMAGE, "a")
        await rig.base(IMAGE, "b")
        with pytest.raises(CacheError, match="already knows 2 images"):
            await rig.base(IMAGE, "c")
        await rig.base(IMAGE, "a")


async def test_r1_a_killed_daemon_loses_nothing(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean=False) as rig:
        layer = await rig.base(IMAGE)
        await rig.fill(layer, *range(50))
        await rig.cache.commit()
        await rig.fill(layer, *range(50, 60))  # never committed
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.WARM
        layer = await rig.base(IMAGE)
        assert await rig.read(layer, 0, 60) == IMAGE[: 60 * BLOCK_BYTES]
        assert rig.fetched == []
        assert rig.cache.changed()


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.cache_rig import CacheRig, image_bytes

async def main():
    rig = await CacheRig.open(Path(sys.argv[1]), Path(sys.argv[2]))
    layer = await rig.base(image_bytes(1, 150))
    await rig.fill(layer, *range(20))
    await rig.cache.commit()
    await rig.fill(layer, *range(20, 40))
    print("filled", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_r1_after_a_real_sigkill(tmp_path: Path, run_dir: Path, root: Path) -> None:
    directory = tmp_path / "cache"
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, directory, run_dir, stdout=subprocess.PIPE, cwd=root
    )
    assert daemon.stdout is not None
    assert await asyncio.wait_for(daemon.stdout.readline(), TIMEOUT_S) == b"filled\n"
    daemon.kill()
    await daemon.wait()
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.WARM
        assert await rig.read(await rig.base(IMAGE), 0, 40) == IMAGE[: 40 * BLOCK_BYTES]
        assert rig.fetched == []


async def test_a_power_cut_keeps_what_was_committed(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean=False) as rig:
        layer = await rig.base(IMAGE)
        await rig.fill(layer, *range(50))
        await rig.cache.commit()
        await rig.fill(layer, *range(50, 60))
    shutil.rmtree(run_dir / str(read_superblock(directory).uuid))
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.UNCLEAN
        layer = await rig.base(IMAGE)
        assert await rig.read(layer, 0, 60) == IMAGE[: 60 * BLOCK_BYTES]
        await rig.settle()
        assert [block for _, block in rig.fetched] == list(range(50, 60))


async def test_r1_maps_of_another_boot_do_not_count(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory that is on a disk after all, through a power cut."""
    async with session(tmp_path / "cache", run_dir, clean=False) as rig:
        await rig.fill(await rig.base(IMAGE), 0, 1)
        await rig.cache.commit()
    monkeypatch.setattr(maps, "boot_id", lambda: UUID(int=1))
    async with session(tmp_path / "cache", run_dir) as rig:
        assert rig.cache.start_mode is StartMode.UNCLEAN


async def test_r8_freed_slots_that_the_index_names_wait_after_a_kill(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean=False) as rig:
        await rig.fill(await rig.base(IMAGE), *range(10))
        await rig.cache.commit()
        assert await rig.evict(4) == 4
        assert rig.cache.stats()["quarantined"] == 4
    async with session(directory, run_dir) as rig:
        stats = rig.cache.stats()
        assert (stats["free"], stats["quarantined"]) == (SLOTS - 1 - 10, 4)
        report = await rig.cache.commit()
        assert report.rows_written == 1
        stats = rig.cache.stats()
        assert (stats["free"], stats["quarantined"]) == (SLOTS - 1 - 6, 0)


async def test_r8_a_row_that_only_the_index_has_goes_with_the_first_commit(
    tmp_path: Path, run_dir: Path
) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean=False) as rig:
        await rig.fill(await rig.base(IMAGE), *range(5))
        await rig.cache.commit()
        assert await rig.evict(5) == 5
    async with session(directory, run_dir) as rig:
        assert rig.cache.stats()["quarantined"] == 5
        assert (await rig.cache.commit()).rows_deleted == 1
        assert rig.cache.stats()["free"] == SLOTS - 1
    assert all(not layer.rows for layer in index_rows(directory))


async def test_r8_an_index_from_a_backup_is_not_trusted(
    tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every slot that it names has had another owner since: serving them would be foreign bytes."""
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(10))
    shutil.copytree(directory / "index", tmp_path / "backup")
    other = image_bytes(9, 150)
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(10))
        await rig.evict(10)
        await rig.cache.commit()
        await rig.fill(await rig.base(other, "b"), *range(150))
    shutil.rmtree(directory / "index")
    shutil.copytree(tmp_path / "backup", directory / "index")
    copy_cache(directory, tmp_path / "copy")
    async with session(tmp_path / "copy", run_dir / "elsewhere", clean=False):
        pass
    assert index_rows(tmp_path / "copy") == []  # dropped for good, not only ignored
    caplog.clear()
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.DISCARDED
        assert rig.cache.stats()["free"] == SLOTS - 1
        assert "cannot be trusted and is dropped" in caplog.text
        await rig.fill(await rig.base(IMAGE), *range(10))
        assert len(rig.fetched) == 10
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.CLEAN
        assert await rig.read(await rig.base(IMAGE), 0, 10) == IMAGE[: 10 * BLOCK_BYTES]


async def test_openings_that_fail_cost_nothing(tmp_path: Path, run_dir: Path) -> None:
    def no_engine(**kwargs: int) -> None:
        raise OSError(1, "Operation not permitted")

    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(10))
    before = read_superblock(directory)
    for _ in range(3):
        with pytest.raises(CacheError, match=r"^cannot open the cache in .*/cache: Operation not permitted$"):
            Cache.open(settings(directory), run_dir, no_engine)  # type: ignore[arg-type]
    assert read_superblock(directory) == before
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(10))
        assert rig.fetched == []


STEPS = [
    (Directory, "write_superblock", 1),
    (Index, "begin_session", 1),
    (Maps, "stamp", 1),
    (Maps, "stamp", 2),
    (Directory, "write_superblock", 2),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[1]}-{step[2]}")
@pytest.mark.parametrize("left", ["clean", "killed", "cut"])
async def test_r8_a_kill_in_the_middle_of_an_opening(
    tmp_path: Path,
    run_dir: Path,
    step: tuple[type, str, int],
    after: bool,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However often, and whatever state it began with: nothing that was kept before is lost."""
    directory, other = tmp_path / "cache", image_bytes(4, 20)
    async with session(directory, run_dir, clean=left == "clean") as rig:
        await rig.fill(await rig.base(IMAGE, "a"), *range(20))
        await rig.fill(await rig.base(other, "b"), *range(20))
        await rig.cache.commit()
    if left == "cut":
        shutil.rmtree(run_dir / str(read_superblock(directory).uuid))
    for _ in range(3):
        with monkeypatch.context() as patch:
            kill_at(patch, *step, after)
            with pytest.raises(Killed):
                Cache.open(settings(directory), run_dir, make_engine)
        assert check_files(directory) == []
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is not StartMode.DISCARDED
        assert await rig.read(await rig.base(IMAGE, "a"), 0, 20) == IMAGE[: 20 * BLOCK_BYTES]
        assert await rig.read(await rig.base(other, "b"), 0, 20) == other
        assert rig.fetched == []


async def test_a_map_that_is_missing_costs_only_its_layer(tmp_path: Path, run_dir: Path) -> None:
    directory, other = tmp_path / "cache", image_bytes(4, 20)
    async with session(directory, run_dir, clean=False) as rig:
        layer = await rig.base(IMAGE, "a")
        await rig.fill(await rig.base(other, "b"), *range(10))
        await rig.cache.commit()
        await rig.fill(await rig.base(other, "b"), *range(10, 20))
        await rig.fill(layer, *range(20))
        (rig.cache.run_dir / "maps" / "2.map").unlink()
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.UNCLEAN
        assert await rig.read(await rig.base(IMAGE, "a"), 0, 20) == IMAGE[: 20 * BLOCK_BYTES]
        assert rig.fetched == []
        assert await rig.read(await rig.base(other, "b"), 0, 20) == other
        await rig.settle()
        assert [block for _, block in rig.fetched] == list(range(10, 20))


async def test_a_run_directory_of_long_ago_is_not_believed(tmp_path: Path, run_dir: Path) -> None:
    """The daemon ran elsewhere in between: the maps that it left here are older than the slots."""
    directory, other = tmp_path / "cache", image_bytes(4, 150)
    async with session(directory, run_dir / "here", clean=False) as rig:
        await rig.fill(await rig.base(IMAGE), *range(100))
    async with session(directory, run_dir / "elsewhere", clean=False) as rig:
        await rig.fill(await rig.base(other, "b"), *range(150))
        await rig.cache.commit()
    async with session(directory, run_dir / "here") as rig:
        assert rig.cache.start_mode is StartMode.UNCLEAN
        assert await rig.read(await rig.base(IMAGE), 0, 100) == IMAGE[: 100 * BLOCK_BYTES]
        await rig.settle()
        assert len(rig.fetched) == 100
        assert await rig.read(await rig.base(other, "b"), 0, 150) == other
        assert len(rig.fetched) == 100


async def test_a_layer_whose_maker_gives_up_keeps_its_number(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next image could get it, while the record of the first one is on its way to the index."""
    begun, may_end, put = threading.Event(), threading.Event(), Index.put_layer

    def slow(self: Index, record: LayerRecord) -> None:
        begun.set()
        assert may_end.wait(TIMEOUT_S)
        put(self, record)

    async with session(tmp_path / "cache", run_dir) as rig:
        monkeypatch.setattr(Index, "put_layer", slow)
        first = asyncio.create_task(rig.cache.base_layer("http://h/a", 1 << 20, "1"))
        await asyncio.to_thread(begun.wait, TIMEOUT_S)
        first.cancel()
        second = asyncio.create_task(rig.cache.base_layer("http://h/b", 1 << 20, "1"))
        await asyncio.wait([first], timeout=0.1)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert rig.cache.identities_of("http://h/a") == [("http://h/a", 1 << 20, "1")]
        layer = await rig.cache.base_layer("http://h/a", 1 << 20, "1")
        assert layer.layer_id != (await second).layer_id


async def test_the_end(tmp_path: Path, run_dir: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    rig = await CacheRig.open(tmp_path / "cache", run_dir)
    await rig.fill(await rig.base(IMAGE), *range(3))
    await rig.end(clean=True)
    await rig.cache.close()  # a second time is nothing
    for late in (rig.cache.commit, lambda: rig.cache.base_layer("http://h/a", 1 << 20, "1")):
        with pytest.raises(CacheError, match="closed"):
            await late()
    assert len(os.listdir("/proc/self/fd")) == descriptors
