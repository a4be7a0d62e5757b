"""`tierblk cache verify`: what it finds in a directory, and that it changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache_rig import changed_index, run_directory
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk.cache.verify import verify
from tierblk.cli.entry import main
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError

IMAGE = os.urandom(70 * BLOCK_BYTES)
SIZE_BYTES = 80 * BLOCK_BYTES


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """With 70 blocks of a base, and 5 of a volume of which nobody else knows."""
    with run_directory(tmp_path) as memory:
        host = Host(tmp_path, memory)
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
    found = verify(host.directory, lambda done, total: seen.append((done, total)))
    assert content(host) == before
    assert found.violations == []
    assert seen == [(done, 70) for done in range(1, 71)]
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


def test_slots_shorter_than_the_superblock_says(host: Host) -> None:
    os.truncate(host.directory / "slots", 100 * BLOCK_BYTES)
    texts = [str(violation) for violation in verify(host.directory).violations]
    assert f"I5: slots has {100 * BLOCK_BYTES} bytes, and the superblock says {200 * BLOCK_BYTES}" in texts


def test_what_cannot_be_looked_into(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = VolumeDaemon(host, 200, IMAGE, SIZE_BYTES)
    with pytest.raises(CacheError, match="a daemon serves the cache directory"):
        verify(host.directory)
    daemon.stop(clean=False)
    found = verify(host.directory)
    assert (found.clean, found.violations) == (False, [])
    for path in (tmp_path, tmp_path / "nowhere"):
        assert main(["cache", "verify", str(path)]) == CacheError.exit_code
        assert "No such file or directory" in capsys.readouterr().err
    flip(host.directory / "index" / "data.mdb", 4096 + 16)
    with pytest.raises(CacheError, match="damaged"):
        verify(host.directory)
