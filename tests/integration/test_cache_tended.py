"""Evict, pin, gc and resize of a directory that nobody serves. A daemon does the same (tending.py)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import CacheRig, changed_index, check_files, image_bytes, run_directory, session
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk import config as configs
from tierblk import tending
from tierblk.bases import Bases
from tierblk.cache import look
from tierblk.care import Care
from tierblk.cli.entry import main
from tierblk.core import BLOCK_BYTES, LocalDoor
from tierblk.errors import CacheError, DeviceError, TooMuch
from tierblk.extent import Extent
from tierblk.units import MIB

IMAGE = image_bytes(7, 100)
LIMIT_S = 20.0


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with run_directory(tmp_path) as path:
        monkeypatch.setenv("TIERBLK_RUN_DIR", str(path))
        yield path


async def filled(directory: Path, run_dir: Path, *names: str) -> dict[str, int]:
    """A directory with twenty blocks of each image; layer ids by name."""
    async with session(directory, run_dir) as rig:
        layers = {name: await rig.base(IMAGE, name) for name in names}
        for layer in layers.values():
            await rig.fill(layer, *range(20))
        return {name: layer.layer_id for name, layer in layers.items()}


async def command(*words: str | Path) -> int:
    return await asyncio.to_thread(main, ["cache", *map(str, words)])


def cached(directory: Path, run_dir: Path) -> dict[int, set[int]]:
    with look(directory, run_dir) as view:
        return {
            record.layer_id: {block for block, entry in view.layer(record).entries() if entry.cached}
            for record in view.records
        }


async def test_blocks_that_lie_in_a_range_in_whole_are_evicted(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    ids = await filled(cache, run_dir, "a", "b")
    assert await command("evict", cache, "70000-0x90000", "--device", str(ids["a"]), "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["layers"]
    assert found == {
        "layer_id": ids["a"],
        "evicted_bytes": 7 * BLOCK_BYTES,
        "dirty_bytes": 0,
        "busy_bytes": 0,
    }
    there = cached(cache, run_dir)
    assert there == {ids["a"]: {0, 1, *range(9, 20)}, ids["b"]: set(range(20))}
    assert await command("evict", cache, "all", "--device", str(ids["a"])) == 0
    assert capsys.readouterr().out == f"{13 * 64} KiB evicted\n"
    assert cached(cache, run_dir).get(ids["a"], set()) == set()
    assert check_files(cache) == []


def test_what_is_dirty_stays_and_is_named(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(tmp_path, run_dir)
    daemon = VolumeDaemon(host, 500, IMAGE, len(IMAGE))
    daemon.door.read(0, len(IMAGE))
    daemon.door.write(0, b"d" * BLOCK_BYTES)
    daemon.stop(clean=True)
    assert main(["cache", "evict", str(host.directory), "all", "--device", "vol"]) == 0
    assert "stay: nobody else has them" in capsys.readouterr().out
    with look(host.directory, host.run_dir) as view:
        left = {r.kind: dict(view.layer(r).entries()) for r in view.records}
    assert list(left["local"]) == [0]
    assert not left.get("base")


async def test_what_is_pinned_outlives_evictions_and_restarts(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    (layer_id,) = (await filled(cache, run_dir, "a")).values()
    assert await command("pin", cache, "block:3-5") == 0
    assert await command("pin", cache, "block:40", "--json") == 0
    out = capsys.readouterr().out
    pins = [[3 * BLOCK_BYTES, 3 * BLOCK_BYTES], [40 * BLOCK_BYTES, BLOCK_BYTES]]
    assert json.loads(out[out.index("{") :])["layers"] == [{"layer_id": layer_id, "pins": pins}]
    async with session(cache, run_dir) as rig:
        layer = await rig.base(IMAGE)  # it is used again, and is as pinned as before
        await rig.fill(layer, 40, 41)
        await rig.evict(1000)
        await rig.evict(1000)
        assert sorted(_blocks(rig, layer_id)) == [3, 4, 5, 40]
    assert await command("pin", cache, "block:4", "--remove") == 0
    assert await command("pin", cache) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows == [["1", at, "64KiB"] for at in ("192KiB", "320KiB", "2560KiB")]
    async with session(cache, run_dir) as rig:
        await rig.evict(1000)
        assert sorted(_blocks(rig, layer_id)) == [3, 5, 40]
    async with session(cache, run_dir) as rig:
        await rig.base(image_bytes(8, 200), "large")
        await rig.fill(rig.cache.layer(2), 0)
    assert await command("pin", cache, f"0+{9 * MIB}", "--device", "2") == CacheError.exit_code
    assert "this cache may keep 8 MiB pinned" in capsys.readouterr().err


def _blocks(rig: CacheRig, layer_id: int) -> Iterator[int]:
    from tierblk.cache.rows import entries_of

    layer = rig.cache.layer(layer_id)
    for row in range(layer.rows):
        for block, entry in enumerate(entries_of(layer.peek_row(row)), row * 64):
            if entry.cached:
                yield block


async def test_pins_outlive_a_restart_of_which_nothing_was_cached(tmp_path: Path, run_dir: Path) -> None:
    cache = tmp_path / "cache"
    await filled(cache, run_dir, "a")
    assert await command("pin", cache, "block:1-2") == 0
    assert await command("evict", cache, "all") == 0
    for _ in range(2):
        async with session(cache, run_dir):
            pass
    with look(cache, run_dir) as view:
        assert [record.pins for record in view.records] == [((1, 3),)]


async def test_an_image_that_nobody_uses_is_collected(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    async with session(cache, run_dir) as rig:
        bases = {name: await rig.base(IMAGE, name) for name in ("used", "pinned", "under", "old", "new")}
        for layer in bases.values():
            await rig.fill(layer, 0, 1)
        under = ("http://images.example/under.raw", len(IMAGE), 'etag:"under"')
        volume = await rig.cache.volume_layer("vol", "local", len(IMAGE), under)
        door = LocalDoor(rig.cache.engine, None, volume=volume)
        await asyncio.to_thread(door.write, 0, b"v" * BLOCK_BYTES)
        door.quit()
        await asyncio.to_thread(door.close)
        await rig.cache.pin(bases["pinned"].layer_id, 0, 1, pinned=True)
        ids = {layer.layer_id: name for name, layer in bases.items()}
    with changed_index(cache) as index:
        for record in index.layers():
            if ids.get(record.layer_id) != "new":
                index.put_layer(_used(record, time.time() - 90_000))
    async with session(cache, run_dir) as rig:
        in_use = [i for i, name in ids.items() if name == "used"]
        found = await tending.collect(rig.cache, older_s=86_400, dry_run=True, in_use=in_use)
        assert [ids[layer["layer_id"]] for layer in found["layers"]] == ["old"]
        assert found["cached_bytes"] == 2 * BLOCK_BYTES
    assert await command("gc", cache, "--dry-run") == 0
    assert "256 KiB would be free" in capsys.readouterr().out
    assert await command("gc", cache, "--json") == 0
    gone = {ids[layer["layer_id"]] for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert gone == {"old", "used"}
    assert {ids[i] for i in cached(cache, run_dir) if i in ids} == {"pinned", "under", "new"}
    assert check_files(cache) == []
    async with session(cache, run_dir) as rig:  # its room is free, and it can come again
        free = rig.cache.stats()["free"]
        layer = await rig.base(IMAGE, "old")
        await rig.fill(layer, 5)
        assert rig.cache.stats()["free"] == free - 1
    assert await command("gc", cache) == 0
    assert "every image is used, or was lately" in capsys.readouterr().out


def _used(record: Any, unix_s: float) -> Any:
    return replace(record, used_unix_s=int(unix_s))


async def test_a_directory_gets_another_size(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    await filled(cache, run_dir, "a")
    assert await command("resize", cache, "24MiB") == 0
    assert capsys.readouterr().out == f"{cache}: 24 MiB, was 16 MiB\n"
    assert (cache / "slots").stat().st_size == 24 * MIB
    config = tmp_path / "a.toml"
    config.write_text(
        f'[device]\nname = "a"\n[base]\nurl = "file:///x"\n[cache]\ndir = "{cache}"\nsize = "24MiB"\n'
    )
    assert await command("resize", config, "16MiB", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "directory": str(cache),
        "size_bytes": 16 * MIB,
        "before_bytes": 24 * MIB,
    }
    assert 'let it say "16MiB" too' in said.err
    assert await command("resize", cache, "1MiB") == 3
    assert "SIZE" in capsys.readouterr().err
    assert check_files(cache) == []


async def test_a_directory_that_is_served_or_strange_is_left_alone(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    rig = await CacheRig.open(cache, run_dir)
    layer = await rig.base(IMAGE)
    await rig.fill(layer, *range(5))
    await rig.end(clean=False)  # killed: its maps are there
    before = cached(cache, run_dir)
    for words in (["evict", cache, "all"], ["pin", cache, "block:1"], ["resize", cache, "24MiB"]):
        assert await command(*map(str, words)) == CacheError.exit_code
        assert "was killed" in capsys.readouterr().err
    assert cached(cache, run_dir) == before


async def test_ranges_are_clamped(tmp_path: Path, run_dir: Path) -> None:
    short = IMAGE[: 10 * BLOCK_BYTES - 512]
    async with session(tmp_path / "cache", run_dir) as rig:
        layer = await rig.base(short)
        rig.images[layer.layer_id] = short
        await rig.read(layer, 8)
        await asyncio.to_thread(rig.door(layer).read, 9 * BLOCK_BYTES, BLOCK_BYTES - 512)
        await rig.settle()
        found = await tending.evict(rig.cache, layer.layer_id, [Extent(9 * BLOCK_BYTES, 1 << 40)])
        assert found["evicted_bytes"] == BLOCK_BYTES
        pinned = await tending.pin(rig.cache, layer.layer_id, [Extent(1 << 50, 5)], pinned=True)
        assert pinned["pins"] == []
        with pytest.raises(DeviceError, match="has no layer 99"):
            await tending.evict(rig.cache, 99, [])


async def test_an_image_that_is_opened_while_others_go_stays(tmp_path: Path, run_dir: Path) -> None:
    async with session(tmp_path / "cache", run_dir) as rig:
        first, second = [await rig.base(IMAGE, name) for name in ("first", "second")]
        await rig.fill(first, 0)
        await rig.fill(second, 0)
        await rig.end_doors()
        in_use = list[int]()
        commit = rig.cache.commit

        async def commits() -> Any:
            in_use.append(second.layer_id)  # an attach was faster
            return await commit()

        rig.cache.commit = commits  # type: ignore[method-assign]
        found = await tending.collect(rig.cache, older_s=-10, dry_run=False, in_use=in_use)
        assert [layer["layer_id"] for layer in found["layers"]] == [first.layer_id]
        assert [record.layer_id for record in rig.cache.records] == [second.layer_id]
        assert second.cached_pages() == 16


async def test_an_image_is_not_collected_between_its_layer_and_its_use(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "base.raw").write_bytes(IMAGE)
    document = {
        "device": {"name": "dev"},
        "base": {"url": f"file://{tmp_path}/base.raw"},
        "cache": {"dir": str(tmp_path / "cache"), "size": 16 * MIB},
    }
    config = configs.parse(document, tmp_path / "dev.toml")
    async with session(tmp_path / "cache", run_dir) as rig:

        async def nothing(layer_id: int) -> None:
            """There are no fetches."""

        bases = Bases(rig.cache, nothing)
        care = Care(rig.cache, bases.by_layer, lambda: bases.opening)
        await bases.release(await bases.open(config, "before"), "before")
        async with rig.cache._opening:
            opening = asyncio.create_task(bases.open(config, "dev"))
            async with asyncio.timeout(LIMIT_S):
                while not (bases.opening and rig.cache._opening._waiters):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            collecting = asyncio.create_task(care.collect(older_s=-10, dry_run=False))
            async with asyncio.timeout(LIMIT_S):  # it waits for the lock, or found nothing to do
                while not collecting.done() and len(rig.cache._opening._waiters) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        base = await opening
        await collecting
        assert [record.layer_id for record in rig.cache.records] == [base.layer.layer_id]
        await bases.release(base, "dev")


async def test_a_pin_of_a_layer_that_is_being_dropped_is_refused(tmp_path: Path, run_dir: Path) -> None:
    async with session(tmp_path / "cache", run_dir) as rig:
        layer = await rig.base(IMAGE)
        async with rig.cache._opening:
            dropping = asyncio.create_task(rig.cache.drop_base(layer.layer_id, lambda record: True))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            pinning = asyncio.create_task(tending.pin(rig.cache, layer.layer_id, [Extent(0, 1)], pinned=True))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert await dropping
        with pytest.raises(CacheError, match="no layer"):
            await pinning


async def test_of_too_many_pins_some_can_be_taken_back(tmp_path: Path, run_dir: Path) -> None:
    """Of a directory that was made smaller."""
    cache = tmp_path / "cache"
    async with session(cache, run_dir) as rig:
        layer = await rig.base(IMAGE)
        await rig.cache.pin(layer.layer_id, 0, 50, pinned=True)
    with changed_index(cache) as index:
        (record,) = index.layers()
        most = (16 * MIB // BLOCK_BYTES) // 2
        index.put_layer(replace(record, pins=((0, most + 50),)))
    async with session(cache, run_dir) as rig:
        await rig.cache.pin(record.layer_id, 0, 10, pinned=False)
        assert rig.cache.records[0].pins[0][0] == 10
        with pytest.raises(TooMuch):
            await rig.cache.pin(record.layer_id, 0, 1, pinned=True)


async def test_pages_that_are_in_use_are_named(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(tmp_path / "cache", run_dir) as rig:
        layer = await rig.base(IMAGE)
        await rig.fill(layer, 0, 1)
        drop = layer.drop
        monkeypatch.setattr(layer, "drop", lambda block, mask: None if block == 1 else drop(block, mask))
        found = tending.drop(rig.cache, layer.layer_id, [(0, 0b11), (1, 0b110), (2, 1), (1 << 40, 1)])
        assert found == {"layer_id": layer.layer_id, "dropped_pages": 2, "busy_blocks": [1]}


async def test_what_runs_when_the_cache_is_closed_ends_in_an_error(tmp_path: Path, run_dir: Path) -> None:
    """Nothing touches an engine that is gone."""
    rig = await CacheRig.open(tmp_path / "cache", run_dir)
    layer = await rig.cache.base_layer("http://images.example/large.raw", 1 << 40, "large")
    calls: list[Coroutine[Any, Any, Any]] = [
        rig.cache.evict(layer.layer_id, 0, layer.blocks),
        tending.evict(rig.cache, layer.layer_id, [Extent(0, 1 << 40), Extent(0, 1 << 40)]),
    ]
    running = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not any(task.done() for task in running)
    await rig.end(clean=True)
    running += [
        asyncio.create_task(rig.cache.pin(layer.layer_id, 0, 1, pinned=True)),
        asyncio.create_task(rig.cache.drop_base(layer.layer_id, lambda record: True)),
        asyncio.create_task(tending.collect(rig.cache, older_s=-10, dry_run=False)),
    ]
    for task in running:
        with pytest.raises(CacheError, match="is closed"):
            await task
