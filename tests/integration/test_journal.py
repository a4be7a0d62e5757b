"""The journal, written by the C core and read by an opening: what a FLUSH has made durable without a commit,
and what becomes of it when the journal is damaged, missing, of another time, or full."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path

import pytest

from tests.cache_rig import changed_index, read_superblock, run_directory
from tests.property.host import Host
from tests.property.volume_daemon import TIMEOUT_S, VolumeDaemon
from tierblk.cache import journal
from tierblk.cache.directory import JOURNAL
from tierblk.cache.index import Index
from tierblk.cache.room import VolumesLoad
from tierblk.cache.verify import verify
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, PAGE_BYTES
from tierblk.errors import CacheError

SLOTS = 400
BLOCKS = 360
SIZE_BYTES = BLOCKS * BLOCK_BYTES
ROWS = -(-BLOCKS // ENTRIES_PER_ROW)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with run_directory(tmp_path) as memory:
        yield Host(tmp_path, memory)


def opened(host: Host, blocks: int = BLOCKS) -> VolumeDaemon:
    return VolumeDaemon(host, SLOTS, b"", blocks * BLOCK_BYTES)


def page(n: int) -> bytes:
    return n.to_bytes(4, "little") * (PAGE_BYTES // 4)


def write(daemon: VolumeDaemon, n: int, block: int | None = None) -> None:
    daemon.door.write((n if block is None else block) * BLOCK_BYTES, page(n))


def cut(host: Host, daemon: VolumeDaemon) -> Path:
    """As a power cut that lost nothing which had been written: only the maps are gone. The directory."""
    index = host.directory / "index"
    shutil.copytree(index, host.disk / "index")
    shutil.copy(host.directory / JOURNAL, host.disk / JOURNAL)
    daemon.stop(clean=False)
    shutil.rmtree(index)
    (host.disk / "index").rename(index)
    (host.disk / JOURNAL).rename(host.directory / JOURNAL)
    shutil.rmtree(host.run_dir)
    return host.directory


def flushed_blocks(host: Host, count: int) -> Path:
    """A directory after a power cut, with that many blocks flushed one by one, none of them in the index."""
    daemon = opened(host)
    for n in range(count):
        write(daemon, n)
        daemon.door.flush()
    stats = daemon.door.stats()
    assert (stats["flush_records"], stats["flush_commits"]) == (count, 0)
    assert dict(daemon.cache._index.rows(1)) == {}
    return cut(host, daemon)


def records(directory: Path) -> list[tuple[int, int, int, list[tuple[int, int, bytes]]]]:
    return list(journal.records((directory / JOURNAL).read_bytes()))


def test_what_was_flushed_is_in_the_journal_and_what_was_not_is_not(host: Host) -> None:
    """R7: no commit, and no row that no FLUSH asked for."""
    daemon = opened(host)
    write(daemon, 1, block=1)
    daemon.door.flush()
    write(daemon, 2, block=100)
    daemon.door.write(200 * BLOCK_BYTES, page(3), fua=True)
    write(daemon, 4, block=300)
    assert daemon.door.stats()["flush_records"] == 2
    directory = cut(host, daemon)
    assert [(seq, [row for _, row, _ in rows]) for _, _, seq, rows in records(directory)] == [
        (1, [0]),
        (2, [1, 3]),  # of the whole volume: what FUA asks for is no less than a FLUSH
    ]
    found = verify(directory, host.run_dir)
    assert found.violations == []
    assert [layer.dirty_bytes for layer in found.layers] == [3 * PAGE_BYTES]
    daemon = opened(host)
    for block, n in ((1, 1), (100, 2), (200, 3), (300, 0)):
        assert daemon.door.read(block * BLOCK_BYTES, PAGE_BYTES) == page(n), block
    daemon.stop(clean=True)


def test_a_flush_without_a_change_needs_no_record(host: Host) -> None:
    daemon = opened(host)
    for _ in range(3):
        write(daemon, 1)
        daemon.door.flush()
        daemon.door.flush()
    assert daemon.door.stats()["flush_records"] == 1
    daemon.stop(clean=True)


def test_a_commit_makes_records_old(host: Host) -> None:
    """What they say of a row is older than what the index says."""
    daemon = opened(host)
    write(daemon, 1, block=1)
    daemon.door.flush()
    daemon.door.discard(0, 2 * BLOCK_BYTES)
    daemon.begin_commit().result(TIMEOUT_S)
    directory = cut(host, daemon)
    assert len(records(directory)) == 1
    daemon = opened(host)
    assert daemon.door.read(BLOCK_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)
    assert daemon.check() == []
    daemon.stop(clean=True)


def test_a_ring_that_is_full_asks_for_commits_in_good_time(host: Host) -> None:
    """Many times around a small ring, and nothing is lost."""
    daemon = VolumeDaemon(host, SLOTS, b"", BLOCKS * BLOCK_BYTES, ring_bytes=256 << 10)
    for n in range(1000):
        write(daemon, n, block=n * 7 % BLOCKS)
        daemon.door.discard((n * 7 + 7 * 50) % BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
        daemon.door.flush()
    stats = daemon.door.stats()
    assert stats["flush_records"] + stats["flush_commits"] >= 1000
    assert stats["flush_records"] > 500, stats
    kept = {n * 7 % BLOCKS: n for n in range(1000 - BLOCKS + 50, 1000)}
    cut(host, daemon)
    daemon = opened(host)
    for block in range(BLOCKS):
        found = daemon.door.read(block * BLOCK_BYTES, PAGE_BYTES)
        assert found == (page(kept[block]) if block in kept else bytes(PAGE_BYTES)), block
    assert daemon.check() == []
    daemon.stop(clean=True)


def test_more_rows_than_a_record_holds_are_a_commit(host: Host) -> None:
    blocks = 200 * ENTRIES_PER_ROW
    daemon = opened(host, blocks)
    for row in range(200):
        write(daemon, row, block=row * ENTRIES_PER_ROW)
    daemon.door.flush()
    stats = daemon.door.stats()
    assert (stats["flush_records"], stats["flush_commits"]) == (0, 1)
    daemon.stop(clean=True)


def test_flushes_that_come_together_share_records(host: Host) -> None:
    """From many threads, each of which finds its own write after a power cut."""
    daemon = opened(host)
    begun = threading.Barrier(6)

    def work(first: int) -> None:
        begun.wait(TIMEOUT_S)
        for n in range(first, BLOCKS, 6):
            write(daemon, n)
            daemon.door.flush()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    stats = daemon.door.stats()
    assert stats["flush_records"] < BLOCKS, stats
    cut(host, daemon)
    daemon = opened(host)
    for n in range(BLOCKS):
        assert daemon.door.read(n * BLOCK_BYTES, PAGE_BYTES) == page(n), n
    daemon.stop(clean=True)


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def test_a_last_record_in_part_is_no_record(host: Host) -> None:
    """A power cut tore it, and so its FLUSH was never answered."""
    directory = flushed_blocks(host, 3)
    at = records(directory)[-1][0]
    damage(directory / JOURNAL, at + 600)
    assert verify(directory, host.run_dir).violations == []
    daemon = opened(host)
    assert [daemon.door.read(n * BLOCK_BYTES, PAGE_BYTES) for n in range(3)] == [page(0), page(1), page(0)]
    daemon.stop(clean=True)


@pytest.mark.parametrize("what", ["a record", "the header", "missing", "another time's"])
def test_a_damaged_journal_is_refused_and_nothing_is_changed(host: Host, what: str) -> None:
    """What it held was promised to be kept: an old page must not pass for it."""
    daemon = opened(host)
    older = (host.directory / JOURNAL).read_bytes()
    daemon.stop(clean=True)
    directory = flushed_blocks(host, 3)
    path = directory / JOURNAL
    if what == "a record":
        damage(path, records(directory)[1][0] + 100)
        expected = "is damaged: record 2 of 3 is"
    elif what == "the header":
        damage(path, 20)
        expected = "is damaged: its header is"
    elif what == "missing":
        path.unlink()
        expected = "is missing"
    else:
        path.write_bytes(older)
        expected = "is of session 1, and the index of 2"
    before = {
        file: file.read_bytes() for file in directory.rglob("*") if file.is_file() and file.name != "lock.mdb"
    }
    for _ in range(2):
        with pytest.raises(CacheError, match=expected) as caught:
            opened(host)
        assert "what was flushed last to vol may be in it" in str(caught.value)
        assert caught.value.hint == f"to go on without it: truncate -s 0 {path}"
    assert [violation.invariant for violation in verify(directory, host.run_dir).violations] == ["R7"]
    assert {file: file.read_bytes() for file in before} == before
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    daemon = opened(host)
    assert daemon.door.read(0, PAGE_BYTES) == bytes(PAGE_BYTES)
    write(daemon, 5)
    daemon.door.flush()
    cut(host, daemon)
    daemon = opened(host)
    assert daemon.door.read(5 * BLOCK_BYTES, PAGE_BYTES) == page(5)
    daemon.stop(clean=True)


def test_records_of_another_life_are_not_taken(host: Host) -> None:
    """All but the journal is put back as it was, and a session of the same number begins: the records of the
    one that was lost are not its own."""
    daemon = opened(host)
    write(daemon, 1, block=0)
    daemon.stop(clean=True)
    backup = host.disk / "backup"
    shutil.copytree(host.directory, backup, ignore=shutil.ignore_patterns(JOURNAL))
    daemon = opened(host)
    for n in range(6):
        write(daemon, n, block=100 + n)
        daemon.door.flush()
    daemon.door.discard(0, BLOCK_BYTES)
    daemon.door.flush()
    daemon.stop(clean=True)
    kept = (host.directory / JOURNAL).read_bytes()
    shutil.rmtree(host.directory)
    shutil.copytree(backup, host.directory)
    (host.directory / JOURNAL).write_bytes(kept)
    daemon = opened(host)
    write(daemon, 9, block=200)
    daemon.door.flush()
    cut(host, daemon)
    assert verify(host.directory, host.run_dir).violations == []
    daemon = opened(host)
    for block, n in ((0, 1), (100, 0), (105, 0), (200, 9)):
        assert daemon.door.read(block * BLOCK_BYTES, PAGE_BYTES) == page(n), block
    daemon.stop(clean=True)


def test_a_journal_that_was_made_and_never_used_adds_nothing(host: Host) -> None:
    """As after a crash in the middle of an opening that had to make one."""
    daemon = opened(host)
    write(daemon, 1)
    daemon.begin_commit().result(TIMEOUT_S)
    directory = cut(host, daemon)
    size_bytes = (directory / JOURNAL).stat().st_size
    (directory / JOURNAL).write_bytes(bytes(size_bytes))
    daemon = opened(host)
    assert daemon.door.read(BLOCK_BYTES, PAGE_BYTES) == page(1)
    daemon.stop(clean=True)


def test_a_full_disk_takes_the_records_in_pieces(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = opened(host, blocks := 100 * ENTRIES_PER_ROW)
    for row in range(100):
        write(daemon, row, block=row * ENTRIES_PER_ROW)
        daemon.door.flush()
    cut(host, daemon)
    grow = Index._grow
    asked = []

    def full(index: Index, rows: int, load: VolumesLoad) -> None:
        asked.append(rows)
        if rows > 16:
            raise CacheError("the cache's index cannot grow: its disk is full")
        grow(index, rows, load)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "_grow", full)
        daemon = opened(host, blocks)
    assert asked[0] == 100
    for row in range(100):
        assert daemon.door.read(row * ENTRIES_PER_ROW * BLOCK_BYTES, PAGE_BYTES) == page(row)
    daemon.stop(clean=True)


def test_no_room_for_a_journal_leaves_the_directory_as_it_was(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a version without one, which can still open it."""
    daemon = opened(host)
    write(daemon, 1)
    daemon.stop(clean=True)
    (host.directory / JOURNAL).unlink()
    before = read_superblock(host.directory)

    def full(path: Path) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_create", full)
        with pytest.raises(CacheError, match="No space left"):
            opened(host)
    assert read_superblock(host.directory) == before
    daemon = opened(host)
    assert daemon.door.read(BLOCK_BYTES, PAGE_BYTES) == page(1)
    daemon.stop(clean=True)


def test_a_directory_of_a_version_without_a_journal(host: Host) -> None:
    """Its unclean start takes the index for what it is, and makes a journal."""
    daemon = opened(host)
    write(daemon, 1)
    daemon.begin_commit().result(TIMEOUT_S)
    directory = cut(host, daemon)
    (directory / JOURNAL).unlink()
    with changed_index(directory) as index, index.changing(rows=0) as txn:
        txn.delete(b"journal", db=index.meta_db)
        txn.put(b"format", (1).to_bytes(4, "little"), db=index.meta_db)
    daemon = opened(host)
    assert daemon.door.read(BLOCK_BYTES, PAGE_BYTES) == page(1)
    assert (directory / JOURNAL).exists()
    daemon.stop(clean=True)


def test_a_kill_in_the_middle_of_flushes_and_then_a_cut(host: Host) -> None:
    """R8: after the kill the maps are the truth, but a slot that only the journal names must not be given
    away before it is forgotten there."""
    daemon = opened(host)
    write(daemon, 1, block=0)
    daemon.door.flush()
    daemon.door.discard(0, BLOCK_BYTES)
    old = daemon
    boot = host.boot
    host.crash(kill=True)
    host.boot = boot
    old.stop(clean=False)
    host.boot = boot + 1
    daemon = opened(host)
    named = dict(daemon.cache._index.rows(1))
    assert len(named) == 1, "the record is in the index now"
    assert daemon.engine.stats()["quarantined"] == 1
    daemon.stop(clean=True)
