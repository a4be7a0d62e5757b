"""Volumes in object storage in a cache directory: what is kept of them, and what must not be shown again."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cache_rig import (
    CacheRig,
    changed_index,
    check_files,
    image_bytes,
    read_superblock,
    run_directory,
    session,
)
from tierblk.cache.index import Index
from tierblk.cache.layers import LayerRecord, VolumeChange
from tierblk.cache.rows import Entry, entries_of, pack_row
from tierblk.cache.start import StartMode
from tierblk.cache.verify import verify
from tierblk.cli.entry import main
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, Layer, LocalDoor
from tierblk.errors import CacheError
from tierblk.units import MIB

IMAGE = image_bytes(1, 150)
SIZE_BYTES = 150 * BLOCK_BYTES
ALL = 0xFFFF
EXTENTS = ((b"h", b"head"), (b"r", b"row"))
RECORD = LayerRecord(2, "write-back", "", SIZE_BYTES, "", 0, "v")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        yield path


@pytest.fixture
async def directory(tmp_path: Path, run_dir: Path) -> Path:
    """With a volume, layer 2. Of its blocks 0 and 64 are clean and 1 is dirty; block 2 has a page that is
    zeros and clean, and the rest of it in the store only; block 65 has all there."""
    path = tmp_path / "cache"
    async with session(path, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), 0, 1, 64)
    with changed_index(path) as index:
        slots = {row * 64 + i: e.slot for row, p in index.rows(1) for i, e in enumerate(entries_of(p))}
        clean, dirty = (Entry(slots[at], ALL, ALL, 0, mask) for at, mask in ((0, 0), (1, ALL)))
        rows = [
            (0, pack_row([clean, dirty, Entry(0, ALL, 0, 1)])),
            (1, pack_row([Entry(slots[64], ALL, ALL), Entry(0, ALL)])),
        ]
        index.put_layer(RECORD)
        change = VolumeChange(b"state", EXTENTS)
        index.write_rows({1: [(0, b""), (1, b"")], 2: rows}, None, {2: change})
    return path


def entries(layer: Layer) -> dict[int, Entry]:
    """Those that hold something, by block."""
    rows = (entries_of(layer.peek_row(row)) for row in range(layer.rows))
    return {block: e for block, e in enumerate(e for row in rows for e in row) if any(e)}


async def volume(rig: CacheRig) -> Layer:
    return await rig.cache.volume_layer("v", "write-back", SIZE_BYTES, None)


async def powered_off(directory: Path, run_dir: Path) -> None:
    """A session whose machine loses its power."""
    async with session(directory, run_dir, clean=False):
        pass
    lose_memory(directory, run_dir)


def lose_memory(directory: Path, run_dir: Path) -> None:
    shutil.rmtree(run_dir / str(read_superblock(directory).uuid))


def damage_row(directory: Path, row: int) -> None:
    with changed_index(directory) as index:
        damaged = bytearray(dict(index.rows(2))[row])
        damaged[4] ^= 1
        index.write_rows({2: [(row, bytes(damaged))]})


@asynccontextmanager
async def damaged_session(directory: Path, run_dir: Path) -> AsyncIterator[CacheRig]:
    """One in whose index a row cannot be read, which is a violation; it is killed."""
    rig = await CacheRig.open(directory, run_dir)
    try:
        yield rig
    finally:
        await rig.end(clean=False)


async def refused(directory: Path, run_dir: Path, size_bytes: int = 16 * MIB) -> str:
    with pytest.raises(CacheError) as caught:
        await CacheRig.open(directory, run_dir, size_bytes)
    return caught.value.message


async def test_a_volume_is_as_it_was_after_an_end_in_order(directory: Path, run_dir: Path) -> None:
    before = verify(directory, run_dir)
    assert before.violations == []
    assert {(each.record.kind, each.dirty_bytes) for each in before.layers} == {
        ("base", 0),
        ("write-back", BLOCK_BYTES),
    }
    async with session(directory, run_dir) as rig:
        layer = await volume(rig)
        assert layer.kind == "write-back"
        found = entries(layer)
        assert {block: e.cached for block, e in found.items()} == {0: ALL, 1: ALL, 2: 0, 64: ALL, 65: 0}
        assert found[2] == Entry(0, ALL, 0, 1)
        assert await rig.cache.volume_state("v") == b"state"
        assert await rig.cache.volume_extents(2) == list(EXTENTS)
        assert rig.cache.scratch_volumes() == []
        record = rig.cache.volume("v")
        assert record is not None
        assert record.damaged == ""
    assert check_files(directory) == []


async def test_after_a_power_cut_only_what_is_dirty_is_believed(directory: Path, run_dir: Path) -> None:
    """Another page may have been written in place, of which the index knows nothing (DESIGN 5)."""
    await powered_off(directory, run_dir)
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.UNCLEAN
        found = entries(await volume(rig))
        assert {block: e.cached for block, e in found.items()} == {0: 0, 1: ALL, 2: 0, 64: 0, 65: 0}
        assert all(e.present == ALL and not e.zero for e in found.values())
        assert await rig.cache.volume_extents(2) == list(EXTENTS)


async def test_a_volume_without_rows_is_kept_for_its_state(tmp_path: Path, run_dir: Path) -> None:
    """Which epoch is its own, and which it meant to make: no store can tell."""
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
        await volume(rig)
        await rig.cache.volume_layer("w", "write-back", SIZE_BYTES, None)
        index = rig.cache._index
        await asyncio.to_thread(index.write_rows, {}, None, {2: VolumeChange(b"state", EXTENTS)})
    for clean in (True, False):
        async with session(directory, run_dir, clean) as rig:
            assert rig.cache.volume("v") is not None
            assert rig.cache.volume("w") is None, "nothing is known of it"
            assert await rig.cache.volume_state("v") == b"state"
    lose_memory(directory, run_dir)
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.UNCLEAN
        assert (await volume(rig)).layer_id == 2
        await rig.cache.drop_volume("v")
    async with session(directory, run_dir) as rig:
        assert rig.cache.volume("v") is None


async def test_r9_a_damaged_row_is_remembered_until_it_is_forgiven(
    directory: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store has older bytes: after a start that finds nothing damaged any more they would be shown."""
    damage_row(directory, 1)
    why = "row 1 of layer 2: bad checksum or length"
    async with damaged_session(directory, run_dir) as rig:
        assert_damaged(rig, why)
        found = entries(await volume(rig))
        assert set(found) == {0, 1, 2, *range(64, 128)}
        assert found[100] == Entry(0, ALL)
    lose_memory(directory, run_dir)
    with changed_index(directory) as index:
        assert why in index.layers()[-1].damaged
    async with damaged_session(directory, run_dir) as rig:
        assert_damaged(rig, why)
        await rig.cache.commit()
        assert rig.violations() == []
    assert check_files(directory) == [], "a commit has written the row anew"
    caplog.clear()
    async with session(directory, run_dir) as rig:
        assert_damaged(rig, why)
        assert not [log for log in caplog.records if log.levelno >= logging.ERROR]
        await rig.cache.forgive("v")
        record = rig.cache.volume("v")
        assert record is not None
        assert record.damaged == ""
    async with session(directory, run_dir) as rig:
        record = rig.cache.volume("v")
        assert record is not None
        assert (record.damaged, await rig.cache.volume_state("v")) == ("", b"state")


def assert_damaged(rig: CacheRig, why: str) -> None:
    record = rig.cache.volume("v")
    assert record is not None
    assert record.damaged.endswith(why)


async def test_what_is_forgiven_stays_so_if_the_machine_loses_its_power(
    directory: Path, run_dir: Path
) -> None:
    """The rows that cannot be read are written anew first."""
    damage_row(directory, 0)
    damage_row(directory, 1)
    async with damaged_session(directory, run_dir) as rig:
        assert_damaged(rig, "row 0 of layer 2: bad checksum or length (and 1 more)")
        await rig.cache.forgive("v")
    lose_memory(directory, run_dir)
    async with session(directory, run_dir) as rig:
        record = rig.cache.volume("v")
        assert record is not None
        assert record.damaged == ""
        with pytest.raises(CacheError, match="there is no volume another"):
            await rig.cache.forgive("another")


async def test_a_map_that_is_there_is_believed_instead_of_a_damaged_row(
    directory: Path, run_dir: Path
) -> None:
    async with session(directory, run_dir, clean=False):
        pass
    damage_row(directory, 1)
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.WARM
        record = rig.cache.volume("v")
        assert record is not None
        assert record.damaged == ""
        assert entries(await volume(rig))[64].cached == ALL
        await rig.cache.commit()
    assert check_files(directory) == []


async def newer_slots(directory: Path, run_dir: Path, tmp_path: Path) -> None:
    """The index as it is now, beside the slots of another session that came after it."""
    shutil.copytree(directory / "index", tmp_path / "index")
    async with session(directory, run_dir):
        pass
    shutil.rmtree(directory / "index")
    shutil.copytree(tmp_path / "index", directory / "index")


@pytest.mark.parametrize("what", ["dirty", "damaged row", "damaged"])
async def test_r8_an_old_index_loses_nothing_that_is_nowhere_else(
    directory: Path, run_dir: Path, tmp_path: Path, what: str
) -> None:
    with changed_index(directory) as index:
        index.put_layer(LayerRecord(3, "local", "", SIZE_BYTES, "", 0, "l"))
        index.write_rows({3: [(0, pack_row([Entry(0, 1, 0, 1, 1)]))]})
        if what != "dirty":
            undirty(index)
        if what == "damaged":
            index.put_layer(LayerRecord(2, "write-back", "", SIZE_BYTES, "", 0, "v", damaged="it is"))
    await newer_slots(directory, run_dir, tmp_path)
    if what == "damaged row":
        damage_row(directory, 1)
    message = await refused(directory, run_dir)
    assert message.endswith(
        "older than the slots beside it and names the local volumes l, and the volumes v, of which not all "
        "is uploaded"
    )


def undirty(index: Index) -> None:
    rows = {row: entries_of(packed) for row, packed in index.rows(2)}
    cleaned = {row: pack_row([e._replace(dirty=0) for e in found]) for row, found in rows.items()}
    index.write_rows({2: list(cleaned.items())})


async def test_an_old_index_forgets_what_the_store_has_too(
    directory: Path, run_dir: Path, tmp_path: Path
) -> None:
    with changed_index(directory) as index:
        undirty(index)
    await newer_slots(directory, run_dir, tmp_path)
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.DISCARDED
        assert rig.cache.volume("v") is None
        layer = await volume(rig)
        assert entries(layer) == {}
        assert await rig.cache.volume_state("v") is None
        assert await rig.cache.volume_extents(layer.layer_id) == []


async def test_what_was_flushed_to_the_journal_is_missed(directory: Path, run_dir: Path) -> None:
    async with session(directory, run_dir, clean=False) as rig:
        door = LocalDoor(rig.cache.engine, None, volume=await volume(rig))
        await asyncio.to_thread(door.write, 100 * BLOCK_BYTES, b"x" * BLOCK_BYTES)
        await asyncio.to_thread(door.flush)
        assert door.stats()["flush_records"] == 1
        door.drain()
        door.quit()
        await asyncio.to_thread(door.close)
    lose_memory(directory, run_dir)
    journal = directory / "journal"
    kept = journal.read_bytes()
    journal.write_bytes(b"x" + kept[1:])
    assert "what was flushed last to v may be in it" in await refused(directory, run_dir)
    journal.write_bytes(kept)
    async with session(directory, run_dir) as rig:
        assert entries(await volume(rig))[100].dirty == ALL


async def test_a_smaller_cache_has_no_room_for_what_is_nowhere_else(tmp_path: Path, run_dir: Path) -> None:
    directory, large, small = tmp_path / "cache", 24 * MIB, 16 * MIB
    async with session(directory, run_dir, size_bytes=large) as rig:
        await rig.fill(await rig.base(image_bytes(2, 300)), *range(300))
    with changed_index(directory) as index:
        rows = {row: entries_of(packed) for row, packed in index.rows(1)}
        index.put_layer(LayerRecord(2, "write-back", "", 300 * BLOCK_BYTES, "", 0, "v"))
        stored = {row: [e._replace(present=ALL if e.slot else 0) for e in rows[row]] for row in rows}
        row, at = next((row, i) for row in stored for i, e in enumerate(stored[row]) if e.slot >= 256)
        index.write_rows({1: [(number, b"") for number in rows]})
        index.write_rows({2: [(number, pack_row(found)) for number, found in stored.items()]})
        dirty = [e._replace(dirty=1 if i == at else 0) for i, e in enumerate(stored[row])]
        index.write_rows({2: [(row, pack_row(dirty))]})
    assert await refused(directory, run_dir, small) == (
        f"the cache in {directory} cannot shrink from 24MiB to 16MiB: pages of the volume v that "
        "nothing else has are in the part that would go"
    )
    with changed_index(directory) as index:
        index.write_rows({2: [(row, pack_row(stored[row]))]})
    async with session(directory, run_dir, size_bytes=small) as rig:
        left = entries(await rig.cache.volume_layer("v", "write-back", 300 * BLOCK_BYTES, None))
        assert len(left) == 300
        assert all(e.present == ALL and e.slot < 256 for e in left.values())
        assert 0 < sum(1 for e in left.values() if e.slot) < 256
    assert check_files(directory) == []


async def test_verify_checks_clean_pages_as_those_of_a_base(
    directory: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(directory, run_dir, lambda *progress: seen.append(progress)).violations == []
    assert seen[-1] == (2, 2), "the dirty block has no sums that count"
    with changed_index(directory) as index:
        slot = entries_of(dict(index.rows(2))[0])[0].slot
    with (directory / "slots").open("r+b") as slots:
        slots.seek(slot * BLOCK_BYTES + 3 * PAGE_BYTES)
        slots.write(b"x" * 16)
    (found,) = verify(directory, run_dir).violations
    assert str(found) == f"I5 layer 2 block 0: page 3 in slot {slot} is not what was written there"
    await powered_off(directory, run_dir)
    assert verify(directory, run_dir).violations == [], "the next opening does not believe it either"
    damage_row(directory, 1)
    async with damaged_session(directory, run_dir):
        pass
    main(["cache", "verify", str(directory)])
    said = capsys.readouterr()
    assert "the volume v cannot be attached: the index has lost where its pages are" in said.out + said.err
    main(["cache", "verify", "--json", str(directory)])
    (layer,) = (each for each in json.loads(capsys.readouterr().out)["layers"] if each["name"] == "v")
    assert layer["damaged"].endswith("row 1 of layer 2: bad checksum or length")
