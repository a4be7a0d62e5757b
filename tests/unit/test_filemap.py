"""Where files lie on an ext filesystem, compared with the bytes at these places."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tierblk.cli.filemap import extents_of_file
from tierblk.errors import DeviceError
from tierblk.units import MIB


@pytest.mark.parametrize("kind", ["ext4", "ext2"])
def test_the_blocks_of_a_file_are_found(kind: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a folder").mkdir(parents=True)
    data = {name: random.Random(name).randbytes(size) for name, size in
            (("a folder/one", 3 * MIB), ("two", 5000), ("empty", 0))}  # fmt: skip
    for name, content in data.items():
        (tree / name).write_bytes(content)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    made = subprocess.run(
        [f"mkfs.{kind}", "-q", "-d", str(tree), str(image)], capture_output=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stderr
    whole = image.read_bytes()
    for name, content in data.items():
        extents = extents_of_file(image, f"/{name}")
        assert extents == sorted(extents)
        # A file without extents has its indirect blocks among the others.
        found = [whole[extent.offset : extent.end] for extent in extents]
        if kind == "ext4":
            assert b"".join(found)[: len(content)] == content
        pages = {content[at : at + 1024] for at in range(0, len(content) - 1023, 1024)}
        there = {part[at : at + 1024] for part in found for at in range(0, len(part), 1024)}
        assert pages <= there
    for path in ("/none", "/a folder", "two", '/"', "/a\n"):
        with pytest.raises(DeviceError):
            extents_of_file(image, path)


def test_what_is_no_filesystem(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(MIB))
    with pytest.raises(DeviceError, match="no ext2, ext3 or ext4"):
        extents_of_file(tmp_path / "zeros", "/x")
