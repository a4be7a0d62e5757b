"""`tierblk cache export` of directories without a daemon: whatever state they are in, the file holds what the
device would show, or there is no file."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import changed_index, run_directory
from tests.far_rig import Host, config_of
from tests.integration.test_cache_verify import flip
from tierblk import config as configs
from tierblk import records
from tierblk.claim import Wishes
from tierblk.cli import orphans
from tierblk.cli.entry import main
from tierblk.config import Config
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, RemoteUnavailable
from tierblk.exporting import new_file
from tierblk.far import FarVolume
from tierblk.reader import DeviceReader
from tierblk.records import DeviceRecord
from tierblk.units import MIB

SIZE_BYTES = 8 * MIB
IMAGE_BYTES = 5 * MIB + 512 * 7
Begin = Callable[[Config], Awaitable[Host]]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        monkeypatch.setenv("TIERBLK_RUN_DIR", str(path))
        yield path


def written(config: Config) -> Path:
    """Its config as a file that a command can be given."""
    lines = []
    for table, values in config.to_document().items():
        keys = [
            f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)
        ]
        lines += [f"[{table}]", *keys, ""]
    config.path.write_text("\n".join(lines))
    assert configs.load(config.path) == config
    return config.path


async def export(config: Config, target: Path, *words: str) -> int:
    """The command's exit code."""
    return await asyncio.to_thread(main, ["cache", "export", str(written(config)), str(target), *words])


def local(folder: Path, image: bytes, mode: str = "local") -> Config:
    """A device of SIZE_BYTES over an image that is smaller."""
    (folder / "base.raw").write_bytes(image)
    document: dict[str, Any] = {
        "device": {"name": "loc", "on_outage": "fail"},
        "base": {"url": f"file://{folder}/base.raw"},
        "cache": {"dir": str(folder / "cache"), "size": 16 * MIB, "commit_interval": "600s"},
        "volume": {"mode": mode, "size": SIZE_BYTES},
        "remote": {"readahead": False, "retries": 0, "max_window": 65536},
    }
    return configs.parse(document, folder / "loc.toml")


async def change(host: Host, model: bytearray, chance: random.Random, steps: int = 40) -> None:
    for _ in range(steps):
        at = chance.randrange(0, SIZE_BYTES // 512) * 512
        length = min(chance.choice([512, PAGE_BYTES, 20 * PAGE_BYTES]), SIZE_BYTES - at)
        data = chance.choice([bytes(length), chance.randbytes(length)])
        await host.write(at, data)
        model[at : at + length] = data


async def test_a_volume_over_an_image_raw_and_qcow2(
    tmp_path: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(1)
    image = chance.randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    model = bytearray(image.ljust(SIZE_BYTES, b"\0"))
    host = await Host.start(config, run_dir)
    await host.attach()
    await host.read(MIB, MIB)
    await change(host, model, chance)
    await host.stop()
    before = content_of(tmp_path)
    raw, qcow2 = tmp_path / "out.raw", tmp_path / "out.qcow2"
    assert await export(config, raw, "--json") == 0
    said = json.loads(capfd.readouterr().out)
    assert raw.read_bytes() == bytes(model)
    assert (said["size_bytes"], said["bad_pages"], said["holes"]) == (SIZE_BYTES, 0, [])
    assert said["cached_bytes"] > MIB // 2
    assert 0 < said["fetched_bytes"] < IMAGE_BYTES
    assert raw.stat().st_blocks * 512 < SIZE_BYTES
    assert await export(config, qcow2, "--format", "qcow2") == 0
    compare: list[str | Path] = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2]
    compared = await asyncio.to_thread(lambda: subprocess.run(compare, capture_output=True, timeout=60))
    assert b"identical" in compared.stdout
    assert content_of(tmp_path) == before
    assert await export(config, raw) == CacheError.exit_code  # it is there already
    assert "is there already" in capfd.readouterr().err
    assert await export(config, raw, "--replace") == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out.qcow2", "out.raw"]


def piece_of(path: Path, offset_bytes: int, length_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        return file.read(length_bytes)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted((folder / "cache").rglob("*")) if p.is_file()}


async def test_without_the_image_what_is_cached_can_be_had(
    tmp_path: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = random.Random(2).randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    host = await Host.start(config, run_dir)
    await host.attach()
    await host.read(0, 2 * MIB)
    await host.write(4 * MIB, b"w" * PAGE_BYTES)
    await host.stop()
    (tmp_path / "base.raw").unlink()
    out = tmp_path / "out.raw"
    assert await export(config, out) in (RemoteUnavailable.exit_code, 5)
    assert "base.raw" in capfd.readouterr().err
    assert await export(config, out, "--offline") == CacheError.exit_code
    said = capfd.readouterr().err
    assert "are not in the cache" in said
    assert "--holes" in said
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    assert await export(config, out, "--offline", "--holes", "--json") == 0
    found, wanted = bytearray(out.read_bytes()), bytearray(image.ljust(SIZE_BYTES, b"\0"))
    wanted[4 * MIB : 4 * MIB + PAGE_BYTES] = b"w" * PAGE_BYTES
    holes = json.loads(capfd.readouterr().out)["holes"]
    for hole in holes:
        at, length = hole["offset_bytes"], hole["length_bytes"]
        assert 2 * MIB <= at < at + length <= IMAGE_BYTES + PAGE_BYTES
        assert not any(found[at : at + length])
        wanted[at : at + length] = bytes(length)
    assert found == wanted
    assert len(holes) == 2


async def test_a_bad_clean_page_is_fetched_and_a_lost_row_is_named(
    tmp_path: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = random.Random(3).randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    host = await Host.start(config, run_dir)
    await host.attach()
    await host.read(0, BLOCK_BYTES)
    await host.write(70 * BLOCK_BYTES, b"w" * PAGE_BYTES)
    await host.stop()
    with changed_index(tmp_path / "cache") as index:
        ids = {record.kind: record.layer_id for record in index.layers()}
        slot = int.from_bytes(dict(index.rows(ids["base"]))[0][:4], "little")
        rows = dict(index.rows(ids["local"]))
    flip(tmp_path / "cache" / "slots", slot * BLOCK_BYTES + 3 * PAGE_BYTES + 5)
    out = tmp_path / "out.raw"
    assert await export(config, out, "--json") == 0
    assert json.loads(capfd.readouterr().out)["bad_pages"] == 1
    assert out.read_bytes()[: 5 * MIB] == bytes(
        image[: 70 * BLOCK_BYTES] + b"w" * PAGE_BYTES + image[70 * BLOCK_BYTES + PAGE_BYTES : 5 * MIB]
    )
    damaged = bytearray(rows[1])
    damaged[9] ^= 1
    with changed_index(tmp_path / "cache") as index:
        index.write_rows({ids["local"]: [(1, bytes(damaged))]})
    assert await export(config, out, "--replace") == CacheError.exit_code
    assert f"at {64 * BLOCK_BYTES} are lost: nobody has them" in capfd.readouterr().err
    assert out.exists()  # the one from before


async def test_what_another_host_overtook_can_be_exported(
    tmp_path: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """R18, R19: its uploaded pages from the store as of its own history, its dirty ones from the cache."""
    chance, model = random.Random(4), bytearray(SIZE_BYTES)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    a_config, b_config = (config_of(folder, f"file://{tmp_path}/store") for folder in folders)
    a = await Host.start(a_config, run_dir)
    await a.attach()
    await change(a, model, chance)
    await a.sync()
    await a.evict()
    await change(a, model, chance, steps=20)
    b = await Host.start(b_config, run_dir)
    await b.attach(Wishes(take_over=True))
    await b.write(0, chance.randbytes(SIZE_BYTES // 2))
    await b.sync()
    await a.kill()
    out = tmp_path / "a.raw"
    assert await export(a_config, out, "--json") == 0
    said = json.loads(capfd.readouterr().out)
    assert said["fetched_bytes"] > 0
    assert said["cached_bytes"] > 0
    assert out.read_bytes() == bytes(model)
    await b.stop()
    assert await export(b_config, tmp_path / "b.raw") == 0
    assert (tmp_path / "b.raw").read_bytes() != bytes(model)
    (tmp_path / "store" / "epoch" / "0000000000000002").unlink()
    assert await export(a_config, out, "--replace") == 5
    assert "epoch/0000000000000002" in capfd.readouterr().err


async def test_a_record_that_the_index_has_not_heard_of_counts(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind an upload: the map calls pages clean, and the index knows no extents of them."""
    model, chance = bytearray(SIZE_BYTES), random.Random(5)
    config = config_of(tmp_path, f"file://{tmp_path}/store")
    host = await Host.start(config, run_dir)
    await host.attach()
    await change(host, model, chance)
    kept, apply = tmp_path / "index", FarVolume.apply

    async def copying(*arguments: Any, **keys: Any) -> None:
        shutil.copytree(tmp_path / "cache" / "index", kept)
        await apply(*arguments, **keys)

    monkeypatch.setattr(FarVolume, "apply", copying)
    await host.sync()
    await host.evict()
    await host.kill()
    assert await export(config, tmp_path / "new.raw") == 0
    assert (tmp_path / "new.raw").read_bytes() == bytes(model)
    # As if no commit had been behind the record: its intent is there (R12), and nothing of what it says.
    shutil.rmtree(tmp_path / "cache" / "index")
    shutil.copytree(kept, tmp_path / "cache" / "index")
    assert await export(config, tmp_path / "old.raw") == 0
    assert (tmp_path / "old.raw").read_bytes() == bytes(model)


async def test_a_device_without_a_volume(tmp_path: Path, run_dir: Path) -> None:
    image = random.Random(6).randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    host = await Host.start(config, run_dir)
    await host.attach()
    await host.read(0, MIB)
    await host.stop()
    plain = configs.parse(
        {key: value for key, value in config.to_document().items() if key != "volume"}, tmp_path / "b.toml"
    )
    assert await export(plain, tmp_path / "out.raw") == 0
    assert (tmp_path / "out.raw").read_bytes() == image


def test_a_file_that_comes_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.raw"

    def write() -> None:
        with new_file(path, replace=False) as descriptor:
            os.write(descriptor, b"ours")
            path.write_bytes(b"theirs")

    with pytest.raises(CacheError, match="is there already"):
        write()
    assert [each.name for each in tmp_path.iterdir()] == ["out.raw"]
    assert path.read_bytes() == b"theirs"


async def test_what_an_index_of_another_time_says_of_a_volume_is_no_image(
    tmp_path: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = local(tmp_path, random.Random(7).randbytes(IMAGE_BYTES))
    index, kept = tmp_path / "cache" / "index", tmp_path / "index"
    for data in (b"1", b"2"):
        host = await Host.start(config, run_dir)
        await host.attach()
        await host.write(0, data * PAGE_BYTES)
        await host.stop()
        if not kept.exists():
            shutil.copytree(index, kept)
    shutil.rmtree(index)
    shutil.copytree(kept, index)
    for words in ([], ["--holes"], ["--offline", "--holes"]):
        assert await export(config, tmp_path / "out.raw", *words) == CacheError.exit_code
        assert "not of the same time" in capfd.readouterr().err
    assert not (tmp_path / "out.raw").exists()


async def test_of_a_large_sparse_volume_only_what_it_has_is_read(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = 1 << 40
    image = random.Random(8).randbytes(IMAGE_BYTES)
    (tmp_path / "base.raw").write_bytes(image)
    document = local(tmp_path, image).to_document()
    document["volume"]["size"] = size_bytes
    config = configs.parse(document, tmp_path / "loc.toml")
    written_to = {at: bytes([n + 1]) * 3 * PAGE_BYTES for n, at in enumerate(
        [IMAGE_BYTES // PAGE_BYTES * PAGE_BYTES, 8 * MIB - PAGE_BYTES, 100 << 30, size_bytes - 3 * PAGE_BYTES]
    )}  # fmt: skip
    host = await Host.start(config, run_dir)
    await host.attach()
    for at, data in written_to.items():
        await host.write(at, data)
    await host.stop()
    read, windows = DeviceReader.read, list[int]()

    async def counting(reader: DeviceReader, offset_bytes: int, *others: Any) -> None:
        windows.append(offset_bytes)
        await read(reader, offset_bytes, *others)

    monkeypatch.setattr(DeviceReader, "read", counting)
    assert await export(config, tmp_path / "out.raw") == 0
    assert windows == [0, 8 * MIB, 100 << 30, size_bytes - 8 * MIB]
    assert (tmp_path / "out.raw").stat().st_size == size_bytes
    model = bytearray(image.ljust(16 * MIB, b"\0"))
    for at, data in written_to.items():
        assert piece_of(tmp_path / "out.raw", at, len(data)) == data
        if at < len(model):
            model[at : at + len(data)] = data
    assert piece_of(tmp_path / "out.raw", 0, len(model)) == model


async def test_a_device_of_that_name_that_another_cache_has_is_another_one(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = random.Random(9).randbytes(IMAGE_BYTES)
    config = local(tmp_path, image)
    plain = configs.parse(
        {key: value for key, value in config.to_document().items() if key != "volume"}, tmp_path / "b.toml"
    )
    host = await Host.start(config, run_dir)
    await host.attach()
    await host.stop()
    (tmp_path / "other.raw").write_bytes(bytes(IMAGE_BYTES))
    document = plain.to_document() | {"cache": {"dir": "/nowhere", "size": 16 * MIB}}
    url = f"file://{tmp_path}/other.raw"
    record = DeviceRecord(7, "loc", "/b.toml", document, url, IMAGE_BYTES, "", 1, 0, 1.0)
    records.write(run_dir / "other", record)
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) == "/dev/ublkc7" or exists(path))
    assert [each.name for _, each in orphans.waiting(1.0)] == ["loc"]
    assert await export(plain, tmp_path / "out.raw") == 0
    assert (tmp_path / "out.raw").read_bytes() == image


@pytest.mark.parametrize("words", [["/nowhere/there.toml"], ["no-such-device"]])
def test_what_there_is_nothing_of(
    words: list[str], tmp_path: Path, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "export", *words, str(tmp_path / "out")]) in (3, 6, 7)
    assert capfd.readouterr().err.startswith("tierblk: ")
    assert not (tmp_path / "out").exists()
