"""Map files: believed only with exactly the right header, which is there only when the map is complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cache_rig import mounted
from tierblk.cache import maps as maps_module
from tierblk.cache.maps import Maps, Stamp, boot_id, pack_stamp, unpack_stamp
from tierblk.cache.superblock import Superblock
from tierblk.core import MAP_HEADER_BYTES, crc32c, map_bytes
from tierblk.errors import CacheError

SIZE_BYTES = 200 * 65536 + 512
SUPERBLOCK = Superblock(UUID(int=5), 256, 0, sequence=9, session=8, confirmed=7)
BOOT = UUID(int=6)
U64 = st.integers(0, 2**64 - 1)


def make(run_dir: Path, boot: UUID = BOOT) -> Maps:
    return Maps(run_dir, SUPERBLOCK, boot)


@pytest.fixture
def maps(tmp_path: Path) -> Iterator[Maps]:
    """Of a cache with one stamped map, that of layer 3 in session 7."""
    maps = make(tmp_path)
    os.pwrite(maps.create(3, SIZE_BYTES), b"entry", MAP_HEADER_BYTES)
    maps.stamp(3, 7)
    yield maps
    maps.close()


def is_current(maps: Maps, run_dir: Path, superblock: Superblock = SUPERBLOCK, boot: UUID = BOOT) -> bool:
    """Whether another opening would believe the map of layer 3."""
    other = Maps(run_dir, superblock, boot)
    try:
        return other.open_current(3, SIZE_BYTES, superblock) is not None
    finally:
        other.close()


@given(st.builds(Stamp, st.uuids(), st.uuids(), U64, st.integers(0, 2**32 - 1), U64))
def test_what_is_packed_is_unpacked(stamp: Stamp) -> None:
    header = pack_stamp(stamp)
    assert len(header) == MAP_HEADER_BYTES
    assert unpack_stamp(header) == stamp


@given(st.integers(0, 511), st.integers(1, 255))
def test_one_changed_byte_is_noticed(at: int, change: int) -> None:
    header = bytearray(pack_stamp(Stamp(BOOT, SUPERBLOCK.uuid, 7, 3, 201)))
    header[at] ^= change
    assert unpack_stamp(bytes(header)) is None


def test_the_bytes_are_those_of_the_documentation() -> None:
    header = pack_stamp(Stamp(BOOT, SUPERBLOCK.uuid, 7, 3, 201))
    assert header[0:8] == b"TBMAP\0\0\0"
    for at, length, value in [(8, 4, 1), (12, 4, 3), (48, 8, 7), (56, 8, 201)]:
        assert int.from_bytes(header[at : at + length], "little") == value
    assert (header[16:32], header[32:48]) == (BOOT.bytes, SUPERBLOCK.uuid.bytes)
    assert int.from_bytes(header[508:512], "little") == crc32c(header[:508])
    assert not any(header[512:])


@pytest.mark.parametrize(("at", "value"), [(0, b"T"), (8, b"\2")])
def test_another_magic_or_version_is_no_map(at: int, value: bytes) -> None:
    header = bytearray(pack_stamp(Stamp(BOOT, SUPERBLOCK.uuid, 7, 3, 201)))
    header[at] = value[0] ^ 0x20 if at == 0 else value[0]
    header[508:512] = crc32c(header[:508]).to_bytes(4, "little")
    assert unpack_stamp(bytes(header)) is None


def test_a_map_is_sparse_and_for_one_user(maps: Maps, tmp_path: Path) -> None:
    path = tmp_path / str(SUPERBLOCK.uuid) / "maps" / "3.map"
    assert path.stat().st_size == map_bytes(SIZE_BYTES)
    assert path.stat().st_blocks * 512 <= 2 * 4096
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("confirmed", "session"), [(7, 7), (6, 7), (7, 8), (7, 20)])
def test_r1_a_map_of_these_sessions_is_the_truth(
    maps: Maps, tmp_path: Path, confirmed: int, session: int
) -> None:
    assert is_current(maps, tmp_path, replace(SUPERBLOCK, confirmed=confirmed, session=session))


@pytest.mark.parametrize(("confirmed", "session"), [(8, 8), (5, 6), (8, 9)])
def test_r1_a_map_of_other_sessions_is_not(maps: Maps, tmp_path: Path, confirmed: int, session: int) -> None:
    assert not is_current(maps, tmp_path, replace(SUPERBLOCK, confirmed=confirmed, session=session))


def test_r1_a_map_of_another_boot_is_not(maps: Maps, tmp_path: Path) -> None:
    assert is_current(maps, tmp_path)
    assert not is_current(maps, tmp_path, boot=UUID(int=7))


def test_a_map_of_another_cache_layer_or_size_is_not(maps: Maps, tmp_path: Path) -> None:
    folder = tmp_path / str(SUPERBLOCK.uuid) / "maps"
    other = replace(SUPERBLOCK, uuid=UUID(int=99))
    (tmp_path / str(other.uuid)).mkdir()
    os.link(folder / "3.map", folder / "4.map")
    os.symlink(folder, tmp_path / str(other.uuid) / "maps")
    assert not is_current(maps, tmp_path, other)
    again = make(tmp_path)
    assert again.open_current(4, SIZE_BYTES, SUPERBLOCK) is None
    assert again.open_current(3, SIZE_BYTES + 65536, SUPERBLOCK) is None
    assert again.open_current(5, SIZE_BYTES, SUPERBLOCK) is None
    os.truncate(folder / "3.map", map_bytes(SIZE_BYTES) - 4096)
    assert again.open_current(3, SIZE_BYTES, SUPERBLOCK) is None


def test_a_map_has_no_header_before_it_is_stamped(maps: Maps, tmp_path: Path) -> None:
    """A daemon that is killed while it loads rows into a map leaves no half map that looks whole."""
    maps.forget(3)
    maps.create(3, SIZE_BYTES)
    assert not is_current(maps, tmp_path)
    maps.stamp(3, 8)
    assert is_current(maps, tmp_path)


def test_creating_replaces_a_map_that_was_not_believed(maps: Maps, tmp_path: Path) -> None:
    again = make(tmp_path, UUID(int=7))
    descriptor = again.create(3, SIZE_BYTES)
    assert os.pread(descriptor, 5, MAP_HEADER_BYTES) == bytes(5)
    again.close()


def test_maps_of_no_layer_are_removed(maps: Maps, tmp_path: Path) -> None:
    folder = tmp_path / str(SUPERBLOCK.uuid) / "maps"
    for name in ("4.map", "x.map"):
        (folder / name).write_text("")
    maps.remove_others()
    assert [path.name for path in folder.iterdir()] == ["3.map"]
    maps.remove_all()
    assert list(folder.iterdir()) == []


def test_maps_are_not_inherited(maps: Maps) -> None:
    assert not os.get_inheritable(maps.create(9, SIZE_BYTES))


def test_the_boot_has_a_name() -> None:
    assert boot_id() == boot_id()
    assert boot_id().int != 0


def test_a_place_that_is_not_in_memory_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING), mounted("tmpfs", tmp_path / "run") as run_dir:
        make(run_dir).close()
        assert caplog.messages == []
        monkeypatch.setattr(maps_module, "MEMORY_FILESYSTEMS", {})
        make(run_dir).close()
        folder = run_dir / str(SUPERBLOCK.uuid) / "maps"
        assert caplog.messages == [f"{folder} is not on tmpfs: block maps are slower there"]


def test_a_run_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"^cannot use .*/file/.*/maps for block maps: Not a directory$"):
        make(tmp_path / "file")
    with mounted("tmpfs", tmp_path / "run", "size=4k") as run_dir:
        maps = make(run_dir)
        (run_dir / "full").write_bytes(bytes(4096))
        maps.create(1, SIZE_BYTES)  # sparse: costs nothing yet
        with pytest.raises(CacheError, match="No space left"):
            maps.stamp(1, 7)
        maps.close()
