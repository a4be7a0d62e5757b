"""An epoch's record as values, and the rules that it keeps, alone and behind the one before it. Pure.

epoch.py makes bytes of it; both directions apply the rules here, so that nothing is written which could not
be read. Pages are 4096 bytes and counted from the volume's begin; a size that ends within a page has all of
it, with zeros behind the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

from tierblk.errors import RemoteRefused
from tierblk.extent import PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.remote.birth import TIME_S_MAX, Base, Birth, base_fault, size_fault
from tierblk.remote.names import ATTEMPT_BYTES, EPOCH_MAX, HASH_BYTES, N_MAX, DataName, EpochName
from tierblk.units import MIB

OBJECT_BYTES_MAX = 32 * MIB
INLINE_BYTES_MAX = 4 * MIB
INLINE_AT = 172  # where a record's inline bytes begin in its object, see epoch.py
IN_RECORD = 0xFFFF_FFFF  # instead of the n of a data object: in the record itself
NO_HASH = bytes(HASH_BYTES)
CRC_BYTES = 4


class Codec(IntEnum):
    """How the bytes of a run are stored."""

    RAW = 0
    ZSTD = 1


class ObjectName(NamedTuple):
    """An object that holds bytes of pages: data object n of an epoch's attempt; n = IN_RECORD: its record."""

    epoch: int
    attempt: bytes
    n: int

    def __str__(self) -> str:
        """Its name below the prefix."""
        if self.n == IN_RECORD:
            return str(EpochName(self.epoch))
        return str(DataName(self.epoch, self.attempt, self.n))


@dataclass(frozen=True, slots=True)
class Data:
    """A data object of a record, whose epoch and attempt are the record's: its number and its length."""

    n: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """1 to 16 neighbouring pages of one block, and where their bytes are.

    n: the data object, or IN_RECORD. offset_bytes is counted from the object's begin, in a record too, so
    inline bytes are at INLINE_AT and behind. stored_bytes: pages x 4096 (RAW), or less (ZSTD, one frame).
    crcs: for each page the crc32c of its raw bytes, u32, little endian.
    """

    page: int
    pages: int
    n: int
    offset_bytes: int
    stored_bytes: int
    codec: Codec
    crcs: bytes

    @property
    def end(self) -> int:
        """First page behind it."""
        return self.page + self.pages


@dataclass(frozen=True, slots=True)
class Zeroes:
    """Pages that read as zeros from the epoch on."""

    page: int
    pages: int

    @property
    def end(self) -> int:
        """First page behind them."""
        return self.page + self.pages


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes that a collection stored anew: of the pages of `to`, those that the map still has in the run
    which begins at offset_bytes of `source` are now in `to` (R15)."""

    source: ObjectName
    offset_bytes: int
    to: Run


@dataclass(frozen=True, slots=True)
class Record:
    """What an epoch changes, and what the volume is from then on.

    previous: the hash of the record before it, zeros for epoch 1. base_visible_bytes: below it the base may
    still be seen (R22). released: its writer detached with it. rolled_back_to: the volume becomes what it
    was at that epoch, and then what else is here happens; 0: no rollback. Runs, zeroes and moves are each
    in the order of their pages; no page is in two of the runs and zeroes.
    """

    uuid: UUID
    epoch: int
    attempt: bytes
    writer: bytes
    previous: bytes
    size_bytes: int
    base_visible_bytes: int
    base: Base | None
    released: bool
    rolled_back_to: int
    created_unix_s: int
    data: tuple[Data, ...] = ()
    runs: tuple[Run, ...] = ()
    zeroes: tuple[Zeroes, ...] = ()
    moves: tuple[Move, ...] = ()
    inline: bytes = b""

    def object_name(self, n: int) -> ObjectName:
        """The object that a run of this record means."""
        return ObjectName(self.epoch, self.attempt, n)


@dataclass(frozen=True, slots=True)
class Head:
    """Where a volume stands: its last epoch (0: none yet), that record's hash, and what it says of the
    volume."""

    uuid: UUID
    epoch: int
    hash: bytes
    size_bytes: int
    base_visible_bytes: int
    base: Base | None

    @classmethod
    def born(cls, birth: Birth) -> Head:
        """Where a volume stands before its first epoch. ValueError: a clone stands where its parent did."""
        if birth.parent is not None:
            raise ValueError(f"volume {birth.uuid} begins as epoch {birth.parent.epoch} of another one")
        visible_bytes = min(birth.size_bytes, birth.base.size_bytes) if birth.base else 0
        return cls(birth.uuid, 0, NO_HASH, birth.size_bytes, visible_bytes, birth.base)

    @classmethod
    def of(cls, record: Record, record_hash: bytes) -> Head:
        """Where the volume stands behind a record."""
        return cls(
            record.uuid, record.epoch, record_hash, record.size_bytes, record.base_visible_bytes, record.base
        )


def pages_of(size_bytes: int) -> int:
    """Pages that hold so many bytes, the short last one included."""
    return -(-size_bytes // PAGE_BYTES)


def fault(record: Record) -> str | None:
    """What is wrong with a record by itself, as the end of a sentence; None: nothing."""
    return _head_fault(record) or _data_fault(record) or _runs_fault(record) or _moves_fault(record)


def standing_fault(size_bytes: int, base_visible_bytes: int, base: Base | None) -> str | None:
    """What is wrong with a volume's size, base and what may be seen of it; None: nothing."""
    wrong = size_fault(size_bytes) or (base_fault(base) if base else None)
    most = min(size_bytes, base.size_bytes if base else 0)
    if wrong is None and not 0 <= base_visible_bytes <= most:
        wrong = f"{base_visible_bytes} bytes of its base cannot be visible, at most {most}"
    return wrong


def shape_fault(page: int, pages: int, codec: int, stored_bytes: int) -> str | None:
    """What is wrong with a run, wherever it is stored; None: nothing."""
    if not 1 <= pages <= PAGES_PER_BLOCK or page % PAGES_PER_BLOCK + pages > PAGES_PER_BLOCK:
        return f"the run at page {page} with {pages} pages is not in one block"
    raw_bytes = pages * PAGE_BYTES
    if codec == Codec.RAW and stored_bytes != raw_bytes:
        return f"the raw run at page {page} has {stored_bytes} bytes, not {raw_bytes}"
    if codec == Codec.ZSTD and not 0 < stored_bytes < raw_bytes:
        return f"the compressed run at page {page} has {stored_bytes} bytes"
    return None


def _head_fault(record: Record) -> str | None:
    if not 1 <= record.epoch <= EPOCH_MAX:
        return f"there is no epoch {record.epoch}"
    if len(record.attempt) != ATTEMPT_BYTES or len(record.writer) != ATTEMPT_BYTES:
        return "its attempt or its writer has not 16 bytes"
    if len(record.previous) != HASH_BYTES or (record.previous == NO_HASH) != (record.epoch == 1):
        return "the hash of the record before it is zeros in epoch 1, and nowhere else"
    if not 0 <= record.rolled_back_to < record.epoch:
        return f"epoch {record.epoch} cannot go back to epoch {record.rolled_back_to}"
    if not 0 <= record.created_unix_s <= TIME_S_MAX:
        return "it was made at no time that there is"
    return standing_fault(record.size_bytes, record.base_visible_bytes, record.base)


def _data_fault(record: Record) -> str | None:
    before = -1
    for data in record.data:
        if not before < data.n <= N_MAX:
            return f"data object {data.n} follows {before}"
        if not 1 <= data.length_bytes <= OBJECT_BYTES_MAX:
            return f"data object {data.n} has {data.length_bytes} bytes"
        before = data.n
    if len(record.inline) > INLINE_BYTES_MAX:
        return f"it has {len(record.inline)} inline bytes, more than {INLINE_BYTES_MAX}"
    return None


def _place_fault(run: Run, ends: dict[int, int], pages_end: int) -> str | None:
    """ends: where each object's bytes for runs end."""
    if run.page < 0 or run.end > pages_end:
        return f"the run at page {run.page} is not inside the volume"
    if (wrong := shape_fault(run.page, run.pages, run.codec, run.stored_bytes)) is not None:
        return wrong
    if len(run.crcs) != run.pages * CRC_BYTES:
        return f"the run at page {run.page} has not one checksum a page"
    begin = INLINE_AT if run.n == IN_RECORD else 0
    if run.n not in ends or not begin <= run.offset_bytes <= ends[run.n] - run.stored_bytes:
        return f"the run at page {run.page} is not inside its object"
    return None


def _ends(record: Record) -> dict[int, int]:
    ends = {data.n: data.length_bytes for data in record.data}
    ends[IN_RECORD] = INLINE_AT + len(record.inline)
    return ends


def _runs_fault(record: Record) -> str | None:
    ends, pages_end = _ends(record), pages_of(record.size_bytes)
    before = 0
    for run in record.runs:
        if (wrong := _place_fault(run, ends, pages_end)) is not None:
            return wrong
        if run.page < before:
            return f"the run at page {run.page} begins before the one before it ends"
        before = run.end
    runs, at = record.runs, 0
    before = 0
    for zeroes in record.zeroes:
        if zeroes.page < before or zeroes.pages < 1 or zeroes.end > pages_end:
            return f"the zeroes at page {zeroes.page} are out of order or not inside the volume"
        before = zeroes.end
        while at < len(runs) and runs[at].end <= zeroes.page:
            at += 1
        if at < len(runs) and runs[at].page < zeroes.end:
            return f"page {max(runs[at].page, zeroes.page)} is in a run and in the zeroes"
    return None


def _moves_fault(record: Record) -> str | None:
    ends, pages_end = _ends(record), pages_of(record.size_bytes)
    before = 0
    for move in record.moves:
        run, (epoch, attempt, n) = move.to, move.source
        if (wrong := _place_fault(run, ends, pages_end)) is not None:
            return f"of the moved, {wrong}"
        if run.page < before:
            return f"what moved at page {run.page} begins before the one before it ends"
        before = run.end
        if not 1 <= epoch < record.epoch or len(attempt) != ATTEMPT_BYTES:
            return f"what moved at page {run.page} is not from an earlier epoch"
        if source_fault(n, move.offset_bytes, 1):
            return f"what moved at page {run.page} was nowhere before"
    return None


def source_fault(n: int, offset_bytes: int, stored_bytes: int) -> str | None:
    """What is wrong with a place in an object whose length is not known; None: nothing."""
    begin, end = (INLINE_AT, INLINE_AT + INLINE_BYTES_MAX) if n == IN_RECORD else (0, OBJECT_BYTES_MAX)
    if not begin <= offset_bytes <= end - stored_bytes or (n > N_MAX and n != IN_RECORD) or n < 0:
        return f"no object {n} has {stored_bytes} bytes at {offset_bytes}"
    return None


def check_follows(
    before: Head, record: Record, rolled_back: Head | None = None, *, name: str | None = None
) -> None:
    """RemoteRefused unless the record may come directly behind `before`.

    rolled_back: where the volume stood at record.rolled_back_to; without it, what the size and the base
    were before a rollback is not looked at. ValueError: it is of another epoch. name: the record's, for the
    message.
    """
    if rolled_back is not None and rolled_back.epoch != record.rolled_back_to:
        raise ValueError(f"epoch {record.rolled_back_to} is not epoch {rolled_back.epoch}")
    wrong = None
    if record.uuid != before.uuid:
        wrong = f"it is of volume {record.uuid}, not {before.uuid}"
    elif record.epoch != before.epoch + 1:
        wrong = f"it is of epoch {record.epoch}, not {before.epoch + 1}"
    elif record.previous != before.hash:
        wrong = "the hash that it has of the record before it is another one"
    elif not record.rolled_back_to or rolled_back is not None:
        wrong = _change_fault(rolled_back or before, record)
    if wrong is not None:
        name = name or str(EpochName(record.epoch))
        raise RemoteRefused(f"{name} does not follow epoch {before.epoch} of this volume: {wrong}")


def _change_fault(before: Head, record: Record) -> str | None:
    if record.base_visible_bytes > before.base_visible_bytes:
        return (
            f"{record.base_visible_bytes} bytes of the base would be visible, "
            f"after {before.base_visible_bytes} (R22)"
        )
    # The rest of a page that was cut would be seen again when the volume grows.
    if record.size_bytes < before.size_bytes and record.size_bytes % PAGE_BYTES:
        return f"a volume shrinks to whole pages, and {record.size_bytes} bytes are none"
    return None
