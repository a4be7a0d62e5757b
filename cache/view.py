"""A look into a cache directory beside whoever serves it: its layers, what every block of them is, and bytes.

    with look(path, run_root()) as view:
        for record in view.records:
            for block, entry in view.layer(record).entries():
                ...

Nothing is changed, and a daemon is neither asked nor held up: what it has in memory is in its map files
(maps.py), which are read beside it. Whose word counts is what an opening would believe: the maps of a session
that runs or was killed, else the index with the journal (start.py, loading.py). While nobody serves the
directory its lock is held, so that nobody begins to.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from tierblk.cache import journal, summed
from tierblk.cache import superblock as superblocks
from tierblk.cache.directory import INDEX, JOURNAL, SLOTS, SUMS, SUMS_BYTES_PER_SLOT
from tierblk.cache.index import HEAD_KEY, Index, Meta, open_index
from tierblk.cache.layers import LayerRecord
from tierblk.cache.loading import refuse_what_cannot_be_served
from tierblk.cache.maps import ENTRY_BYTES, data_extents, entries_in_map, find_map, marks_in
from tierblk.cache.rows import (
    ENTRIES_BYTES,
    NO_ENTRY,
    ROW_ENTRY_BYTES,
    Entry,
    check_row,
    entries_in_rows,
    entries_of,
    pack_entries,
)
from tierblk.cache.start import is_current
from tierblk.cache.superblock import COPIES, COPY_BYTES, SLOT_BYTES, Superblock
from tierblk.core import ENTRIES_PER_ROW, MAP_HEADER_BYTES, PAGE_BYTES
from tierblk.errors import CacheError
from tierblk.extent import block_count, valid_pages

_PIECE_BYTES = 1 << 20
_NO_ROW = 1 << 63
_PIECE_ROWS = 1024


class State(Enum):
    """Who has the directory, and so whose word counts."""

    SERVED = "served"  # by a daemon: its maps
    ENDED = "ended"  # the last daemon ended in order: the index
    KILLED = "killed"  # it was killed, and its maps are still there
    CUT = "cut"  # maps are lost, as after a power cut: index and journal, without clean pages of volumes
    STRANGE = "strange"  # index and slots are not of the same time: nothing that is cached counts (R8)


@dataclass(frozen=True, slots=True)
class Piece:
    """Packed entries of neighbouring blocks, as a row (12 bytes an entry) or a map (32) has them."""

    first_block: int
    packed: bytes
    entry_bytes: int

    @property
    def blocks(self) -> int:
        return len(self.packed) // self.entry_bytes

    def entries(self) -> list[Entry]:
        """Of each block, also where nothing is known."""
        return (
            entries_in_rows(self.packed)
            if self.entry_bytes == ROW_ENTRY_BYTES
            else entries_in_map(self.packed)
        )

    def marks(self) -> list[int]:
        """Of each block what the core notes beside its masks (REFERENCED, PROBATION); only maps have it."""
        return marks_in(self.packed) if self.entry_bytes == ENTRY_BYTES else [0] * self.blocks


class Fault(NamedTuple):
    """What is wrong with a directory as a whole; invariant: its number in DESIGN."""

    invariant: str
    text: str


class LayerView:
    """The block map of one layer. Methods block; OSError is CacheError here."""

    def __init__(
        self,
        record: LayerRecord,
        map_fd: int | None,
        index: Index | None,
        replayed: dict[int, bytes] | None,
        summed_pages: bytes = b"",
    ) -> None:
        """One of map_fd and index is there, or nothing is cached that counts. replayed: rows that the journal
        adds to the index; None: the last session ended in order. summed_pages: then, see summed.py."""
        self.record = record
        self.blocks = block_count(record.size_bytes)
        self.row_faults: dict[int, str] = {}
        """What is wrong with rows that cannot be believed, as far as `pieces` came: what a volume had there
        is lost (R9)."""
        self._map_fd = map_fd
        self._index = index
        self._replayed = replayed
        self._summed = summed_pages if record.is_volume else b""

    @property
    def bad_rows(self) -> list[int]:
        """The numbers of these rows."""
        return list(self.row_faults)

    @property
    def has_map(self) -> bool:
        """Whether entries are as new as memory, and know what was used lately."""
        return self._map_fd is not None

    def pieces(self, first_block: int = 0, end_block: int | None = None) -> Iterator[Piece]:
        """All blocks between these of which anything may be known, ascending; a piece may begin before
        the first and end behind the last one, and not behind the layer's."""
        end_block = self.blocks if end_block is None else min(end_block, self.blocks)
        if self._map_fd is not None:
            yield from self._of_map(self._map_fd, first_block, end_block)
        elif self._index is not None:
            yield from self._of_rows(self._index, first_block, end_block)

    def entries(self, first_block: int = 0, end_block: int | None = None) -> Iterator[tuple[int, Entry]]:
        """(block, entry) of those between these of which anything is known."""
        end_block = self.blocks if end_block is None else min(end_block, self.blocks)
        for piece in self.pieces(first_block, end_block):
            for block, entry in enumerate(piece.entries(), piece.first_block):
                if entry != NO_ENTRY and first_block <= block < end_block:
                    yield block, self._with_sums(entry) if self._summed else entry

    def _with_sums(self, entry: Entry) -> Entry:
        slot, present, cached, zero, dirty, _ = entry
        if not slot or not dirty & cached:
            return entry
        return Entry(slot, present, cached, zero, dirty, dirty & cached & summed.mask_of(self._summed, slot))

    def entry(self, block: int) -> Entry:
        """Of one block, as it is now."""
        return next((entry for _, entry in self.entries(block, block + 1)), Entry())

    def _of_map(self, map_fd: int, first_block: int, end_block: int) -> Iterator[Piece]:
        start, end = (MAP_HEADER_BYTES + block * ENTRY_BYTES for block in (first_block, end_block))
        try:
            for at, stop in data_extents(map_fd, start, end):
                at -= (at - MAP_HEADER_BYTES) % ENTRY_BYTES
                while at < stop:
                    packed = os.pread(map_fd, min(_PIECE_BYTES, stop - at), at)
                    packed = packed[: len(packed) // ENTRY_BYTES * ENTRY_BYTES]
                    if not packed:
                        return  # its layer is gone
                    yield Piece((at - MAP_HEADER_BYTES) // ENTRY_BYTES, packed, ENTRY_BYTES)
                    at += len(packed)
        except OSError as error:
            raise CacheError(
                f"the block map of {self.record.shown} cannot be read: {error.strerror}"
            ) from None

    def _of_rows(self, index: Index, first_block: int, end_block: int) -> Iterator[Piece]:
        """Neighbouring rows make one piece: a large layer has hundreds of thousands."""
        first, end = first_block // ENTRIES_PER_ROW, -(-end_block // ENTRIES_PER_ROW)
        to_the_end = _NO_ROW if end_block == self.blocks else end
        begin, run = first, list[bytes]()
        for row, packed in self._rows(index, first, to_the_end):
            if not packed:
                continue
            if row >= end:
                self.row_faults[row] = "the row lies beyond the end of the layer"
                continue
            entries = self._believed(row, packed)
            if entries is None:
                continue
            if row != begin + len(run) or len(run) == _PIECE_ROWS:
                if run:
                    yield self._joined(begin, run)
                begin, run = row, []
            run.append(entries)
        if run:
            yield self._joined(begin, run)

    def _joined(self, row: int, run: list[bytes]) -> Piece:
        block = row * ENTRIES_PER_ROW
        return Piece(block, b"".join(run)[: (self.blocks - block) * ROW_ENTRY_BYTES], ROW_ENTRY_BYTES)

    def _believed(self, row: int, packed: bytes) -> bytes | None:
        """The 64 packed entries of a row as an opening would have them; None: none of them."""
        held = min(ENTRIES_PER_ROW, self.blocks - row * ENTRIES_PER_ROW)
        try:
            check_row(packed)
            if any(packed[held * ROW_ENTRY_BYTES : ENTRIES_BYTES]):
                raise ValueError("the row holds something beyond the end of the layer")
        except ValueError as error:
            self.row_faults[row] = str(error)
            if not self.record.is_volume:
                return None  # it is fetched again
            blocks = range(row * ENTRIES_PER_ROW, (row + 1) * ENTRIES_PER_ROW)
            return pack_entries([Entry(present=valid_pages(b, self.record.size_bytes)) for b in blocks])
        if self._replayed is not None and self.record.is_volume:
            return pack_entries([_dirty_only(entry) for entry in entries_of(packed)])
        return packed[:ENTRIES_BYTES]

    def _rows(self, index: Index, first: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Rows [first, end) by number, with those of the journal in front of those of the index."""
        newer = self._replayed or {}
        left = sorted(row for row in newer if first <= row < end)
        for row, packed in index.rows(self.record.layer_id, first):
            if row >= end:
                break
            while left and left[0] < row:
                yield left[0], newer[left.pop(0)]
            if left and left[0] == row:
                packed = newer[left.pop(0)]
            yield row, packed
        for row in left:
            yield row, newer[row]


class View:
    """See look. All of it blocks, and may be used from any thread, a layer by one at a time."""

    def __init__(
        self,
        path: Path,
        superblock: Superblock,
        bad_superblocks: int,
        state: State,
        meta: Meta,
        files: _Files,
    ) -> None:
        self.path = path
        self.superblock = superblock
        self.bad_superblocks = bad_superblocks
        """How many of the two cannot be read."""
        self.state = state
        self.meta = meta
        self.faults: list[Fault] = files.faults
        """What a lenient look has passed over."""
        self.records: list[LayerRecord] = files.records
        self._files = files

    def layer(self, record: LayerRecord) -> LayerView:
        """What is known of a layer's blocks."""
        files = self._files
        map_fd = files.maps.get(record.layer_id)
        gone = record.kind == "scratch" and self.state is State.CUT  # with the machine's uptime
        index = None if map_fd is not None or gone or self.state is State.STRANGE else files.index
        replayed = files.replayed.get(record.layer_id, {}) if self.state is State.CUT else None
        return LayerView(record, map_fd, index, replayed, files.summed_pages)

    def volume_state(self, record: LayerRecord) -> bytes | None:
        """See Index.volume_state; as of now."""
        with self._files.reading() as index:
            return index.volume_state(record.layer_id)

    def volume_head(self, record: LayerRecord) -> bytes | None:
        """What is kept of the head of a volume's extent map; as of now."""
        with self._files.reading() as index:
            return index.extent(record.layer_id, HEAD_KEY)

    def volume_extents(self, record: LayerRecord) -> list[tuple[bytes, bytes]]:
        """See Index.extents; as of now."""
        with self._files.reading() as index:
            return index.extents(record.layer_id)

    def alone(self) -> None:
        """From here on nobody else looks into the directory, which is to be changed. CacheError: somebody
        does, or serves it."""
        try:
            fcntl.flock(self._files.slots_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"{self.path} is in use by another process", f"`fuser -v {self.path / SLOTS}` shows it"
            ) from None

    @property
    def whole_slots(self) -> int:
        """How many the files have bytes and sums of; with a lenient look perhaps fewer than there should
        be."""
        files = self._files
        slots = os.fstat(files.slots_fd).st_size // SLOT_BYTES
        return min(slots, os.fstat(files.sums_fd).st_size // SUMS_BYTES_PER_SLOT)

    def read_slot(self, slot: int, first_page: int, buffer: memoryview | mmap.mmap) -> None:
        """Pages of a slot from one on, as many as fit into the buffer, whose memory is page-aligned and
        whose length whole pages. CacheError."""
        offset_bytes = slot * SLOT_BYTES + first_page * PAGE_BYTES
        wanted = len(buffer)
        try:
            length = os.preadv(self._files.slots_fd, [buffer], offset_bytes)
        except OSError as error:
            raise CacheError(f"slot {slot} of {self.path} cannot be read: {error.strerror}") from None
        if length != wanted:
            raise CacheError(f"{self.path / SLOTS} ends before slot {slot}")

    def sums(self, slot: int) -> tuple[int, ...]:
        """The kept crc32c of each page of a slot, of which those of `Entry.checkable` count (R9)."""
        return tuple(memoryview(self.packed_sums(slot)).cast("I"))

    def packed_sums(self, slot: int, slots: int = 1) -> bytes:
        """The same of neighbouring slots, 64 bytes each."""
        length = slots * SUMS_BYTES_PER_SLOT
        try:
            packed = os.pread(self._files.sums_fd, length, slot * SUMS_BYTES_PER_SLOT)
        except OSError as error:
            raise CacheError(f"{self.path / SUMS} cannot be read: {error.strerror}") from None
        if len(packed) != length:
            raise CacheError(f"{self.path / SUMS} ends before slot {slot + slots - 1}")
        return packed


class _Files:
    """What a look has open."""

    def __init__(self, path: Path, superblock: Superblock, slots_fd: int, sums_fd: int) -> None:
        self.slots_fd = slots_fd
        self.sums_fd = sums_fd
        self.index: Index | None = None  # while nobody else changes it
        self.records: list[LayerRecord] = []
        self.maps: dict[int, int] = {}
        self.replayed: dict[int, dict[int, bytes]] = {}
        self.summed_pages = b""
        self.faults: list[Fault] = []
        self._path = path
        self._superblock = superblock

    @contextmanager
    def reading(self) -> Iterator[Index]:
        """The index, for a short time."""
        if self.index is not None:
            yield self.index
            return
        index = open_index(
            self._path / INDEX, self._superblock.uuid, self._superblock.slot_count, beside=True
        )
        try:
            yield index
        finally:
            index.close()


@contextmanager
def look(path: Path, run_root: Path, *, lenient: bool = False) -> Iterator[View]:
    """A cache directory as it is. run_root: where daemons have their run directories. lenient: go on where an
    opening would not, with files that are too short or a journal that is damaged, and note it.

    CacheError when it cannot be looked into: it is none, it is damaged beyond reading, a newer version made
    it, or a daemon begins or ends at this moment. Nothing is changed, whatever comes of it."""
    with ExitStack() as undo:
        try:
            view = _open(path, run_root, undo, lenient=lenient)
        except OSError as error:
            raise _unreadable(path, error) from None
        yield view


def _unreadable(path: Path, error: OSError) -> CacheError:
    if not os.path.isdir(path) and not isinstance(error, PermissionError):
        return CacheError(f"there is no cache directory {path}")
    if isinstance(error, FileNotFoundError) and not os.path.lexists(path / SLOTS):
        return CacheError(f"{path} is no cache directory: it has no {SLOTS}")
    where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
    hint = "run the command as root, or as who owns it" if isinstance(error, PermissionError) else None
    return CacheError(f"cannot look into the cache directory {path}: {error.strerror}{where}", hint)


def _open(path: Path, run_root: Path, undo: ExitStack, *, lenient: bool) -> View:
    slots_fd = os.open(path / SLOTS, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    undo.callback(os.close, slots_fd)
    served = not _lock(slots_fd)
    superblock, bad = _superblock(path, slots_fd)
    sums_fd = os.open(path / SUMS, os.O_RDONLY | os.O_CLOEXEC)
    undo.callback(os.close, sums_fd)
    files = _Files(path, superblock, slots_fd, sums_fd)
    _check_lengths(path, superblock, files, lenient=lenient)
    if not served:
        files.index = open_index(path / INDEX, superblock.uuid, superblock.slot_count, read_only=True)
        undo.callback(files.index.close)
    with files.reading() as index:
        refuse_what_cannot_be_served(index)
        meta, files.records = index.meta(), index.layers()
    maps = run_root / str(superblock.uuid) / "maps"
    if served or (is_current(meta.session, superblock) and not meta.clean):
        for record in files.records:
            map_fd = find_map(maps, record.layer_id, record.size_bytes, superblock)
            if map_fd is not None:
                undo.callback(os.close, map_fd)
                files.maps[record.layer_id] = map_fd
    state = _state(path, superblock, meta, files, served=served)
    if state is State.CUT:
        assert files.index is not None
        try:
            replay = journal.read(path / JOURNAL, files.index, superblock)
        except CacheError as error:
            if not lenient:
                raise
            files.faults.append(Fault("R7", error.message))
            replay = None
        files.replayed = replay.rows if replay else {}
    elif state is State.ENDED:
        files.summed_pages = summed.read(path, superblock.uuid, meta.session)
    return View(path, superblock, bad, state, meta, files)


def _state(path: Path, superblock: Superblock, meta: Meta, files: _Files, *, served: bool) -> State:
    if served:
        if len(files.maps) < len(files.records):
            raise CacheError(
                f"a daemon that serves {path} is starting or ending, or keeps its block maps elsewhere",
                "try again; a daemon with another TIERBLK_RUN_DIR has to be looked for there",
            )
        return State.SERVED
    if not is_current(meta.session, superblock):
        return State.STRANGE
    if meta.clean:
        return State.ENDED
    return State.KILLED if len(files.maps) == len(files.records) else State.CUT


def _check_lengths(path: Path, superblock: Superblock, files: _Files, *, lenient: bool) -> None:
    for name, fd, slot_bytes in (
        (SLOTS, files.slots_fd, SLOT_BYTES),
        (SUMS, files.sums_fd, SUMS_BYTES_PER_SLOT),
    ):
        size, wanted = os.fstat(fd).st_size, superblock.slot_count * slot_bytes
        if size >= wanted:
            continue
        if not lenient:
            raise CacheError(
                f"{path / name} is damaged: it has {size} bytes, its superblock says {wanted}",
                f"`tierblk cache verify {path}` says what is left",
            )
        files.faults.append(Fault("I5", f"{name} has {size} bytes, and the superblock says {wanted}"))


def _lock(slots_fd: int) -> bool:
    """Whether nobody serves it; nobody begins to as long as the descriptor is open. Others may look too."""
    try:
        fcntl.flock(slots_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _superblock(path: Path, slots_fd: int) -> tuple[Superblock, int]:
    """Of one that is served a copy may be half written at any moment: then the other one counts."""
    with mmap.mmap(-1, COPIES * COPY_BYTES) as buffer:
        length = os.preadv(slots_fd, [buffer], 0)
        copies = [
            buffer[at : min(at + COPY_BYTES, length)] for at in range(0, COPIES * COPY_BYTES, COPY_BYTES)
        ]
    return superblocks.choose(copies, str(path / SLOTS))


def _dirty_only(entry: Entry) -> Entry:
    """Of a volume after an end out of order: a clean page may have been written in place since (DESIGN 5)."""
    cached, zero = entry.cached & entry.dirty, entry.zero & entry.dirty
    return entry._replace(slot=entry.slot if cached else 0, cached=cached, zero=zero)
