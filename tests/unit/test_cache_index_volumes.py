"""What the index keeps of volumes in object storage beside rows: in the same transaction, or not at all."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cache_index import SLOTS, UUID_, opened, record, row
from tierblk.cache import index as index_module
from tierblk.cache.index import create_index, open_index
from tierblk.cache.layers import VolumeChange
from tierblk.errors import CacheError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A new index, closed."""
    create_index(tmp_path / "index", UUID_, SLOTS)
    return tmp_path / "index"


def key(number: int) -> bytes:
    return b"r" + number.to_bytes(8, "big")


def change(extents: dict[bytes, bytes], state: bytes = b"state", *, anew: bool = False) -> VolumeChange:
    return VolumeChange(state, tuple(extents.items()), anew)


def test_a_volume_s_state_and_extents_come_with_the_rows(path: Path) -> None:
    first = {key(2): b"two" * 2000, key(1): b"one", b"h": b"head"}
    with opened(path) as index:
        assert (index.volume_state(5), index.extents(5)) == (None, [])
        rows = {5: [(0, row(0))]}
        assert index.write_rows(rows, 3, {5: change(first), 6: change({key(1): b"other"}, b"")}) == (1, 0)
        assert index.write_rows(
            {}, None, {5: change({key(1): b"", key(9): b"", key(3): b"three"}, b"2")}
        ) == (
            0,
            0,
        )
    expected = [(b"h", b"head"), (key(2), b"two" * 2000), (key(3), b"three")]
    with opened(path) as index:
        assert (index.volume_state(5), index.extents(5)) == (b"2", expected)
        assert (index.volume_state(6), index.extents(6)) == (b"", [(key(1), b"other")])
        assert (index.volume_state(0x105), index.extents(4), index.extents(7)) == (None, [], [])
        assert index.meta().journaled == 3
        index.write_rows({}, None, {5: change({key(7): b"seven", key(8): b""}, anew=True)})
        assert index.extents(5) == [(key(7), b"seven")]
        assert index.extents(6) == [(key(1), b"other")]


def test_of_a_key_that_is_there_twice_the_last_counts(path: Path) -> None:
    twice = ((key(1), b"1"), (key(2), b""), (key(1), b""), (key(2), b"2"))
    with opened(path) as index:
        index.write_rows({}, None, {1: change({key(1): b"before"})})
        index.write_rows({}, None, {1: VolumeChange(b"", twice)})
        assert index.extents(1) == [(key(2), b"2")]


def test_rows_and_extents_are_written_together_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R13; the row of the failing transaction is put before its extents are."""
    with opened(path) as index:
        index.write_rows({1: [(0, row(0))]}, 1, {1: change({key(0): b"old"}, b"1")})
        write_volume = index._write_volume

        def fails(*arguments: Any) -> None:
            write_volume(*arguments)
            raise CacheError("the disk")

        monkeypatch.setattr(index, "_write_volume", fails)
        with pytest.raises(CacheError, match="the disk"):
            index.write_rows({1: [(0, row(9))]}, 2, {1: change({key(0): b"new"}, b"2")})
        assert list(index.rows(1)) == [(0, row(0))]
        assert (index.volume_state(1), index.extents(1)) == (b"1", [(key(0), b"old")])
        assert index.meta().journaled == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {b"": b"v"},
        {b"k" * 65: b"v"},
        {b"k" * 65: b""},
        {b"k": bytes(32769)},
    ],
)
def test_what_is_too_long_changes_nothing(path: Path, wrong: dict[bytes, bytes]) -> None:
    with opened(path) as index:
        with pytest.raises(ValueError, match="bytes"):
            index.write_rows({1: [(0, row(0))]}, None, {1: change(wrong)})
        with pytest.raises(ValueError, match="bytes"):
            index.write_rows({1: [(0, row(0))]}, None, {1: VolumeChange(bytes(32769))})
        assert (list(index.rows(1)), index.volume_state(1)) == ([], None)
        index.write_rows({}, None, {1: change({b"k" * 64: bytes(32768)}, bytes(32768))})
        assert index.extents(1) == [(b"k" * 64, bytes(32768))]


def test_a_layer_that_goes_takes_them_along(path: Path) -> None:
    with opened(path) as index:
        for layer_id in (1, 2, 3, 0x103):
            index.put_layer(record(layer_id, kind="write-back"))
            index.write_rows({}, None, {layer_id: change({key(n): bytes(3000) for n in range(50)})})
        index.delete_layer(1)
        index.begin_session(1, forget_layers=[2])
        kept = [layer_id for layer_id in (1, 2, 3, 0x103) if index.volume_state(layer_id) is not None]
        assert kept == [3, 0x103] == [layer.layer_id for layer in index.layers()]
        assert [len(index.extents(layer_id)) for layer_id in (1, 2, 3, 0x103)] == [0, 0, 50, 50]
        index.begin_session(2, discard=True)
        assert (index.volume_state(3), index.extents(3), index.extents(0x103)) == (None, [], [])


def test_a_session_begins_with_new_records_of_layers(path: Path) -> None:
    damaged = replace(record(2, kind="write-back"), damaged="row 1 is lost")
    with opened(path) as index:
        index.put_layer(record(1))
        index.put_layer(record(2, kind="write-back"))
        index.begin_session(1, put_layers=[damaged])
    with opened(path) as index:
        assert index.layers() == [record(1), damaged]


def test_a_field_that_older_versions_do_not_know_is_seldom_there(path: Path) -> None:
    """They would call the record, and with it the index, damaged."""
    with opened(path) as index:
        index.put_layer(record(1))
        with index._env.begin(db=index._layers_db) as txn:
            fields = json.loads(txn.get(b"\0\0\0\1") or b"")
    assert set(fields) == {
        "kind",
        "url",
        "size_bytes",
        "validator",
        "used_unix_s",
        "name",
        "base_size_bytes",
    }


@pytest.fixture
def old(path: Path) -> Path:
    """An index of a version that knew no volumes in object storage."""
    with opened(path) as index:
        index.put_layer(record(1))
        index.write_rows({1: [(0, row(0))]})
        with index.changing(rows=0) as txn:
            for database in (index._volumes_db, index._extents_db):
                assert database is not None
                txn.drop(database)
            index._volumes_db = index._extents_db = None
    return path


def test_an_older_index_is_opened_and_completed_by_its_next_session(old: Path) -> None:
    with opened(old) as index:
        assert (index.volume_state(1), index.extents(1)) == (None, [])
        before = (old / "data.mdb").read_bytes()
    assert (old / "data.mdb").read_bytes() == before, "to open it changes nothing"
    with opened(old) as index:
        index.delete_layer(7)
        index.begin_session(1, forget_layers=[6])
        index.write_rows({}, None, {1: change({key(1): b"one"})})
    with opened(old) as index:
        assert (index.volume_state(1), index.extents(1)) == (b"state", [(key(1), b"one")])
        assert list(index.rows(1)) == [(0, row(0))]


def test_an_older_index_is_looked_into_without_a_change(old: Path) -> None:
    before = (old / "data.mdb").read_bytes()
    index = open_index(old, UUID_, SLOTS, read_only=True)
    try:
        assert (index.layers(), list(index.rows(1))) == ([record(1)], [(0, row(0))])
        assert (index.volume_state(1), index.extents(1)) == (None, [])
    finally:
        index.close()
    assert (old / "data.mdb").read_bytes() == before


def test_databases_of_a_transaction_that_failed_are_made_again(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(old) as index:
        commit = index._commit

        def fails(txn: Any) -> None:
            txn.abort()
            raise CacheError("the disk")

        monkeypatch.setattr(index, "_commit", fails)
        with pytest.raises(CacheError, match="the disk"):
            index.begin_session(1)
        assert index.extents(1) == []
        monkeypatch.setattr(index, "_commit", commit)
        index.begin_session(1)
        index.write_rows({}, None, {1: change({key(1): b"one"})})
        assert index.extents(1) == [(key(1), b"one")]


@pytest.mark.parametrize("seed", range(4))
def test_the_file_grows_as_far_as_extents_need_it(path: Path, seed: int) -> None:
    """As for rows; values are of all lengths, those that need pages of their own among them."""
    dice = random.Random(seed)
    live: dict[int, dict[bytes, bytes]] = {1: {}, 2: {}}
    with opened(path) as index:
        for _ in range(25):
            layer_id, count = dice.choice([1, 2]), dice.choice([1, 20, 300, 2000])
            longest = dice.choice([30, 1940, 1960, 2050, 8200, 22_000 if count < 1000 else 100])
            shortest = dice.choice([1, longest - 15])
            had = live[layer_id]
            what, start = dice.choice(["new", "run", "again", "delete", "anew"]), dice.randrange(10**6)
            keys = {
                "new": [b"k" * 40 + dice.randbytes(20) for _ in range(count)],
                "run": [key(number) for number in range(start, start + count)],
            }.get(what) or dice.sample(sorted(had), min(count, len(had)))
            pairs = {k: b"" if what == "delete" else bytes(dice.randint(shortest, longest)) for k in keys}
            wanted = {layer_id: change(pairs, bytes(dice.choice([0, 1951, 30_000])), anew=what == "anew")}
            used_bytes, more_bytes = index._room(0, index._load(wanted.values()))
            index.write_rows({}, None, wanted)
            kept = {} if what == "anew" else had
            live[layer_id] = {k: value for k, value in (kept | pairs).items() if value}
            now_bytes, _ = index._room(0)
            assert now_bytes <= used_bytes + more_bytes
            size_bytes = (path / "data.mdb").stat().st_size
            assert now_bytes + (512 << 10) <= size_bytes <= now_bytes + (3 << 20)
            assert dict(index.extents(layer_id)) == live[layer_id]


def test_the_map_grows_only_when_nobody_reads_beside_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader looks at would be unmapped below it: a crash of the process."""
    monkeypatch.setattr(index_module, "map_size_bytes", lambda slot_count: 1 << 20)
    many = {key(number): bytes(4000) for number in range(400)}
    with opened(path) as index:
        index.write_rows({}, None, {1: change({key(0): b"one"})})
        steps: list[str] = []
        asked = threading.Event()

        class Asked:
            """In the place of the lock: says who wants it."""

            def __init__(self, lock: threading.Lock) -> None:
                self._lock = lock

            def __enter__(self) -> None:
                if threading.current_thread() is not threading.main_thread():
                    asked.set()
                self._lock.acquire()

            def __exit__(self, *_: object) -> None:
                self._lock.release()

        # With extents already counted, so that the only one who asks for the lock is who makes the map grow.
        load = index._load([change(many)])
        monkeypatch.setattr(index, "_load", lambda volumes: load)

        def write() -> None:
            index.write_rows({}, None, {1: change(many)})
            steps.append("written")

        with index._reading, index._env.begin() as txn:
            monkeypatch.setattr(index, "_reading", Asked(index._reading))
            writer = threading.Thread(target=write)
            writer.start()
            assert asked.wait(20)
            assert index._env.info()["map_size"] == 1 << 20
            assert txn.stat(index._extents_db)["entries"] == 1
            steps.append("read")
        writer.join(20)
        assert steps == ["read", "written"]
        assert index._env.info()["map_size"] > 1 << 20
        assert index.extents(1) == sorted(many.items())


def test_a_reader_has_the_lock_for_as_long_as_it_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as index:
        index.write_rows({}, None, {1: change({key(0): b"one"})})
        seen = []
        begin = index._env.begin

        class Env:
            """The environment, of which a test sees when a transaction begins and that nothing has ended."""

            def begin(self, **arguments: Any) -> Any:
                seen.append(index._reading.locked())
                return begin(**arguments)

        env = index._env
        monkeypatch.setattr(index, "_env", Env())
        assert (index.volume_state(1), index.extents(1)) == (b"state", [(key(0), b"one")])
        monkeypatch.setattr(index, "_env", env)
        assert seen == [True, True]
        assert not index._reading.locked()


def test_reading_a_closed_index_is_an_error(path: Path) -> None:
    with opened(path) as index:
        pass
    for read in (index.volume_state, index.extents):
        with pytest.raises(CacheError, match="could not be read"):
            read(1)
