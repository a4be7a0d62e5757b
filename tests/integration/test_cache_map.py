"""`tierblk cache map` of real cache directories: what a stack of volume and base holds, beside a daemon and
after it, and what its partitions hold as far as their first bytes are cached."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from tests.cache_rig import changed_index, run_directory
from tests.integration.test_cache_verify import content
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk.cache.directory import SLOTS
from tierblk.cache.heat import Heat, heat, knows_use, total
from tierblk.cache.layers import LayerRecord
from tierblk.cache.reading import Reader
from tierblk.cache.view import View, look
from tierblk.cli import main
from tierblk.core import BLOCK_BYTES, PAGE_BYTES
from tierblk.errors import CacheError, DeviceError

MIB = 1 << 20
IMAGE_BYTES = 32 * MIB - PAGE_BYTES
DEVICE_BYTES = 40 * MIB
ROOT_START = 4 * MIB
LABEL = "r\u00f6\u00f6t"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk with an ext4 in its second partition, and random bytes where nothing is."""
    folder = tmp_path_factory.mktemp("image")
    disk, filesystem = folder / "disk", folder / "fs"
    disk.write_bytes(bytes(IMAGE_BYTES))
    script = "label: gpt\nsize=1MiB\nstart=4MiB, size=16MiB, name=root\nsize=4MiB\n"
    subprocess.run(["/sbin/sfdisk", "-q", disk], input=script, text=True, check=True, timeout=30)
    command = ["/sbin/mke2fs", "-q", "-t", "ext4", "-L", LABEL, str(filesystem), "16M"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    data = bytearray(disk.read_bytes())
    data[ROOT_START : ROOT_START + 16 * MIB] = filesystem.read_bytes()
    data[21 * MIB : 30 * MIB] = os.urandom(9 * MIB)
    return bytes(data)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with run_directory(tmp_path) as memory:
        host = Host(tmp_path, memory)
        monkeypatch.setenv("TIERBLK_RUN_DIR", str(host.run_dir))
        monkeypatch.setenv("COLUMNS", "80")
        yield host


def begin(host: Host, image: bytes) -> VolumeDaemon:
    daemon = VolumeDaemon(host, 800, image, DEVICE_BYTES)
    daemon.door.read(0, 5 * PAGE_BYTES)
    daemon.door.read(22 * MIB, 4 * BLOCK_BYTES)
    daemon.door.write(22 * MIB + BLOCK_BYTES, b"v" * (BLOCK_BYTES + PAGE_BYTES))  # hides what was read
    daemon.door.write(36 * MIB, b"v" * PAGE_BYTES)  # behind the image
    daemon.door.discard(26 * MIB, 2 * BLOCK_BYTES)
    daemon.door.flush()
    daemon.quiet(cycle_held=False)
    return daemon


def run(*arguments: str | Path) -> Any:
    """In a process of its own: the test's has the daemon."""
    command = [sys.executable, "-m", "tierblk", "cache", "map", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def records(view: View) -> tuple[LayerRecord, LayerRecord]:
    kinds = {record.kind: record for record in view.records}
    return kinds["local"], kinds["base"]


def test_shares_of_a_stack(host: Host, image: bytes) -> None:
    begin(host, image).stop(clean=True)
    with look(host.directory, host.run_dir) as view:
        volume, base = records(view)
        blocks = DEVICE_BYTES // BLOCK_BYTES
        at = 22 * MIB // BLOCK_BYTES
        cells = heat(view, volume, base, [0, at, at + 1, at + 4, 26 * 16, 26 * 16 + 2, 36 * 16, blocks])
        assert not knows_use(view, volume, base)
        assert cells[1] == Heat(base=BLOCK_BYTES)
        written = BLOCK_BYTES + PAGE_BYTES
        assert cells[2] == Heat(dirty=written, base=3 * BLOCK_BYTES - written)
        assert cells[4] == Heat(dirty=2 * BLOCK_BYTES)
        assert cells[6] == Heat(dirty=PAGE_BYTES, zero=4 * MIB - PAGE_BYTES)
        assert sum(cell.size_bytes for cell in cells) == DEVICE_BYTES
        fine = total(heat(view, volume, base, range(blocks + 1)))
        assert fine == total(cells)
        assert heat(view, None, base, [at, at + 4]) == [Heat(base=4 * BLOCK_BYTES)]
        (alone,) = heat(view, volume, None, [at, at + 4])
        assert alone == Heat(dirty=written, absent=4 * BLOCK_BYTES - written)


def test_what_a_volume_lost_is_not_absent(host: Host, image: bytes) -> None:
    begin(host, image).stop(clean=True)
    with changed_index(host.directory) as index:
        (record,) = (one for one in index.layers() if one.kind == "local")
        row = 22 * 16 // 64
        packed = bytearray(dict(index.rows(record.layer_id))[row])
        packed[0] ^= 1
        index.write_rows({record.layer_id: [(row, bytes(packed))]})
    with look(host.directory, host.run_dir) as view:
        volume, base = records(view)
        for kind in ("local", "write-back"):  # what a store has may be older than what was acknowledged
            cells = heat(view, replace(volume, kind=kind), base, [0, row * 64, row * 64 + 60, row * 64 + 80])
            assert cells[1] == Heat(lost=60 * BLOCK_BYTES)
            assert cells[2].lost == 4 * BLOCK_BYTES


def test_bytes_that_are_here(host: Host, image: bytes) -> None:
    begin(host, image).stop(clean=True)
    with look(host.directory, host.run_dir) as view:
        read = Reader(view, [*records(view)], DEVICE_BYTES).peek
        assert read(100, 5000) == image[100:5100]
        assert read(22 * MIB, BLOCK_BYTES + 10) == image[22 * MIB :][:BLOCK_BYTES] + b"v" * 10
        assert read(26 * MIB + 5, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert read(36 * MIB, 2 * PAGE_BYTES) == b"v" * PAGE_BYTES + bytes(PAGE_BYTES)
        assert read(28 * MIB, 1) is None
        assert read(22 * MIB + 4 * BLOCK_BYTES - 1, 2) is None
        assert read(DEVICE_BYTES - 5, 100) == bytes(5)
        assert read(DEVICE_BYTES, 100) == b""


def test_bytes_that_do_not_fit_their_sums_are_not_taken_for_a_partition_table(
    host: Host, image: bytes
) -> None:
    begin(host, image).stop(clean=True)
    with look(host.directory, host.run_dir) as view:
        slot = view.layer(records(view)[1]).entry(0).slot
    before = json.loads(run(host.directory, "--json").stdout)
    with (host.directory / SLOTS).open("r+b") as file:
        file.seek(slot * BLOCK_BYTES + 446)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    after = json.loads(run(host.directory, "--json").stdout)
    assert (before["partition_table_cached"], len(before["partitions"]) > 0) == (True, True)
    assert (after["partition_table_cached"], after["partitions"]) == (False, [])
    assert after["cells"] == before["cells"]


def test_beside_a_daemon(host: Host, image: bytes) -> None:
    daemon = begin(host, image)
    try:
        # what is used again after a 64th of the slots was filled does not belong to a scan
        for offset, length in ((ROOT_START, 2 * PAGE_BYTES), (24 * MIB, MIB), (ROOT_START, 2 * PAGE_BYTES)):
            daemon.door.read(offset, length)
            daemon.quiet(cycle_held=False)
        result = run(host.directory, "--json")
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
    finally:
        daemon.stop(clean=True)
    assert (found["state"], found["device"], found["cell_bytes"]) == ("served", "vol", BLOCK_BYTES)
    assert found["layers"] == ["local volume vol", "http://images.example/base.raw"]
    sums = found["total"]
    assert sum(sums[name] for name in sums if name != "used_bytes") == DEVICE_BYTES
    assert sums["used_bytes"] > 0
    for name, amount in sums.items():
        assert sum(found["cells"][name]) == amount
    assert found["partition_table"] == "gpt"
    first, root, last = found["partitions"]
    assert (root["number"], root["start_bytes"], root["name"]) == (2, ROOT_START, "root")
    assert (root["contents"]["kind"], root["contents"]["label"]) == ("ext4", LABEL)
    assert root["contents"]["total_bytes"] == 16 * MIB
    assert (first["contents"], first["contents_cached"]) == (None, False)
    assert sum(last["in_range"][name] for name in last["in_range"] if name != "used_bytes") == 4 * MIB


def test_of_a_directory_that_nobody_serves(
    host: Host, image: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(host, image).stop(clean=True)
    before = content(host)
    assert main(["cache", "map", str(host.directory)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "vol: 40 MiB, its daemon has ended"
    assert max(map(len, lines)) <= 80
    assert "not cached" in next(line for line in lines if line.startswith("2 "))
    assert any(line.startswith("What was used lately is not known") for line in lines)
    assert main(["cache", "map", str(host.directory), "--width", "200", "--range", "22MiB+1"]) == 0
    wide = capsys.readouterr().out.splitlines()
    assert wide[3] == "    22 MiB B"
    assert content(host) == before


def test_pictures(host: Host, image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host, image).stop(clean=True)
    svg, png = tmp_path / "map.svg", tmp_path / "map.png"
    assert main(["cache", "map", str(host.directory), "--svg", str(svg), "--png", str(png)]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"wrote {svg}\nwrote {png}\n")
    root = ElementTree.fromstring(svg.read_bytes())
    size = tuple(round(2 * float(root.attrib[name])) for name in ("width", "height"))
    assert Image.open(io.BytesIO(png.read_bytes())).size == size
    assert main(["cache", "map", str(host.directory), "--svg", str(tmp_path / "no" / "map.svg")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_one_layer(host: Host, image: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    begin(host, image).stop(clean=True)
    totals = {}
    for layer in ("volume", "base"):
        assert main(["cache", "map", str(host.directory), "--json", "--layer", layer]) == 0
        totals[layer] = json.loads(capsys.readouterr().out)["total"]
    assert "used_bytes" not in totals["volume"]
    assert totals["volume"]["base_bytes"] == totals["base"]["dirty_bytes"] == 0
    assert totals["volume"]["dirty_bytes"] == 3 * BLOCK_BYTES + 2 * PAGE_BYTES
    assert totals["base"]["base_bytes"] >= 4 * BLOCK_BYTES
    base = "http://images.example/base.raw"
    assert main(["cache", "map", str(host.directory), "--device", base, "--layer", "volume"]) == 7
    assert "has no volume of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--range", "40MiB+1"], DeviceError.exit_code, "the range begins behind the end of"),
        (["--device", "vom"], DeviceError.exit_code, 'is called "vom"'),
        (["--range", "40MiB"], 2, "a range is OFFSET+LENGTH"),
        (["--range", "1+0"], 2, "a range has at least one byte"),
        (["--range", "x+1"], 2, "a size is a number of bytes"),
        (["--width", "10"], 2, "40 or more"),
    ],
)
def test_wrong_arguments(
    host: Host, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    VolumeDaemon(host, 100, bytes(MIB), DEVICE_BYTES).stop(clean=True)
    command = ["cache", "map", str(host.directory), *arguments]
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(command)
    else:
        assert main(command) == code
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("damage", ["slots gone", "slots foreign", "index cut", "index gone", "empty"])
def test_a_damaged_directory_is_one_error(
    host: Host, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    VolumeDaemon(host, 100, bytes(MIB), DEVICE_BYTES).stop(clean=True)
    data = host.directory / "index" / "data.mdb"
    if damage == "slots gone":
        (host.directory / "slots").unlink()
    elif damage == "slots foreign":
        (host.directory / "slots").write_bytes(os.urandom(1 << 17))
    elif damage == "index cut":
        os.truncate(data, 5000)
    elif damage == "index gone":
        data.unlink()
    else:
        for path in sorted(host.directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert main(["cache", "map", str(host.directory)]) == CacheError.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if not line.startswith("hint:")]
    assert len(errors) == 1
    assert errors[0].startswith("tierblk: ")


def test_a_device_of_which_nothing_is_cached(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    VolumeDaemon(host, 100, os.urandom(MIB), MIB).stop(clean=True)
    assert main(["cache", "map", str(host.directory)]) == 0
    out = capsys.readouterr().out
    assert "       0 B ................\n" in out
    assert "The partition table is not known: the device's first sectors are not cached." in out
