"""Looks beside a daemon at the worst moment: a slot is given to another block between the look at an entry
and the read of its bytes. The test is the daemon: it changes map files and slots of a killed one while they
are read."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cache_rig import read_superblock, run_directory
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk.cache.invariants import check_masks
from tierblk.cache.maps import ENTRY_BYTES
from tierblk.cache.reading import Missing, Reader
from tierblk.cache.rows import Entry
from tierblk.cache.verify import verify
from tierblk.cache.view import LayerView, State, View, look
from tierblk.core import BLOCK_BYTES, MAP_HEADER_BYTES, page_sums
from tierblk.errors import CacheError
from tierblk.extent import Extent

IMAGE = os.urandom(30 * BLOCK_BYTES)
SIZE_BYTES = 40 * BLOCK_BYTES
BASE, VOLUME = 1, 2


class Files:
    """A cache whose daemon was killed, to be changed as a daemon would."""

    def __init__(self, directory: Path, run_dir: Path) -> None:
        self.directory, self.run_dir = directory, run_dir
        self._maps = run_dir / str(read_superblock(directory).uuid) / "maps"

    def entry(self, layer_id: int, block: int) -> Entry:
        content = (self._maps / f"{layer_id}.map").read_bytes()
        return Entry(*struct.unpack_from("<IHHHH", content, MAP_HEADER_BYTES + block * ENTRY_BYTES))

    def set_entry(self, layer_id: int, block: int, entry: Entry) -> None:
        with open(self._maps / f"{layer_id}.map", "r+b") as file:
            file.seek(MAP_HEADER_BYTES + block * ENTRY_BYTES)
            file.write(struct.pack("<IHHHH20x", *entry[:5]))

    def fill(self, slot: int, data: bytes, *, sums: bool = True) -> None:
        with open(self.directory / "slots", "r+b") as file:
            file.seek(slot * BLOCK_BYTES)
            file.write(data)
        if sums:
            with open(self.directory / "sums", "r+b") as file:
                file.seek(slot * 64)
                file.write(page_sums(memoryview(data), 0xFFFF))

    def give(self, slot: int, block: int, to: int) -> None:
        """From one block of the base to another one, with the latter's bytes and sums."""
        entry = self.entry(BASE, block)
        self.set_entry(BASE, block, Entry())
        self.fill(slot, IMAGE[to * BLOCK_BYTES : (to + 1) * BLOCK_BYTES])
        self.set_entry(BASE, to, entry)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """With blocks 0 to 9 of the base, and nothing of the volume but block 35."""
    with run_directory(tmp_path) as memory:
        host = Host(tmp_path, memory)
        daemon = VolumeDaemon(host, 100, IMAGE, SIZE_BYTES)
        daemon.door.read(0, 10 * BLOCK_BYTES)
        daemon.door.write(35 * BLOCK_BYTES, b"w" * BLOCK_BYTES)
        daemon.quiet(cycle_held=False)
        host.crash(kill=True)
        daemon.stop(clean=False)
        yield Files(host.directory, host.run_dir)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks take the directory for one that a daemon serves."""
    before = View.__init__

    def init(view: View, *args: object) -> None:
        before(view, *args)  # type: ignore[arg-type]
        assert view.state is State.KILLED
        view.state = State.SERVED

    monkeypatch.setattr(View, "__init__", init)


def before_reads(monkeypatch: pytest.MonkeyPatch, slot: int, *changes: Callable[[], object]) -> None:
    """Before that slot is read for the first time, and the second, and so on, one change each."""
    left, read = list(changes), View.read_slot

    def read_slot(view: View, first: int, first_page: int, buffer: memoryview | mmap.mmap) -> None:
        if left and first <= slot < first + len(buffer) // BLOCK_BYTES:
            left.pop(0)()
        read(view, first, first_page, buffer)

    monkeypatch.setattr(View, "read_slot", read_slot)


def reader(view: View) -> Reader:
    base = next(record for record in view.records if record.kind == "base")
    return Reader(view, [base], base.size_bytes)


@pytest.mark.usefixtures("served")
def test_a_slot_that_another_block_got_is_not_read(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums fit, since they are those of the other block."""
    slot = files.entry(BASE, 4).slot
    before_reads(monkeypatch, slot, lambda: files.give(slot, 4, 20))
    with look(files.directory, files.run_dir) as view:
        with pytest.raises(Missing):
            list(reader(view).read(Extent(4 * BLOCK_BYTES, BLOCK_BYTES)))
        there = Extent(20 * BLOCK_BYTES, BLOCK_BYTES)
        assert b"".join(reader(view).read(there)) == IMAGE[there.offset : there.end]


@pytest.mark.usefixtures("served")
def test_a_block_that_never_stands_still(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    one = files.entry(BASE, 4)
    other = one._replace(zero=0, cached=0xFFFE)
    changes = [lambda e=e: files.set_entry(BASE, 4, e) for e in (other, one) * 20]
    before_reads(monkeypatch, one.slot, *changes)
    with (
        look(files.directory, files.run_dir) as view,
        pytest.raises(CacheError, match="block 4 changes faster than it can be read"),
    ):
        list(reader(view).read(Extent(4 * BLOCK_BYTES + 8192, 4096)))


@pytest.mark.usefixtures("served")
def test_a_fill_that_has_written_and_not_yet_told_is_nothing_bad(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = files.entry(BASE, 4).slot

    def begin_fill() -> None:
        files.set_entry(BASE, 4, Entry())
        files.fill(slot, os.urandom(BLOCK_BYTES), sums=False)

    before_reads(monkeypatch, slot, begin_fill)
    found = verify(files.directory, files.run_dir)
    assert (found.violations, found.checked_slots, found.unsettled_blocks) == ([], 10, 0)


@pytest.mark.usefixtures("served")
def test_bytes_that_change_with_their_sums_are_looked_at_again(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evicted and fetched again into the same slot while it is read: only the second look can tell."""
    slot = files.entry(BASE, 4).slot
    data = IMAGE[4 * BLOCK_BYTES : 5 * BLOCK_BYTES]
    files.fill(slot, os.urandom(BLOCK_BYTES), sums=False)
    before_reads(monkeypatch, slot, lambda: None, lambda: None, lambda: files.fill(slot, data))
    assert verify(files.directory, files.run_dir).violations == []


@pytest.mark.usefixtures("served")
def test_what_stays_bad_is_bad(files: Files) -> None:
    slot = files.entry(BASE, 4).slot
    files.fill(slot, os.urandom(BLOCK_BYTES), sums=False)
    found = verify(files.directory, files.run_dir)
    assert [(v.invariant, v.block) for v in found.violations] == [("I5", 4)] * 16


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("moves", [True, False])
def test_a_slot_that_moved_between_looks_has_one_owner(
    files: Files, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    slot = files.entry(BASE, 4).slot
    entries, done = LayerView.entries, list[int]()

    def moving(layer: LayerView, *args: int) -> Iterator[tuple[int, Entry]]:
        if layer.record.layer_id == VOLUME and not done:
            done.append(1)
            if moves:
                files.set_entry(BASE, 4, Entry())
            files.set_entry(VOLUME, 7, Entry(slot, 0xFFFF, 0xFFFF, 0, 0xFFFF))
        return entries(layer, *args)

    monkeypatch.setattr(LayerView, "entries", moving)
    violations = [str(v) for v in verify(files.directory, files.run_dir).violations]
    twice = f"I4 layer 2 block 7: slot {slot} is also that of block 4 of layer 1"
    assert violations == ([] if moves else [twice])


@pytest.mark.usefixtures("served")
def test_an_entry_that_was_seen_half_changed_is_looked_at_again(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = files.entry(BASE, 4)
    files.set_entry(BASE, 4, good._replace(zero=1))

    def checking(layer: object, block: int, entry: Entry) -> object:
        found = list(check_masks(layer, block, entry))  # type: ignore[arg-type]
        if found:
            files.set_entry(BASE, 4, good)
        return found

    monkeypatch.setattr("tierblk.cache.verify.check_masks", checking)
    assert verify(files.directory, files.run_dir).violations == []
