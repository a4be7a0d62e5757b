"""`tierblk cache stat`, `ls`, `blocks` and `dump`: what they say of a directory, dead and beside a daemon."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.cache_rig import changed_index, read_superblock, run_directory
from tests.look_rig import cache_command, cache_json
from tests.property.host import Host
from tests.property.volume_daemon import NAME, URL, VolumeDaemon
from tierblk import standing
from tierblk.cache.layers import LayerRecord, VolumeChange
from tierblk.cache.rows import entries_of, pack_row
from tierblk.cli.entry import main
from tierblk.control import ControlServer
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, DeviceError
from tierblk.remote import kept
from tierblk.remote.record import Head
from tierblk.rundir import RUN_DIR_VARIABLE

IMAGE = os.urandom(70 * BLOCK_BYTES - 5000)
SIZE_BYTES = 80 * BLOCK_BYTES
WRITTEN = b"written " * (3 * PAGE_BYTES // 8)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with run_directory(tmp_path) as memory:
        host = Host(tmp_path, memory)
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(host.run_dir))
        yield host


def begin(host: Host, slots: int = 200) -> VolumeDaemon:
    """20 blocks of the base and its last one; of the volume 3 pages of block 2, all of 75, zeros in 5."""
    daemon = VolumeDaemon(host, slots, IMAGE, SIZE_BYTES)
    daemon.door.read(0, 20 * BLOCK_BYTES)
    daemon.door.read(69 * BLOCK_BYTES, BLOCK_BYTES)
    daemon.door.write(2 * BLOCK_BYTES + PAGE_BYTES, WRITTEN)
    daemon.door.write(75 * BLOCK_BYTES, b"x" * BLOCK_BYTES)
    daemon.door.discard(5 * BLOCK_BYTES, BLOCK_BYTES)
    daemon.quiet(cycle_held=False)
    return daemon


def shown(offset: int, length: int) -> bytes:
    """What the device reads as."""
    content = bytearray(IMAGE.ljust(SIZE_BYTES, b"\0"))
    at = 2 * BLOCK_BYTES + PAGE_BYTES
    content[at : at + len(WRITTEN)] = WRITTEN
    content[75 * BLOCK_BYTES : 76 * BLOCK_BYTES] = b"x" * BLOCK_BYTES
    content[5 * BLOCK_BYTES : 6 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    return bytes(content[offset : offset + length])


def both(host: Host, *arguments: str | Path) -> list[Any]:
    """The document of a command beside a daemon, and after its end in order."""
    daemon = begin(host)
    try:
        beside = cache_json(host.run_dir, *arguments)
    finally:
        daemon.stop(clean=True)
    return [beside, cache_json(host.run_dir, *arguments)]


def test_stat(host: Host) -> None:
    for found, state in zip(both(host, "stat", host.directory), ("served", "ended"), strict=True):
        assert (found["state"], found["slots"], found["used_slots"]) == (state, 199, 23)
        assert found["free_slots"] == (None if state == "served" else 199 - 23)
        pages = 20 * 16 + -(-(len(IMAGE) - 69 * BLOCK_BYTES) // PAGE_BYTES)
        assert found["kinds"]["base"] == {
            "layers": 1,
            "slots": 21,
            "cached_bytes": pages * PAGE_BYTES,
            "zero_bytes": 0,
            "dirty_bytes": 0,
        }
        assert found["kinds"]["local"] == {
            "layers": 1,
            "slots": 2,
            "cached_bytes": 19 * PAGE_BYTES,
            "zero_bytes": BLOCK_BYTES,
            "dirty_bytes": 35 * PAGE_BYTES,
        }
        assert [(each["name"], each["bytes"]) for each in found["only_here"]] == [(NAME, 35 * PAGE_BYTES)]
        assert found["files"]["slots"] == found["size_bytes"] == 200 * BLOCK_BYTES


class Api:
    """What a daemon says of itself."""

    def info(self) -> dict[str, Any]:
        cache = {"free": 101, "quarantined": 7, "bad": 1, "commit_failure": None}
        return {"pid": os.getpid(), "cache_dir": "?", "config_path": "c", "started": 1, "cache": cache}

    async def snapshot(self) -> Any:
        raise AssertionError("nobody scrapes it")

    def devices(self) -> list[dict[str, Any]]:
        far = {"dirty_bytes": 4096, "dirty_since": 1_000_000.0}
        seen = {"hit_bytes": 300, "miss_bytes": 100, "url": URL, "validator": '"v1"'}
        return [
            {"name": NAME, "volume": "local", **seen, "write_back": far},
            {"name": "reader", "volume": None, **seen},
            {"name": "other", "volume": None, **seen, "validator": '"v2"'},
        ]


@contextmanager
def answering(host: Host) -> Iterator[None]:
    """A control socket beside the daemon of the test."""
    run_dir = host.run_dir / str(read_superblock(host.directory).uuid)
    api: Any = Api()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = ControlServer(api, run_dir)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
        yield
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def test_what_only_the_daemon_knows(host: Host) -> None:
    daemon = begin(host)
    try:
        with answering(host):
            found = cache_json(host.run_dir, "stat", host.directory)
            said = cache_command(host.run_dir, "stat", host.directory).decode()
            layers = cache_json(host.run_dir, "ls", host.directory)["layers"]
    finally:
        daemon.stop(clean=True)
    assert (found["pid"], found["daemon_trouble"]) == (os.getpid(), None)
    assert (found["free_slots"], found["quarantined_slots"], found["bad_slots"]) == (101, 7, 1)
    assert (found["hit_ratio"], found["oldest_dirty_since"]) == (0.75, 1_000_000.0)
    assert "101 free, 7 in quarantine, 1 bad" in said
    assert "75.0 % of what is not zero" in said
    base, volume = layers
    assert (base["devices"], base["volumes"]) == ([NAME, "reader"], [NAME])
    assert volume["devices"] == [NAME]


def test_ls_of_a_volume_in_object_storage(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host).stop(clean=True)
    uuid, writer = UUID(int=7), bytes(6) + b"web-1".ljust(10, b"\0")
    stands = standing.Standing(uuid, "s3://user:secret@bucket/web?X-Sig=secret", writer, held=True)
    stands = stands.intend(13, bytes(16)).fence("another host took it over")
    head = Head(uuid, 12, b"h" * 32, SIZE_BYTES, 0, None)
    record = LayerRecord(9, "write-back", "", SIZE_BYTES, "", int(time.time()), "web-1")
    with changed_index(host.directory) as index:
        index.put_layer(replace(record, damaged="a row is lost"))
        change = VolumeChange(standing.encode(stands), (kept.head_pair(head, 0, 0, 0, 0),))
        index.write_rows({9: []}, None, {9: change})
    assert main(["cache", "ls", str(host.directory), "--json"]) == 0
    said = capsys.readouterr().out
    layer = json.loads(said)["layers"][-1]
    assert layer["store"] == {
        "url": "s3://bucket/web?…",
        "uuid": str(uuid),
        "epoch": 12,
        "writer": "web-1 (000000000000)",
        "held": False,
        "fenced": "another host took it over",
        "attempts": 1,
    }
    assert (layer["damaged"], layer["devices"]) == ("a row is lost", [])
    assert main(["cache", "ls", str(host.directory)]) == 0
    table = capsys.readouterr()
    assert "secret" not in said + table.out + table.err
    assert "s3://bucket/web?…, epoch 12, not held by this cache, fenced: another host" in table.out
    assert "web-1 cannot be attached: a row is lost" in table.err


def test_blocks(host: Host) -> None:
    for found, served in zip(both(host, "blocks", host.directory, "0-400KiB"), (True, False), strict=True):
        volume, base = found["layers"]
        assert (volume["has_map"], base["kind"]) == (served, "base")
        assert [each["block"] for each in base["blocks"]] == list(range(7))
        second, fifth = volume["blocks"]
        assert (second["block"], second["present"], second["dirty"]) == (
            2,
            "0111" + "0" * 12,
            "0111" + "0" * 12,
        )
        assert (second["cached"], second["zero"]) == ("0111" + "0" * 12, "0" * 16)
        assert (fifth["block"], fifth["slot"], fifth["zero"]) == (5, None, "1" * 16)
        assert (fifth["offset_bytes"], fifth["length_bytes"]) == (5 * BLOCK_BYTES, BLOCK_BYTES)
        slots = [each["slot"] for each in base["blocks"]]
        assert all(slots)
        assert len(set(slots)) == 7


def test_blocks_as_text(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host).stop(clean=True)
    assert main(["cache", "blocks", str(host.directory), "block:1-6", "--layer", "volume"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"local layer 2: the volume {NAME}"
    fields = [line.split() for line in lines[2:]]
    assert [(each[0], each[-1]) for each in fields] == [
        ("1", "known"),
        ("2", ".DDD............"),
        ("3-4", "known"),
        ("5", "Z" * 16),
        ("6", "known"),
    ]
    assert fields[1][1] == "0x000000020000-0x000000030000"
    assert main(["cache", "blocks", str(host.directory), "block:69", "--layer", "base"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    pages = -(-(len(IMAGE) - 69 * BLOCK_BYTES) // PAGE_BYTES)
    assert f"-{len(IMAGE):#014x} " in line
    assert line.endswith("c" * pages + "." * (16 - pages))


def test_blocks_that_contradict_themselves_are_shown_as_they_are(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(host).stop(clean=True)
    with changed_index(host.directory) as index:
        entries = entries_of(dict(index.rows(1))[0])
        entries[3] = entries[3]._replace(zero=1)
        index.write_rows({1: [(0, pack_row(entries))]})
    assert main(["cache", "blocks", str(host.directory), "block:3", "--layer", "base"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("!ccccccccccccccc    present 0x0000  cached 0xffff  zero 0x0001  dirty 0x0000")


def test_blocks_with_sums(host: Host) -> None:
    daemon = begin(host)
    try:
        for code, fits in ((0, True), (CacheError.exit_code, False)):
            document = cache_json(host.run_dir, "blocks", host.directory, "block:2", "--sums", code=code)
            volume, base = (layer["blocks"][0] for layer in document["layers"])
            assert [(each["page"], each["fits"]) for each in volume["sums"]] == [(n, None) for n in (1, 2, 3)]
            assert [each["page"] for each in base["sums"]] == list(range(16))
            assert [each["fits"] for each in base["sums"]] == [page != 9 or fits for page in range(16)]
            with open(host.directory / "slots", "r+b") as slots:
                slots.seek(base["slot"] * BLOCK_BYTES + 9 * PAGE_BYTES)
                slots.write(b"\0")
    finally:
        daemon.stop(clean=True)


@pytest.mark.parametrize("text", ["0+20", "0x2fff0-0x31000", "block:2", "block:4-6", "75*", "69*"])
def test_dump_is_what_the_device_reads(host: Host, text: str) -> None:
    offset, length = {
        "0+20": (0, 20),
        "0x2fff0-0x31000": (0x2FFF0, 0x1010),
        "block:2": (2 * BLOCK_BYTES, BLOCK_BYTES),
        "block:4-6": (4 * BLOCK_BYTES, 3 * BLOCK_BYTES),
        "75*": (70 * BLOCK_BYTES, SIZE_BYTES - 70 * BLOCK_BYTES),
        "69*": (69 * BLOCK_BYTES + 7, 2 * BLOCK_BYTES),
    }[text]
    wanted = f"{offset}+{length}" if text.endswith("*") else text
    daemon = begin(host)
    try:
        arguments = ("dump", host.directory, wanted, "--raw")
        assert daemon.door.read(offset // 512 * 512, 512)  # it goes on
        assert cache_command(host.run_dir, *arguments) == shown(offset, length)
    finally:
        daemon.stop(clean=True)
    assert cache_command(host.run_dir, *arguments) == shown(offset, length)


def test_dump_as_text(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host).stop(clean=True)
    assert main(["cache", "dump", str(host.directory), "0x4affe0+0x20"]) == 0
    assert capsys.readouterr().out == (
        "004affe0  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n*\n004b0000\n"
    )


def test_dump_of_what_is_not_cached_prints_nothing(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host).stop(clean=True)
    assert main(["cache", "dump", str(host.directory), "all"]) == CacheError.exit_code
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()[0]) == ("", "tierblk: not cached: 0x140000+3136KiB")
    assert main(["cache", "dump", str(host.directory), "1GiB+1"]) == DeviceError.exit_code
    assert "the range begins behind the end of vol" in capsys.readouterr().err
    for bad in ("5", "7-7", "block:x", "1+0", "9EiB+1"):
        with pytest.raises(SystemExit) as caught:
            main(["cache", "dump", str(host.directory), bad])
        assert caught.value.code == 2


def test_dump_of_a_damaged_page(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host).stop(clean=True)
    with changed_index(host.directory) as index:
        slot = entries_of(dict(index.rows(1))[0])[4].slot
    with open(host.directory / "slots", "r+b") as slots:
        slots.seek(slot * BLOCK_BYTES + PAGE_BYTES)
        slots.write(b"bitrot")
    assert main(["cache", "dump", str(host.directory), "block:4"]) == CacheError.exit_code
    assert "the cached page at 0x41000 is not what was written there" in capsys.readouterr().err
    assert main(["cache", "dump", str(host.directory), "0x42000+4KiB"]) == 0


READING = """
import random, sys
from pathlib import Path
from tierblk.cache.reading import Missing, Reader
from tierblk.cache.view import look
from tierblk.errors import CacheError
from tierblk.extent import Extent
image = Path(sys.argv[3]).read_bytes()
dice, good, missing = random.Random(5), 0, 0
with look(Path(sys.argv[1]), Path(sys.argv[2])) as view:
    base = next(record for record in view.records if record.kind == "base")
    reader = Reader(view, [base], base.size_bytes)
    while good < 3000:
        at = dice.randrange(70) * 65536
        try:
            (part,) = reader.read(Extent(at, min(65536, len(image) - at)))
        except Missing:
            missing += 1
            continue
        assert part == image[at : at + 65536], at
        good += 1
print(good, missing)
"""


def test_slots_that_change_hands_while_they_are_read(host: Host, tmp_path: Path) -> None:
    """Never one block's bytes under another's name."""
    daemon = VolumeDaemon(host, 60, IMAGE, SIZE_BYTES)  # fewer slots than blocks
    (tmp_path / "image").write_bytes(IMAGE)
    ends, failures = threading.Event(), list[BaseException]()

    def work() -> None:
        dice = random.Random(3)
        try:
            while not ends.is_set():
                at = dice.randrange(70) * BLOCK_BYTES
                daemon.door.read(at, min(BLOCK_BYTES, len(IMAGE) - at) // 512 * 512)
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        paths = (host.directory, host.run_dir, tmp_path / "image")
        command = [sys.executable, "-c", READING, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=100, text=True)
    finally:
        ends.set()
        worker.join(60)
        daemon.stop(clean=True)
    assert (done.returncode, failures) == (0, []), done.stderr
    good, missing = map(int, done.stdout.split())
    assert good == 3000
    assert missing > 0, "blocks were evicted"
