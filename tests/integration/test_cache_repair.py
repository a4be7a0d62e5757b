"""`cache verify --repair` and `cache diff`: bytes that the SSD has lost come from where they came from, and
nothing else is touched."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import changed_index, check_files, run_directory
from tests.far_rig import Host, config_of
from tests.integration.test_cache_verify import flip
from tests.integration.test_export import change, content_of, export, local, written
from tierblk.cache import look
from tierblk.cache.rows import entries_of
from tierblk.cli.entry import main
from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.units import MIB

FLIPS = 1000
IMAGE_BYTES = 7 * MIB


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        monkeypatch.setenv("TIERBLK_RUN_DIR", str(path))
        yield path


async def verify(target: Path, *words: str) -> int:
    return await asyncio.to_thread(main, ["cache", "verify", str(target), *words])


async def served(config: Config, run_dir: Path, *, settled: bool = False) -> tuple[Host, bytes]:
    """All of an image cached, a little of it written over; then the end in order. settled: with the sums of
    what was written."""
    host = await Host.start(config, run_dir)
    await host.attach()
    await host.content()
    await host.write(64 * PAGE_BYTES, b"dirty" * 1024)
    content = await host.content()
    while settled and host.cache.settler.lacking:
        await host.cache.settler.turn(1000)
    await host.stop()
    return host, content


def places(cache: Path, run_dir: Path, kind: str, *, dirty: bool) -> list[int]:
    """Offsets in the slots file of all pages of a layer that are dirty, or clean."""
    with look(cache, run_dir) as view:
        return [
            entry.slot * BLOCK_BYTES + page * PAGE_BYTES
            for record in view.records
            if record.kind == kind
            for _, entry in view.layer(record).entries()
            for page in range(16)
            if (entry.cached & (entry.dirty if dirty else ~entry.dirty)) >> page & 1
        ]


def flip_bits(path: Path, pages: list[int], chance: random.Random, count: int) -> set[int]:
    """The pages that have a flipped bit now: several in one, or one bit in each."""
    flipped = {}
    with open(path, "r+b") as file:
        for _ in range(count):
            page, bit = chance.choice(pages), chance.randrange(8 * PAGE_BYTES)
            if (page, bit) in flipped:
                continue
            flipped[page, bit] = True
            file.seek(page + bit // 8)
            (byte,) = file.read(1)
            file.seek(page + bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
    return {page for page, _ in flipped}


async def test_a_thousand_flipped_bits_are_found_and_repaired(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(71)
    image = chance.randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    _, content = await served(config, run_dir)
    cache, before = tmp_path / "cache", content_of(tmp_path)
    clean = places(cache, run_dir, "base", dirty=False)
    bad = flip_bits(cache / "slots", clean, chance, FLIPS)
    assert await verify(cache, "--json") == 6
    found = json.loads(capsys.readouterr().out)
    assert sum(layer["bad_pages"] for layer in found["layers"]) == len(bad)
    assert len(found["violations"]) == len(bad)
    assert found["repaired"] is None
    assert await verify(written(config), "--repair", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["repaired"] == {"pages": len(bad), "left_pages": 0, "reasons": []}
    assert content_of(tmp_path) == before, "nothing else was touched"
    assert await verify(cache, "--repair") == 0
    assert "is well" in capsys.readouterr().out
    (tmp_path / "base.raw").unlink()
    assert await export(config, tmp_path / "out.raw", "--offline") == 0
    assert (tmp_path / "out.raw").read_bytes() == content


async def test_every_single_bit_of_a_thousand_is_found(tmp_path: Path, run_dir: Path) -> None:
    """One bit at a time in each of a thousand pages, so that none hides behind another."""
    chance = random.Random(72)
    config = local(tmp_path, chance.randbytes(IMAGE_BYTES))
    await served(config, run_dir)
    clean = places(tmp_path / "cache", run_dir, "base", dirty=False)
    chosen = chance.sample(clean, FLIPS)
    for page in chosen:
        flip_bits(tmp_path / "cache" / "slots", [page], chance, 1)
    from tierblk.cache.verify import verify as look_through

    found = await asyncio.to_thread(look_through, tmp_path / "cache", run_dir)
    there = {
        bad.slot * BLOCK_BYTES + page * PAGE_BYTES
        for layer in found.layers
        for bad in layer.bad
        for page in range(16)
        if bad.pages >> page & 1
    }
    assert there == set(chosen)


async def test_a_flipped_dirty_page_is_named_and_left_alone(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair mends what is beside it."""
    config = local(tmp_path, random.Random(73).randbytes(IMAGE_BYTES))
    _, content = await served(config, run_dir, settled=True)
    cache = tmp_path / "cache"
    (page, *_) = places(cache, run_dir, "local", dirty=True)
    (clean, *_) = places(cache, run_dir, "base", dirty=False)
    flip(cache / "slots", page + 7)
    damaged = content_of(tmp_path)
    flip(cache / "slots", clean + 7)
    assert await verify(written(config), "--repair", "--json") == 6
    found = json.loads(capsys.readouterr().out)
    layers = {layer["kind"]: layer for layer in found["layers"]}
    assert {kind: (layer["bad_pages"], layer["unchecked_blocks"]) for kind, layer in layers.items()} == {
        "base": (1, 0),
        "local": (1, 0),
    }
    assert (found["repaired"]["pages"], found["repaired"]["left_pages"]) == (1, 1)
    assert content_of(tmp_path) == damaged
    assert await verify(written(config), "--repair") == 6
    said = capsys.readouterr()
    assert "0 pages are repaired, 1 are not" in said.out
    assert f"slot {page // BLOCK_BYTES} is not what was written there, and nobody else has it" in said.out
    assert "it is left as it is" in said.err
    assert content_of(tmp_path) == damaged
    assert await export(config, tmp_path / "out.raw", "--json") == 0
    (at,) = json.loads(capsys.readouterr().out)["damaged_pages"]
    out = (tmp_path / "out.raw").read_bytes()
    assert [n for n in range(len(out)) if out[n] != content[n]] == [at + 7]


async def test_a_page_that_flipped_before_its_upload_is_told(
    tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log only, from then on: it is uploaded as the device reads it."""
    host = await Host.start(config_of(tmp_path, f"file://{tmp_path}/store"), run_dir)
    await host.attach()
    await host.write(64 * PAGE_BYTES, b"dirty" * 4096)
    while host.cache.settler.lacking:
        await host.cache.settler.turn(1000)
    slot = entries_of(host.far.layer.peek_row(0))[4].slot
    flip(tmp_path / "cache" / "slots", slot * BLOCK_BYTES + 2 * PAGE_BYTES + 7)
    await host.sync()
    (said,) = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert said == (
        "pages 2 of block 4 of layer 1 are not what was written: the SSD has changed them; uploaded as is"
    )
    await host.stop()


async def test_a_dirty_page_that_was_just_written_is_counted(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no sum yet, so nobody can say which bytes are right."""
    config = local(tmp_path, random.Random(73).randbytes(IMAGE_BYTES))
    await served(config, run_dir)
    (page, *_) = places(tmp_path / "cache", run_dir, "local", dirty=True)
    flip(tmp_path / "cache" / "slots", page + 7)
    before = content_of(tmp_path)
    assert await verify(written(config), "--repair", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    layers = {layer["kind"]: layer for layer in found["layers"]}
    assert layers["local"]["unchecked_blocks"] == 1
    assert found["repaired"] is None
    assert content_of(tmp_path) == before


async def test_what_cannot_be_repaired_is_left_as_it_is(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another image under the same name, none at all, and a sum that is wrong itself."""
    image = random.Random(74).randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    await served(config, run_dir)
    cache = tmp_path / "cache"
    clean = places(cache, run_dir, "base", dirty=False)
    flip(cache / "slots", clean[5] + 9)
    damaged = content_of(tmp_path)
    (tmp_path / "base.raw").rename(tmp_path / "moved.raw")
    assert await verify(written(config), "--repair") == 6
    said = capsys.readouterr()
    assert "0 pages are repaired, 1 are not" in said.out
    assert "base.raw" in said.err
    assert content_of(tmp_path) == damaged
    (tmp_path / "base.raw").write_bytes(random.Random(75).randbytes(IMAGE_BYTES))
    assert await verify(written(config), "--repair") == 6
    capsys.readouterr()
    assert content_of(tmp_path) == damaged, "of another version nothing is taken"
    (tmp_path / "base.raw").unlink()
    (tmp_path / "moved.raw").rename(tmp_path / "base.raw")
    slot, sum_at = divmod(clean[8], BLOCK_BYTES)
    flip(cache / "sums", slot * 64 + sum_at // PAGE_BYTES * 4)
    assert await verify(written(config), "--repair", "--json") == 0
    assert json.loads(capsys.readouterr().out)["repaired"]["pages"] == 2
    assert check_files(cache) == []


async def test_pages_of_a_volume_in_object_storage_come_from_there(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, chance = bytearray(8 * MIB), random.Random(76)
    config = config_of(tmp_path, f"file://{tmp_path}/store")
    host = await Host.start(config, run_dir)
    await host.attach()
    await change(host, model, chance)
    await host.stop()
    cache = tmp_path / "cache"
    clean = places(cache, run_dir, "write-back", dirty=False)
    bad = flip_bits(cache / "slots", clean, chance, 50)
    assert await diff(cache) == 6
    assert "differ" in capsys.readouterr().out
    assert await verify(written(config), "--repair", "--json") == 0
    assert json.loads(capsys.readouterr().out)["repaired"]["pages"] == len(bad)
    assert await diff(cache, "--json") == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["compared_bytes"] == len(clean) * PAGE_BYTES
    host = await Host.start(config, run_dir)
    await host.attach()
    assert await host.content() == bytes(model)
    await host.stop()


async def diff(target: Path, *words: Any) -> int:
    return await asyncio.to_thread(main, ["cache", "diff", str(target), *words])


async def test_diff_names_what_is_not_the_origins(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = local(tmp_path, random.Random(77).randbytes(IMAGE_BYTES))
    await served(config, run_dir)
    cache = tmp_path / "cache"
    assert await diff(written(config)) == 0
    said = capsys.readouterr()
    assert "7 MiB compared, all of it the same" in said.out
    assert "the volume loc is not compared: nobody else has it" in said.err
    with changed_index(cache) as index:
        base = next(record.layer_id for record in index.layers() if record.kind == "base")
        slot = int.from_bytes(dict(index.rows(base))[0][3 * 12 : 3 * 12 + 4], "little")
    flip(cache / "slots", slot * BLOCK_BYTES + 2 * PAGE_BYTES)
    flip(cache / "slots", slot * BLOCK_BYTES + 3 * PAGE_BYTES)
    assert await diff(written(config), "--json") == 6
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    offset = 3 * BLOCK_BYTES + 2 * PAGE_BYTES
    assert layer["different"] == [{"offset_bytes": offset, "length_bytes": 2 * PAGE_BYTES}]
    assert await diff(written(config), "block:4-9") == 0
    assert "384 KiB compared" in capsys.readouterr().out
