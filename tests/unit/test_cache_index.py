"""The index on real files: what is in it is what was put in, and no damage gets past the opening."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from uuid import UUID

import pytest

from tests.cache_rig import mounted
from tierblk.cache import index as index_module
from tierblk.cache.index import Index, create_index, open_index
from tierblk.cache.layers import LayerRecord
from tierblk.cache.rows import Entry, pack_row
from tierblk.errors import CacheError

UUID_ = UUID(int=0xC0FFEE)
SLOTS = 256


def record(layer_id: int, url: str = "http://images.example/a.raw", kind: str = "base") -> LayerRecord:
    return LayerRecord(layer_id, kind, url, 10 << 20, 'etag:"1"', used_unix_s=1_795_000_000)


def row(number: int) -> bytes:
    return pack_row([Entry(slot=number % 200 + 1, cached=number & 0xFFFF)])


@contextmanager
def opened(path: Path, uuid: UUID = UUID_) -> Iterator[Index]:
    index = open_index(path, uuid, SLOTS)
    try:
        yield index
    finally:
        index.close()


def refused(path: Path) -> str:
    with pytest.raises(CacheError) as caught, opened(path) as index:
        list(index.layers())
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A new index, closed."""
    create_index(tmp_path / "index", UUID_, SLOTS)
    return tmp_path / "index"


def test_a_new_index(path: Path) -> None:
    with opened(path) as index:
        meta = index.meta()
        assert (meta.uuid, meta.session, meta.clean) == (UUID_, 0, True)
        assert index.layers() == []
        assert list(index.rows(1)) == []
    assert os.stat(path / "data.mdb").st_mode & 0o777 == 0o600


def test_a_change_is_durable_when_it_returns(path: Path) -> None:
    """Without a power cut only LMDB's own word says so: it syncs pages and header in every transaction."""
    with opened(path) as index:
        flags = index._env.flags()
        assert (flags["sync"], flags["metasync"], flags["writemap"]) == (True, True, False)


def test_layers_and_rows_come_back_in_order(path: Path) -> None:
    layers = [record(1), record(2, "http://images.example/b.raw"), record(0x102)]
    rows = {1: {5: row(5), 0: row(0), 2**40: row(1)}, 2: {7: row(7)}, 0x102: {0: row(3)}}
    with opened(path) as index:
        for layer in reversed(layers):
            index.put_layer(layer)
        assert index.write_rows({layer_id: list(copies.items()) for layer_id, copies in rows.items()}) == (
            5,
            0,
        )
    with opened(path) as index:
        assert index.layers() == layers
        for layer_id, copies in rows.items():
            assert list(index.rows(layer_id)) == sorted(copies.items())
        assert list(index.rows(3)) == []


def test_rows_are_replaced_and_deleted(path: Path) -> None:
    with opened(path) as index:
        index.write_rows({1: [(number, row(number)) for number in range(500)]})
        assert index.write_rows({1: [(3, row(77)), (4, b""), (1000, b"")]}) == (1, 2)
        found = dict(index.rows(1))
    assert found == {number: row(number) for number in range(500) if number not in (3, 4)} | {3: row(77)}


def test_a_session_begins_and_ends(path: Path) -> None:
    with opened(path) as index:
        index.put_layer(record(1))
        index.put_layer(record(2))
        index.write_rows({1: [(0, row(0)), (1, row(1))]})
        index.begin_session(7, forget_layers=[2], drop_rows=[(1, 1), (1, 99)])
        assert index.meta() == index_module.Meta(UUID_, 7, clean=False, journaled=0)
        assert index.layers() == [record(1)]
        assert list(index.rows(1)) == [(0, row(0))]
        index.mark_clean(7)
    with opened(path) as index:
        assert index.meta() == index_module.Meta(UUID_, 7, clean=True, journaled=0)
        index.begin_session(8, discard=True)
        assert index.layers() == []
        assert list(index.rows(1)) == []
        assert index.meta() == index_module.Meta(UUID_, 8, clean=False, journaled=0)


def test_a_change_that_fails_half_way_changes_nothing(path: Path) -> None:
    with opened(path) as index:
        index.put_layer(record(1))

        def change() -> None:
            with index.changing(rows=1) as txn:
                index.put_session(txn, session=9, clean=True)
                txn.put(b"k" * 1000, b"v", db=index.meta_db)  # no key of LMDB is that long

        with pytest.raises(CacheError, match="could not be changed"):
            change()
        assert index.meta() == index_module.Meta(UUID_, 0, clean=True, journaled=0)
        index.begin_session(1)


def test_the_index_of_another_cache(path: Path) -> None:
    with pytest.raises(CacheError, match="belongs to another cache"), opened(path, UUID(int=1)):
        pass


def test_a_newer_index(path: Path) -> None:
    with opened(path) as index, index.changing(rows=0) as txn:
        txn.put(b"format", (3).to_bytes(4, "little"), db=index.meta_db)
    assert "was made by a newer tierblk: its format is 3, this version knows 2" in refused(path)


def test_a_missing_index(path: Path) -> None:
    shutil.rmtree(path)
    assert refused(path) == f"the cache's index is missing: there is no {path}/data.mdb"


@pytest.mark.parametrize("key", [b"format", b"uuid", b"session", b"clean"])
def test_a_header_with_a_hole(path: Path, key: bytes) -> None:
    with opened(path) as index, index.changing(rows=0) as txn:
        txn.delete(key, db=index.meta_db)
    assert "is damaged: it has no header" in refused(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"\0\0\0\1", b"{"),
        (b"\0\0\0\1", b"[]"),
        (b"\0\0\0\1", b"{}"),
        (b"\0\0\0\1", b"\xff"),
        (b"\0\0\0\1", b'{"kind":"base","url":"u","size_bytes":"1","validator":"v","used_unix_s":1}'),
        (b"\0\0\0\1", b'{"kind":"base","url":"u","size_bytes":0,"validator":"v","used_unix_s":1}'),
        (b"\0\0\0\1", b'{"kind":7,"url":"u","size_bytes":1,"validator":"v","used_unix_s":1}'),
        (
            b"\0\0\0\1",
            b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1,"pins":[[2,1]]}',
        ),
        (
            b"\0\0\0\1",
            b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1,"pins":[[0,2],[2,3]]}',
        ),
        (
            b"\0\0\0\1",
            b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1,"pins":[1]}',
        ),
        (
            b"\0\0\0\1",
            b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1,"pins":7}',
        ),
        (
            b"\0\0\0\1",
            b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1,"pins":[["0",2]]}',
        ),
        (b"\0\0\0\0", b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1}'),
        (b"\0\1\0\0", b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1}'),
        (b"\0", b'{"kind":"base","url":"u","size_bytes":1,"validator":"v","used_unix_s":1}'),
    ],
)
def test_a_layer_record_that_cannot_be_read(path: Path, key: bytes, value: bytes) -> None:
    with opened(path) as index, index.changing(rows=1) as txn:
        txn.put(key, value, db=index._layers_db)
    assert "is damaged: the record of a layer cannot be read" in refused(path)


def filled(path: Path) -> Path:
    """An index of several levels, written in many transactions, so that it has free pages too."""
    with opened(path) as index:
        for layer_id in range(1, 6):
            index.put_layer(record(layer_id, f"http://images.example/{layer_id}.raw"))
        for start in range(20):
            index.write_rows({1: [(number * 20 + start, row(number)) for number in range(100)]})
    return path / "data.mdb"


def test_a_truncated_index_is_refused(path: Path) -> None:
    """liblmdb itself would be ended by SIGBUS, or by an assertion when zeros are there instead."""
    data = filled(path)
    whole = data.read_bytes()
    with opened(path) as index, index._env.begin() as txn:
        used = (index._env.info()["last_pgno"] + 1) * txn.stat(index._rows_db)["psize"]
    # The last pages may be free ones; from the middle on something is always missed.
    for length in (0, 1, 100, 4095, 4096, 8191, 8192, 8292, used // 3, used // 2 + 100):
        data.write_bytes(whole[:length])
        assert f"index {data} is damaged: " in refused(path)
        os.truncate(data, len(whole))
        assert f"index {data} is damaged: " in refused(path)
    data.write_bytes(whole)
    with opened(path) as index:
        assert len(list(index.rows(1))) == 2000


def test_random_damage_never_does_more_than_be_refused(path: Path) -> None:
    """Whatever byte is hit: the index is refused, or read without harm (a row that changed has a bad sum)."""
    data = filled(path)
    whole = data.read_bytes()
    dice = random.Random(20)
    refusals = 0
    for _ in range(60):
        damaged = bytearray(whole)
        at = dice.randrange(2_000_000) % len(whole)
        damaged[at : at + 8] = dice.randbytes(8)
        data.write_bytes(damaged)
        try:
            with opened(path) as index:
                index.layers()
                list(index.rows(1))
                index.write_rows({1: [(5, row(5))]})
        except CacheError:
            refusals += 1
    assert refusals > 0


def test_it_cannot_be_opened_twice_in_a_process(path: Path) -> None:
    with opened(path):
        assert "could not be opened" in refused(path)


def test_a_read_only_place(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "ro") as disk, pytest.raises(OSError, match="Read-only"):
        create_index(disk / "index", UUID_, SLOTS)


def test_a_full_disk_is_met_before_the_commit_and_forgotten_when_there_is_room(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=8m") as disk:
        create_index(disk / "index", UUID_, SLOTS)
        with opened(disk / "index") as index:
            index.write_rows({1: [(0, row(0))]})
            filler = disk / "filler"
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * 4096)
            copies = {1: [(number, row(number)) for number in range(3000)]}
            with pytest.raises(CacheError, match=r"cannot grow: its disk is full, 0 B are free"):
                index.write_rows(copies)
            assert list(index.rows(1)) == [(0, row(0))]
            assert index.broken is None
            filler.unlink()
            assert index.write_rows(copies) == (3000, 0)
        with opened(disk / "index") as index:
            assert len(list(index.rows(1))) == 3000


def test_r7_a_commit_that_failed_is_never_tried_again(path: Path) -> None:
    """The disk refuses a write of LMDB itself: the file stays as it was, and no change is taken any more."""
    with opened(path) as index:
        index.write_rows({1: [(0, row(0))]})
        read_only = os.open(path / "data.mdb", os.O_RDONLY)
        saved = {}
        try:
            for name in os.listdir("/proc/self/fd"):
                link = Path("/proc/self/fd") / name
                if link.exists() and link.samefile(path / "data.mdb") and int(name) != read_only:
                    saved[int(name)] = os.dup(int(name))
                    os.dup2(read_only, int(name), inheritable=False)
            assert saved
            with pytest.raises(CacheError, match="nothing more is recorded until the daemon is restarted"):
                index.write_rows({1: [(1, row(1))]})
        finally:
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor, inheritable=False)
                os.close(copy)
            os.close(read_only)
        assert index.broken is not None
        for change in (lambda: index.write_rows({1: [(2, row(2))]}), lambda: index.mark_clean(1)):
            with pytest.raises(CacheError, match="nothing more is recorded"):
                change()
        assert list(index.rows(1)) == [(0, row(0))]  # reads go on
    with opened(path) as index:
        assert list(index.rows(1)) == [(0, row(0))]
        index.write_rows({1: [(1, row(1))]})


def test_the_map_grows_with_the_index(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that say only zero need no slot, so the number of slots does not bound the index."""
    monkeypatch.setattr(index_module, "map_size_bytes", lambda slot_count: 1 << 20)
    with opened(path) as index:
        for start in range(0, 4000, 400):
            index.write_rows({1: [(number, row(number)) for number in range(start, start + 400)]})
        assert len(list(index.rows(1))) == 4000
    with opened(path) as index:  # a map that is smaller than the file is made as large as it
        assert len(list(index.rows(1))) == 4000
        index.write_rows({1: [(number, row(number)) for number in range(4000, 8000)]})


def test_a_map_that_is_full_is_larger_the_next_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a transaction ever need more than was reckoned: it fails as a whole, and then there is room."""
    monkeypatch.setattr(index_module, "map_size_bytes", lambda slot_count: 1 << 20)
    copies = {1: [(number, row(number)) for number in range(1000)]}
    with opened(path) as index:
        room = index._room
        monkeypatch.setattr(index, "_room", lambda rows, *_: (room(0)[0], 0))
        with pytest.raises(CacheError) as caught:
            index.write_rows(copies)
        assert caught.value.message == f"the cache's index {path} is full"
        assert list(index.rows(1)) == []
        assert index.broken is None
        assert index.write_rows(copies) == (1000, 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_file_grows_as_far_as_it_is_needed(path: Path, seed: int) -> None:
    """No transaction adds more than was reckoned for it, and what it did not need is given back."""
    dice = random.Random(seed)
    live: set[int] = set()
    with opened(path) as index:
        for _ in range(25):
            what, count = dice.choice(["new", "run", "again", "delete"]), dice.choice([1, 20, 300, 4000])
            start = dice.randrange(10**6)
            rows = {
                "new": {dice.randrange(10**6) for _ in range(count)},
                "run": set(range(start, start + count)),
            }.get(what) or set(dice.sample(sorted(live), min(count, len(live))))
            used_bytes, more_bytes = index._room(len(rows))
            index.write_rows({1: [(number, b"" if what == "delete" else row(number)) for number in rows]})
            live = live - rows if what == "delete" else live | rows
            now_bytes, _ = index._room(0)
            assert now_bytes <= used_bytes + more_bytes
            size_bytes = (path / "data.mdb").stat().st_size
            assert now_bytes + (512 << 10) <= size_bytes <= now_bytes + (3 << 20)
        assert {number for number, _ in index.rows(1)} == live


def test_a_large_commit_costs_what_it_holds(path: Path) -> None:
    with opened(path) as index:
        for _ in range(3):
            index.write_rows({1: [(number, row(number)) for number in range(20_000)]})
        pages = index._env.begin().stat(index._rows_db)["leaf_pages"]
    # The tree, its copy of the last transaction and that of the one before, which nobody can read any more.
    assert (path / "data.mdb").stat().st_size < 3 * pages * 4096 + (4 << 20)


def test_a_disk_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's fault is not called damage: nobody should remove a cache for a loose cable."""

    def verify(data: str) -> None:
        raise OSError(EIO, os.strerror(EIO))

    monkeypatch.setattr("lmdb.verify.verify", verify)
    assert refused(path) == f"the cache's index {path}/data.mdb cannot be read: Input/output error"


def test_r7_a_write_beyond_the_limit_of_files_is_the_last(path: Path) -> None:
    """A real refusal by the kernel in the middle of LMDB's commit: nothing of it is there, reads go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as index:
        index.write_rows({1: [(0, row(0))]})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 4096, hard))
        try:
            with pytest.raises(CacheError, match="nothing more is recorded until the daemon is restarted"):
                index.write_rows({1: [(number, row(number)) for number in range(50)]})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(CacheError, match="nothing more is recorded"):
            index.write_rows({1: [(1, row(1))]})
        assert list(index.rows(1)) == [(0, row(0))]
    with opened(path) as index:
        assert list(index.rows(1)) == [(0, row(0))]
        index.write_rows({1: [(1, row(1))]})
