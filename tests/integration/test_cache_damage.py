"""Cache directories that were tampered with: what cannot be believed is dropped, or refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache_rig import (
    SLOTS,
    CacheRig,
    changed_index,
    check_files,
    copy_cache,
    image_bytes,
    index_rows,
    run_directory,
    session,
)
from tierblk.cache.layers import LayerRecord
from tierblk.cache.rows import Entry, pack_row, unpack_row
from tierblk.cache.start import StartMode
from tierblk.core import ROW_BYTES
from tierblk.errors import CacheError

IMAGE = image_bytes(1, 150)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        yield path


async def test_r9_a_damaged_row_is_dropped_alone(
    tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), *range(150))
    with changed_index(directory) as index:
        damaged = bytearray(dict(index.rows(1))[1])
        damaged[4] ^= 1
        index.write_rows({1: [(1, bytes(damaged))]})
    async with session(directory, run_dir) as rig:
        dropped = [
            log for log in caplog.records if log.levelno == logging.WARNING and "dropped" in log.message
        ]
        what = "row 1 of layer 1: bad checksum or length, of http://images.example/a.raw"
        assert [log.message for log in dropped] == [f"{what}, is dropped from the cache"]
        assert rig.cache.stats()["free"] == SLOTS - 1 - (150 - 64)
        await rig.fill(await rig.base(IMAGE), *range(150))
        assert [block for _, block in rig.fetched] == list(range(64, 128))
    assert check_files(directory) == []


@pytest.mark.parametrize("packed", [b"", b"short", bytes(ROW_BYTES), bytes(ROW_BYTES + 1)])
async def test_r9_a_row_that_is_none(tmp_path: Path, run_dir: Path, packed: bytes) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
    with changed_index(directory) as index, index.changing(rows=1) as txn:
        txn.put(b"\0\0\0\1" + (1).to_bytes(8, "big"), packed, db=index._rows_db)
        txn.put(b"\0\0\0\1" + b"key", packed, db=index._rows_db)
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
        assert rig.fetched == []
    assert [sorted(layer.rows) for layer in index_rows(directory)] == [[0]]


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "killed"])
async def test_i4_a_row_that_claims_a_slot_of_another_is_dropped_whole(
    tmp_path: Path, run_dir: Path, clean: bool, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean) as rig:
        await rig.fill(await rig.base(IMAGE), *range(66))
        await rig.cache.commit()
    with changed_index(directory) as index:
        rows = {row: unpack_row(packed) for row, packed in index.rows(1)}
        stolen = [rows[1][0], Entry(slot=rows[0][3].slot, cached=1)]
        index.write_rows({1: [(1, pack_row(stolen))]})
    async with session(directory, run_dir) as rig:
        errors = [log.message for log in caplog.records if log.levelno == logging.ERROR]
        if clean:
            assert len(errors) == 1
            assert errors[0].startswith("row 1 of layer 1: masks or slots that cannot be, of http://")
        else:
            assert errors == []  # the maps are the truth, nobody asks the index
        await rig.fill(await rig.base(IMAGE), *range(66))
        assert [block for _, block in rig.fetched] == ([64, 65] if clean else [])
        await rig.cache.commit()
    assert check_files(directory) == []


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "killed"])
async def test_a_row_beyond_the_image_is_dropped(tmp_path: Path, run_dir: Path, clean: bool) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
        await rig.cache.commit()
    with changed_index(directory) as index:
        index.write_rows({1: [(3, pack_row([Entry(zero=1)])), (2**63, pack_row([Entry(zero=1)]))]})
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
        assert rig.fetched == []
    assert [sorted(layer.rows) for layer in index_rows(directory)] == [[0]]


async def test_a_damaged_row_that_a_map_corrects_names_no_slots(tmp_path: Path, run_dir: Path) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean=False) as rig:
        await rig.fill(await rig.base(IMAGE), *range(3))
        await rig.cache.commit()
    with changed_index(directory) as index:
        index.write_rows({1: [(0, b"x" * ROW_BYTES)]})
    async with session(directory, run_dir) as rig:
        assert rig.cache.start_mode is StartMode.WARM
        assert rig.cache.stats()["quarantined"] == 0
        assert (await rig.cache.commit()).rows_written == 1
    assert check_files(directory) == []


async def test_a_kind_of_layer_that_we_cannot_serve_is_refused_untouched(
    tmp_path: Path, run_dir: Path
) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
    with changed_index(directory) as index:
        index.put_layer(LayerRecord(2, "volume", "s3://bucket/v", 1 << 30, "", 0))
    before = copy_cache(directory, tmp_path / "before")
    with pytest.raises(CacheError, match="holds a volume, which this version cannot serve"):
        await CacheRig.open(directory, run_dir)
    assert index_rows(directory) == index_rows(before)
    assert (directory / "slots").read_bytes() == (before / "slots").read_bytes()


async def test_a_cache_of_which_parts_were_mixed_is_refused(tmp_path: Path, run_dir: Path) -> None:
    for name in ("a", "b"):
        async with session(tmp_path / name, run_dir) as rig:
            await rig.fill(await rig.base(IMAGE), 0)
    shutil.rmtree(tmp_path / "a" / "index")
    shutil.copytree(tmp_path / "b" / "index", tmp_path / "a" / "index")
    with pytest.raises(CacheError, match="belongs to another cache"):
        await CacheRig.open(tmp_path / "a", run_dir)
    shutil.rmtree(tmp_path / "a" / "index")
    with pytest.raises(CacheError, match="index is missing"):
        await CacheRig.open(tmp_path / "a", run_dir)
    (tmp_path / "a" / "index").mkdir()
    (tmp_path / "a" / "index" / "data.mdb").write_bytes(b"")
    with pytest.raises(CacheError, match="is damaged"):
        await CacheRig.open(tmp_path / "a", run_dir)


async def test_a_map_with_dirty_pages_that_cannot_be_is_not_dropped_silently(
    tmp_path: Path, run_dir: Path
) -> None:
    directory = tmp_path / "cache"
    async with session(directory, run_dir, clean=False) as rig:
        await rig.fill(await rig.base(IMAGE), 0)
        path = rig.cache.run_dir / "maps" / "1.map"
    with path.open("r+b") as file:
        file.seek(4096 + 4)
        file.write(bytes.fromhex("0000" + "0000" + "0000" + "0100"))  # dirty, and neither cached nor zero
    with pytest.raises(CacheError, match="a block map that the last daemon left is damaged"):
        await CacheRig.open(directory, run_dir)
