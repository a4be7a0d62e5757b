"""`tierblk cache verify`: what it finds in a directory, and that it changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cache_rig import changed_index, run_directory
from tests.look_rig import cache_json
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk.cache.rows import entries_of, pack_row
from tierblk.cache.verify import verify
from tierblk.cache.view import State
from tierblk.cli import cache_verify
from tierblk.cli.entry import main
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError
from tierblk.rundir import RUN_DIR_VARIABLE

IMAGE = os.urandom(70 * BLOCK_BYTES)
SIZE_BYTES = 80 * BLOCK_BYTES


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """With 70 blocks of a base, and 5 of a volume of which nobody else knows."""
    with run_directory(tmp_path) as memory:
        host = Host(tmp_path, memory)
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(host.run_dir))
        daemon = VolumeDaemon(host, 200, IMAGE, SIZE_BYTES)
        assert daemon.door.read(0, len(IMAGE)) == IMAGE
        daemon.door.write(0, bytes(range(256)) * (5 * BLOCK_BYTES // 256))
        daemon.stop(clean=True)
        yield host


def content(host: Host) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(host.directory.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_good_directory(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    before, seen = content(host), []
    found = verify(host.directory, host.run_dir, lambda done, total: seen.append((done, total)))
    assert content(host) == before
    assert found.violations == []
    assert [total for _, total in seen] == [70] * len(seen)
    assert sorted(done for done, _ in seen) == [done for done, _ in seen]
    assert seen[-1] == (70, 70)
    kinds = {layer.record.kind: (layer.cached_bytes, layer.dirty_bytes) for layer in found.layers}
    assert kinds == {"base": (len(IMAGE), 0), "local": (5 * BLOCK_BYTES, 5 * BLOCK_BYTES)}
    assert main(["cache", "verify", str(host.directory)]) == 0
    said = capsys.readouterr()
    assert said.out.endswith(f"{host.directory} is well\n")
    assert "the volume vol" in said.out
    assert main(["cache", "verify", "--json", str(host.directory)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["slots"], document["violations"]) == (True, 199, [])
    assert [layer["dirty_bytes"] for layer in document["layers"]] == [0, 5 * BLOCK_BYTES]


def test_every_damage_is_named(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    with changed_index(host.directory) as index:
        entries = {layer.layer_id: dict(index.rows(layer.layer_id)) for layer in index.layers()}
        damaged = bytearray(entries[2][1] if 1 in entries[2] else entries[2][0])
        damaged[2] ^= 1
        index.write_rows({2: [(0, bytes(damaged))]})
    slot = int.from_bytes(entries[1][0][7 * 12 : 7 * 12 + 4], "little")  # of block 7 of the base
    flip(host.directory / "slots", slot * BLOCK_BYTES + 3 * PAGE_BYTES + 99)
    before = content(host)
    assert main(["cache", "verify", "--json", str(host.directory)]) == CacheError.exit_code
    document = json.loads(capsys.readouterr().out)
    assert content(host) == before
    found = {(v["invariant"], v["layer"], v["block"]): v["text"] for v in document["violations"]}
    assert set(found) == {("R9", 2, 0), ("I5", 1, 7)}
    assert found["I5", 1, 7] == f"page 3 in slot {slot} is not what was written there"
    assert main(["cache", "verify", str(host.directory)]) == CacheError.exit_code
    assert f"I5 layer 1 block 7: page 3 in slot {slot}" in capsys.readouterr().out


def test_a_thousand_flipped_bits(host: Host) -> None:
    """Each in a page of its own. One in a dirty page cannot be seen, and the page is counted as one of which
    nothing can be said."""
    with changed_index(host.directory) as index:
        rows = {layer.kind: dict(index.rows(layer.layer_id)) for layer in index.layers()}
    clean = [
        (row * 64 + i, page, entry.slot)
        for row, packed in rows["base"].items()
        for i, entry in enumerate(entries_of(packed))
        for page in range(16)
        if entry.cached >> page & 1
    ]
    dice = random.Random(7)
    flipped = dice.sample(clean, 1000)
    for _, page, slot in flipped:
        flip(host.directory / "slots", slot * BLOCK_BYTES + page * PAGE_BYTES + dice.randrange(PAGE_BYTES))
    dirty_slot = next(entry.slot for entry in entries_of(rows["local"][0]) if entry.slot)
    flip(host.directory / "slots", dirty_slot * BLOCK_BYTES + 5)
    before = content(host)
    found = verify(host.directory, host.run_dir)
    assert content(host) == before
    named = [(v.invariant, v.layer, v.block, v.text) for v in found.violations]
    assert len(named) == 1000
    assert set(named) == {
        ("I5", 1, block, f"page {page} in slot {slot} is not what was written there")
        for block, page, slot in flipped
    }
    base, volume = sorted(found.layers, key=lambda layer: layer.record.kind)
    assert {(bad.block, bad.slot): bad.pages for bad in base.bad} == {
        (block, slot): sum(1 << p for b, p, _ in flipped if b == block) for block, _, slot in flipped
    }
    assert (volume.unchecked_blocks, volume.bad) == (5, [])


def test_a_slot_with_two_owners(host: Host) -> None:
    with changed_index(host.directory) as index:
        entries = entries_of(dict(index.rows(1))[0])
        slot = entries[3].slot
        entries[9] = entries[3]
        index.write_rows({1: [(0, pack_row(entries))]})
    found = [str(v) for v in verify(host.directory, host.run_dir).violations if v.invariant == "I4"]
    assert found == [f"I4 layer 1 block 9: slot {slot} is also that of block 3 of layer 1"]


def test_a_busy_cache_is_well(host: Host, tmp_path: Path) -> None:
    """Blocks are filled, written and evicted, slots change hands, while it is looked through: nothing is
    wrong, whatever is seen of it half done."""
    host = Host(tmp_path / "busy", host.memory / "busy")
    daemon = VolumeDaemon(host, 60, IMAGE, SIZE_BYTES)  # fewer slots than blocks
    ends, failures = threading.Event(), list[BaseException]()

    def work() -> None:
        dice = random.Random(3)
        try:
            while not ends.is_set():
                block = dice.randrange(70)
                daemon.door.read(block * BLOCK_BYTES, BLOCK_BYTES)
                daemon.door.write(dice.randrange(10) * BLOCK_BYTES, dice.randbytes(PAGE_BYTES))
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(3):
            found = cache_json(host.run_dir, "verify", host.directory)
            assert (found["state"], found["violations"]) == ("served", [])
            assert found["checked_slots"] > 0
    finally:
        ends.set()
        worker.join(60)
        daemon.stop(clean=True)
    assert failures == []
    assert verify(host.directory, host.run_dir).violations == []


def test_beside_a_daemon_a_flipped_bit_is_found(host: Host) -> None:
    daemon = VolumeDaemon(host, 200, IMAGE, SIZE_BYTES)
    try:
        assert daemon.base is not None
        slot = entries_of(daemon.base.peek_row(0))[30].slot
        flip(host.directory / "slots", slot * BLOCK_BYTES + 2 * PAGE_BYTES)
        found = cache_json(host.run_dir, "verify", host.directory, code=CacheError.exit_code)
        text = f"page 2 in slot {slot} is not what was written there"
        assert found["violations"] == [{"invariant": "I5", "layer": 1, "block": 30, "text": text}]
        assert [layer["bad_pages"] for layer in found["layers"]] == [1, 0]
    finally:
        daemon.stop(clean=True)


def test_ctrl_c_ends_it_with_what_was_found(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(host.directory / "slots", 30 * BLOCK_BYTES)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    found = verify(host.directory, host.run_dir, interrupted)
    assert (found.complete, 0 < found.checked_slots < 70) == (False, True)

    @contextmanager
    def bar() -> Iterator[Callable[[int, int], None]]:
        yield interrupted

    monkeypatch.setattr(cache_verify, "_bar", bar)
    assert main(["cache", "verify", str(host.directory)]) == 130


def test_slots_shorter_than_the_superblock_says(host: Host) -> None:
    os.truncate(host.directory / "slots", 100 * BLOCK_BYTES)
    texts = [str(violation) for violation in verify(host.directory, host.run_dir).violations]
    assert f"I5: slots has {100 * BLOCK_BYTES} bytes, and the superblock says {200 * BLOCK_BYTES}" in texts


def test_what_cannot_be_looked_into(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, words in ((tmp_path, "it has no slots"), (tmp_path / "nowhere", "there is no cache directory")):
        assert main(["cache", "verify", str(path)]) == CacheError.exit_code
        assert words in capsys.readouterr().err
    flip(host.directory / "index" / "data.mdb", 4096 + 16)
    with pytest.raises(CacheError, match="damaged"):
        verify(host.directory, host.run_dir)


def test_beside_a_daemon_and_after_a_kill(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = VolumeDaemon(host, 200, IMAGE, SIZE_BYTES)
    daemon.door.write(20 * BLOCK_BYTES, b"w" * PAGE_BYTES)  # no commit knows of it
    found = cache_json(host.run_dir, "verify", host.directory)
    assert (found["state"], found["ok"], found["checked_slots"]) == ("served", True, 70)
    by_kind = {layer["kind"]: layer for layer in found["layers"]}
    assert by_kind["local"]["dirty_bytes"] == 5 * BLOCK_BYTES + PAGE_BYTES
    assert by_kind["local"]["unchecked_blocks"] == 6
    host.crash(kill=True)
    daemon.stop(clean=False)
    found_dead = verify(host.directory, host.run_dir)
    assert (found_dead.state, found_dead.clean, found_dead.violations) == (State.KILLED, False, [])
