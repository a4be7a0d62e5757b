"""A look into a cache directory (cache/view.py): in every state that one can be in it says what an opening
would believe, and beside a daemon what the daemon has in memory."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import changed_index, run_directory
from tests.integration.test_cache_verify import content
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk.cache.rows import ENTRIES_BYTES, entries_of
from tierblk.cache.view import State, View, look
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Layer
from tierblk.errors import CacheError

IMAGE = os.urandom(300 * BLOCK_BYTES - PAGE_BYTES)
SIZE_BYTES = 400 * BLOCK_BYTES
Entries = dict[int, tuple[int, ...]]

OUTSIDE = """
import json, sys
from pathlib import Path
from tierblk.cache.view import look
with look(Path(sys.argv[1]), Path(sys.argv[2])) as view:
    layers = {r.kind: {b: list(e) for b, e in view.layer(r).entries()} for r in view.records}
    print(json.dumps({"state": view.state.value, "layers": layers}))
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with run_directory(tmp_path) as memory:
        yield Host(tmp_path, memory)


def begin(host: Host) -> VolumeDaemon:
    """With what is of every kind: cached pages of a base, a written volume, zeros."""
    daemon = VolumeDaemon(host, 500, IMAGE, SIZE_BYTES)
    daemon.door.read(0, 5 * BLOCK_BYTES)
    daemon.door.read(299 * BLOCK_BYTES, 2 * PAGE_BYTES)
    daemon.door.write(130 * BLOCK_BYTES, b"v" * (3 * BLOCK_BYTES + PAGE_BYTES))
    daemon.door.write(350 * BLOCK_BYTES, bytes(BLOCK_BYTES))
    daemon.door.discard(2 * BLOCK_BYTES, BLOCK_BYTES)
    daemon.door.flush()
    daemon.quiet(cycle_held=False)
    return daemon


def of_engine(layer: Layer) -> Entries:
    rows = ((row, layer.peek_row(row)) for row in range(layer.rows))
    return {
        row * 64 + i: tuple(entry)
        for row, packed in rows
        for i, entry in enumerate(entries_of(packed))
        if any(entry)
    }


def of_view(view: View) -> dict[str, Entries]:
    return {
        record.kind: {block: tuple(entry) for block, entry in view.layer(record).entries()}
        for record in view.records
    }


def outside(host: Host) -> Any:
    """What another process sees."""
    command = [sys.executable, "-c", OUTSIDE, str(host.directory), str(host.run_dir)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def test_after_an_end_in_order_the_index_counts(host: Host) -> None:
    daemon = begin(host)
    assert daemon.base is not None
    wanted = {"base": of_engine(daemon.base), "local": of_engine(daemon.volume)}
    daemon.stop(clean=True)
    before = content(host)
    with look(host.directory, host.run_dir) as view:
        assert (view.state, view.bad_superblocks) == (State.ENDED, 0)
        found = of_view(view)
        assert found == wanted
        volume = view.layer(next(record for record in view.records if record.kind == "local"))
        assert volume.entry(130).cached == 0xFFFF
        assert volume.entry(133).cached == 1
        assert [block for block, _ in volume.entries(131, 140)] == [131, 132, 133]
        entry = volume.entry(131)
        with mmap.mmap(-1, 2 * PAGE_BYTES) as buffer:
            view.read_slot(entry.slot, 3, buffer)
            assert buffer[:] == b"v" * (2 * PAGE_BYTES)
    assert content(host) == before
    assert sum(len(entries) for entries in found.values()) == 6 + 4 + 1 + 1


def test_beside_a_daemon_its_memory_counts(host: Host) -> None:
    daemon = begin(host)
    try:
        daemon.door.write(20 * BLOCK_BYTES, b"n" * PAGE_BYTES)  # neither flushed nor committed
        assert daemon.base is not None
        found = outside(host)
        assert found["state"] == "served"
        for kind, layer in (("base", daemon.base), ("local", daemon.volume)):
            entries = {int(block): tuple(entry) for block, entry in found["layers"][kind].items()}
            assert entries == of_engine(layer)
        assert daemon.run(daemon.cache.commit()) is not None  # it was in nobody's way
    finally:
        daemon.stop(clean=True)


def test_of_a_killed_daemon_the_maps_count(host: Host) -> None:
    daemon = begin(host)
    daemon.door.write(20 * BLOCK_BYTES, b"n" * PAGE_BYTES)
    wanted = of_engine(daemon.volume)
    host.crash(kill=True)
    daemon.stop(clean=False)
    with look(host.directory, host.run_dir) as view:
        assert view.state is State.KILLED
        assert of_view(view)["local"] == wanted


def test_after_a_power_cut_index_and_journal_count(host: Host) -> None:
    """Of a volume only what is dirty: a clean page may have been written in place."""
    daemon = begin(host)
    wanted = {block: entry for block, entry in of_engine(daemon.volume).items() if entry[4]}
    host.crash(kill=False)
    daemon.stop(clean=False)
    before = content(host)
    with look(host.directory, host.run_dir) as view:
        assert view.state is State.CUT
        assert of_view(view)["local"] == wanted
        assert outside(host)["state"] == "cut"  # two may look at once
    assert content(host) == before


def test_an_index_of_another_time_counts_for_nothing(host: Host) -> None:
    begin(host).stop(clean=True)
    host.take_backup("index")
    begin(host).stop(clean=True)
    host.restore(host.backups[0])
    with look(host.directory, host.run_dir) as view:
        assert view.state is State.STRANGE
        assert of_view(view) == {"base": {}, "local": {}}


def test_a_row_that_cannot_be_believed_is_lost_to_a_volume(host: Host) -> None:
    begin(host).stop(clean=True)
    with changed_index(host.directory) as index:
        ids = {record.kind: record.layer_id for record in index.layers()}
        rows = {kind: dict(index.rows(layer_id)) for kind, layer_id in ids.items()}
        damaged = {kind: bytearray(of_kind[row]) for kind, row in (("base", 0), ("local", 2))
                   for of_kind in (rows[kind],)}  # fmt: skip
        for packed in damaged.values():
            packed[ENTRIES_BYTES] ^= 1
        index.write_rows(
            {ids["base"]: [(0, bytes(damaged["base"]))], ids["local"]: [(2, bytes(damaged["local"]))]}
        )
    with look(host.directory, host.run_dir) as view:
        layers = {record.kind: view.layer(record) for record in view.records}
        assert min(block for block, _ in layers["base"].entries()) == 299
        assert layers["base"].row_faults.keys() == {0}
        lost = dict(layers["local"].entries(128, 192))
        assert layers["local"].row_faults.keys() == {2}
        assert set(lost) == set(range(128, 192))
        assert {tuple(entry) for entry in lost.values()} == {(0, 0xFFFF, 0, 0, 0, 0)}


def test_what_is_no_cache_directory(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "slots").write_bytes(bytes(8192))
    for name, words in (
        ("not there", "there is no cache directory"),
        ("file", "there is no cache directory"),
        ("there", "is no cache directory: it has no slots"),
        ("foreign", "is not a slots file of tierblk"),
    ):
        with pytest.raises(CacheError, match=words), look(tmp_path / name, tmp_path):
            pass
