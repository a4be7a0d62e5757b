"""Volumes whose directory was damaged, restored in part or filled; how they are made, found and dropped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from uuid import UUID

import pytest

from tests.cache_rig import changed_index, check_files, mounted, run_directory
from tests.integration.test_cache_failing_disk import ext4_on_loop
from tests.property.host import Host
from tests.property.volume_daemon import NAME, TIMEOUT_S, URL, VolumeDaemon
from tests.property.volume_world import SECTOR
from tierblk.cache import journal
from tierblk.core import BLOCK_BYTES
from tierblk.errors import CacheError
from tierblk.units import MIB

SLOTS = 300
IMAGE = bytes(range(1, 251)) * (130 * BLOCK_BYTES // 250)
IMAGE = IMAGE[: len(IMAGE) // SECTOR * SECTOR]
SIZE_BYTES = 140 * BLOCK_BYTES
MARK = b"\xee" * BLOCK_BYTES
BLANK_MAP_BLOCKS = 8
"""Of 512 bytes: the header's page."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with run_directory(tmp_path) as memory:
        yield Host(tmp_path, memory)


def opened(host: Host, size_bytes: int = SIZE_BYTES) -> VolumeDaemon:
    return VolumeDaemon(host, SLOTS, IMAGE, size_bytes)


def damage_row(host: Host, row: int) -> None:
    """One of the volume's rows gets a bit wrong."""
    with changed_index(host.directory) as index:
        (layer_id,) = (record.layer_id for record in index.layers() if record.is_volume)
        damaged = bytearray(dict(index.rows(layer_id))[row])
        damaged[4] ^= 1
        index.write_rows({layer_id: [(row, bytes(damaged))]})


def test_r9_a_damaged_row_of_a_volume_is_an_error_and_never_the_base(host: Host) -> None:
    daemon = opened(host)
    for block in (0, 70):
        daemon.door.write(block * BLOCK_BYTES, MARK)
    daemon.stop(clean=True)
    damage_row(host, 1)
    daemon = opened(host)
    assert daemon.door.read(0, BLOCK_BYTES) == MARK, "row 0 is whole"
    assert daemon.door.read(30 * BLOCK_BYTES, BLOCK_BYTES) == IMAGE[30 * BLOCK_BYTES : 31 * BLOCK_BYTES]
    for block in (64, 70, 127):  # what was never written cannot be told from what was
        with pytest.raises(OSError, match="Input/output error"):
            daemon.door.read(block * BLOCK_BYTES, SECTOR)
        with pytest.raises(OSError, match="Input/output error"):
            daemon.door.write(block * BLOCK_BYTES, MARK[:SECTOR])
    daemon.door.write(70 * BLOCK_BYTES, MARK)
    daemon.door.discard(71 * BLOCK_BYTES, BLOCK_BYTES)
    daemon.door.flush()
    daemon.stop(clean=False)
    shutil.rmtree(host.run_dir)  # the machine was started anew
    daemon = opened(host)
    assert daemon.door.read(70 * BLOCK_BYTES, BLOCK_BYTES) == MARK
    assert daemon.door.read(71 * BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)
    with pytest.raises(OSError, match="Input/output error"):
        daemon.door.read(72 * BLOCK_BYTES, SECTOR)
    daemon.stop(clean=True)


def test_r8_an_index_older_than_the_slots_loses_no_volume_silently(host: Host, tmp_path: Path) -> None:
    daemon = opened(host)
    daemon.door.write(0, MARK)
    daemon.stop(clean=True)
    shutil.copytree(host.directory / "index", tmp_path / "backup")
    daemon = opened(host)
    daemon.door.write(0, MARK[::-1])
    daemon.stop(clean=True)
    index = host.directory / "index"
    shutil.rmtree(index)
    shutil.copytree(tmp_path / "backup", index)
    before = {path: path.read_bytes() for path in sorted(host.directory.rglob("*")) if path.is_file()}
    with pytest.raises(
        CacheError, match=f"older than the slots beside it and names the local volumes {NAME}"
    ):
        opened(host)
    after = {path: path.read_bytes() for path in sorted(host.directory.rglob("*")) if path.is_file()}
    del before[index / "lock.mdb"], after[index / "lock.mdb"]
    assert after == before, "nothing was touched"


def test_a_volume_is_found_by_its_name_and_refused_when_it_is_another(host: Host) -> None:
    daemon = opened(host)
    cache, over = daemon.cache, (URL, len(IMAGE), '"v1"')
    assert daemon.run(cache.volume_layer(NAME, "local", SIZE_BYTES, over)) is daemon.volume
    for wanted, why in [
        ((NAME, "scratch", SIZE_BYTES, over), "it is a local one"),
        ((NAME, "local", SIZE_BYTES + SECTOR, over), "it has"),
        ((NAME, "local", SIZE_BYTES, (URL, len(IMAGE), '"v2"')), "or another version of it"),
        ((NAME, "local", SIZE_BYTES, None), "or another version of it"),
    ]:
        with pytest.raises(CacheError, match=why):
            daemon.run(cache.volume_layer(*wanted))
    daemon.stop(clean=True)


def test_a_dropped_volume_leaves_nothing_and_its_map_is_used_again(host: Host) -> None:
    daemon = opened(host)
    cache = daemon.cache
    free = daemon.engine.free_slots()
    for _ in range(3):
        layer = daemon.run(cache.volume_layer("short", "scratch", SIZE_BYTES, None))
        door = type(daemon.door)(daemon.engine, None, volume=layer)
        assert door.read(0, SIZE_BYTES) == bytes(SIZE_BYTES)
        door.write(5 * BLOCK_BYTES, MARK * 20)
        door.discard(6 * BLOCK_BYTES, BLOCK_BYTES)
        door.flush()
        door.write(8 * BLOCK_BYTES, MARK, fua=True)
        assert door.stats()["flush_commits"] == 0, "nothing of it need be durable"
        door.drain()
        door.quit()
        door.close()
        map_file = host.run_dir / str(cache.uuid) / "maps" / f"{layer.layer_id}.map"
        assert map_file.stat().st_blocks > BLANK_MAP_BLOCKS
        daemon.run(cache.drop_volume("short"))
        assert map_file.stat().st_blocks <= BLANK_MAP_BLOCKS, "its memory is given back"
        assert cache.volume("short") is None
    assert len(daemon.engine.layers) == 3, "base, volume, and one for all that came and went"
    daemon.run(cache.commit())
    assert daemon.engine.free_slots() == free
    assert daemon.check() == []
    daemon.stop(clean=True)
    assert check_files(host.directory) == []


def test_a_scratch_volume_outlives_a_kill_and_a_hand_over_but_no_power_cut(host: Host) -> None:
    for end in ("kill", "hand-over", "cut"):
        daemon = opened(host)
        layer = daemon.run(daemon.cache.volume_layer("short", "scratch", SIZE_BYTES, None))
        door = type(daemon.door)(daemon.engine, None, volume=layer)
        if end == "hand-over":
            assert door.read(0, BLOCK_BYTES) == MARK, "the kill has left it"
        door.write(0, MARK)
        door.flush()
        door.drain()
        door.quit()
        door.close()
        daemon.stop(clean=end == "hand-over")
        if end == "cut":
            shutil.rmtree(host.run_dir)
    daemon = opened(host)
    assert daemon.cache.volume("short") is None
    assert daemon.check() == []
    daemon.stop(clean=True)


def test_a_flush_finds_no_room_in_the_journal(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that copies on write may have none for what was there before: commits take its place."""
    begin = journal.begin

    def begun(path: Path, uuid: UUID, session: int) -> int:
        os.close(begin(path, uuid, session))
        return os.open("/dev/full", os.O_RDWR)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "begin", begun)
        daemon = opened(host)
    for block in range(3):
        daemon.door.write(block * BLOCK_BYTES, MARK)
        daemon.door.flush()
    daemon.door.write(3 * BLOCK_BYTES, MARK, fua=True)
    stats = daemon.door.stats()
    assert (stats["flush_records"], stats["flush_commits"]) == (1, 4)
    assert daemon.upkeep.trouble is None
    daemon.stop(clean=True)


def test_a_flush_that_fails_is_told_and_so_are_later_ones(host: Host) -> None:
    """R7. (A record that fails: tests/unit/test_core_journal.py.)"""
    daemon = opened(host)
    daemon.door.write(0, MARK)
    cycle = daemon.begin_commit(failing="slots")
    with pytest.raises(CacheError, match="could not be synced"):
        cycle.result(TIMEOUT_S)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            daemon.door.flush()
    with pytest.raises(OSError, match="Input/output error"):
        daemon.door.write(0, MARK, fua=True)
    daemon.door.write(0, MARK)  # what nobody asks to be durable goes on
    assert daemon.upkeep.trouble is not None
    daemon.stop(clean=False)


def test_a_disk_that_fails_is_an_error_of_the_writer_and_what_was_kept_is_read(tmp_path: Path) -> None:
    """A real one, under a real filesystem. A write that failed may be made again when the disk is well."""
    with (
        run_directory(tmp_path) as run_memory,
        mounted("tmpfs", tmp_path / "memory", "size=80m") as memory,
        ext4_on_loop(tmp_path / "disk", memory, 128 * MIB) as disk,
    ):
        host = Host(disk, run_memory)
        daemon = VolumeDaemon(host, SLOTS, b"", SIZE_BYTES)
        for block in range(20):
            daemon.door.write(block * BLOCK_BYTES, MARK)
        daemon.door.flush()
        with (memory / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, os.statvfs(memory).f_bavail * 4096)
        failed = []
        for block in range(20, 120):
            try:
                daemon.door.write(block * BLOCK_BYTES, MARK[::-1])
            except OSError as error:
                if error.errno not in (EIO, ENOSPC):
                    raise
                failed.append(block)
        assert failed
        for block in range(20):
            assert daemon.door.read(block * BLOCK_BYTES, BLOCK_BYTES) == MARK
        for block in set(range(20, 120)) - set(failed):
            assert daemon.door.read(block * BLOCK_BYTES, BLOCK_BYTES) == MARK[::-1]
        for block in failed:
            assert daemon.door.read(block * BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES), "as it was"
        assert daemon.check() == []
        (memory / "filler").unlink()
        for block in failed:
            daemon.door.write(block * BLOCK_BYTES, MARK)
            assert daemon.door.read(block * BLOCK_BYTES, BLOCK_BYTES) == MARK
        daemon.stop(clean=False)
