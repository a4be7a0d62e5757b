"""The extent map: for every page of a volume, where object storage has it. Pure.

Records are applied in order, each checked against the one before. What a record does, one after the other:

    1. rolled_back_to   the map is again what it was then
    2. size             what is behind its end is forgotten (R22)
    3. moves            pages that are still where a collection read them are where it wrote them (R15)
    4. runs, zeroes     the pages are there, or zeros

A page is in a piece of a run, or zero, or neither: then the base answers below base_visible, and zeros
follow. Zeros behind what is visible of the base are therefore not kept.

A map knows what of it has changed since somebody took that (kept.py), so that keeping it costs what changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID

from tierblk.extent import PAGES_PER_BLOCK
from tierblk.remote import kept
from tierblk.remote.kept import Changes, Kept, Touched
from tierblk.remote.packed import Malformed
from tierblk.remote.pieces import ROW_PAGES, Hole, Piece, pack, piece_fault, piece_of, unpack
from tierblk.remote.ranges import Ranges
from tierblk.remote.record import Head, ObjectName, Record, check_follows, pages_of


class _Edit(NamedTuple):
    """Pages [page, end) become those of a piece, or none; with a source only where they are in that run."""

    page: int
    end: int
    piece: Piece | None
    source: tuple[ObjectName, int] | None = None


class ExtentMap:
    """Where a volume's pages are at the epoch of `head`. It belongs to one task: nothing here is locked."""

    def __init__(self, head: Head) -> None:
        """A map without any piece: that of a new volume is at epoch 0."""
        self.head = head
        self._rows: dict[int, bytes] = {}
        self._zeroes = Ranges()
        self._touched = Touched()
        self._applies = False  # a record is half in it
        # Objects by their number in the rows; None: the number is free. Live: how many bytes pieces still
        # name.
        self._objects: list[ObjectName | None] = []
        self._numbers: dict[ObjectName, int] = {}
        self._free: list[int] = []
        self._live_bytes: dict[ObjectName, int] = {}
        self._less_live: set[ObjectName] = set()  # some of it went while the record at hand is applied

    def copy(self) -> ExtentMap:
        """A map of its own with the same content. The rows, most of the memory, are shared."""
        other = ExtentMap(self.head)
        other._take(self)
        return other

    def become(self, other: ExtentMap) -> None:
        """Have the content of another map, which nobody changes from then on: the two share it."""
        self.head = other.head
        self._rows, self._zeroes = other._rows, other._zeroes
        self._objects, self._numbers, self._free = other._objects, other._numbers, other._free
        self._live_bytes = other._live_bytes
        self._touched.everything = True

    def fork(self, uuid: UUID) -> ExtentMap:
        """What a clone begins with: this map, for a volume of another uuid, whose next epoch is one more."""
        other = self.copy()
        other.head = replace(self.head, uuid=uuid)
        return other

    def apply(
        self,
        record: Record,
        record_hash: bytes,
        *,
        rolled_back: ExtentMap | None = None,
        name: str | None = None,
    ) -> None:
        """Take the next record, which decode has checked; record_hash: what it ends with.

        rolled_back: the map at record.rolled_back_to, needed (ValueError) when that is not 0. RemoteRefused,
        and nothing is changed: the record does not follow. name: the record's, for the message.
        """
        for _ in self.applying(record, record_hash, rolled_back=rolled_back, name=name):
            pass

    def applying(
        self,
        record: Record,
        record_hash: bytes,
        *,
        rolled_back: ExtentMap | None = None,
        name: str | None = None,
    ) -> Iterator[None]:
        """As apply, row by row, for who must not be held up. Between two steps pages that the record does not
        name can be looked up, and nothing is taken (take_changes)."""
        if (rolled_back is None) != (record.rolled_back_to == 0):
            raise ValueError(
                f"a record that goes back to {record.rolled_back_to} needs the map of then, others none"
            )
        check_follows(self.head, record, rolled_back.head if rolled_back else None, name=name)
        self._applies = True
        if rolled_back is not None:
            self._take(rolled_back)
        self.head = Head.of(record, record_hash)
        base_pages = pages_of(record.base_visible_bytes)
        edits: dict[int, list[_Edit]] = defaultdict(list)
        self._forget(pages_of(record.size_bytes), None, edits)
        self._zeroes.remove(base_pages, 1 << 64)
        for move in record.moves:
            piece = piece_of(move.to, record.object_name(move.to.n))
            source = (move.source, move.offset_bytes)
            edits[piece.page // ROW_PAGES].append(_Edit(piece.page, piece.end, piece, source))
        for zeroes in record.zeroes:
            self._forget(zeroes.page, zeroes.end, edits)
            self._zeroes.add(zeroes.page, min(zeroes.end, base_pages))
        for run in record.runs:
            piece = piece_of(run, record.object_name(run.n))
            edits[piece.page // ROW_PAGES].append(_Edit(piece.page, piece.end, piece))
            self._zeroes.remove(run.page, run.end)
        for row, of_row in edits.items():
            self._edit(row, of_row)
            yield
        self._drop_dead()
        self._touched.head = True
        if self._touched.everything:
            self._touched.forget_parts()
            self._zeroes.touched.clear()
        self._applies = False

    def lookup(self, page: int, pages: int) -> Iterator[Piece | Hole]:
        """The pages in order, as the largest pieces and holes there are. ValueError: not inside the
        volume."""
        end = page + pages
        if page < 0 or pages < 0 or end > pages_of(self.head.size_bytes):
            raise ValueError(f"pages {page} to {end} are not inside the volume")
        for piece in self._pieces(page, end):
            yield from self._holes(page, piece.page)
            yield piece
            page = piece.end
        yield from self._holes(page, end)

    def is_stored(self, page: int, end: int) -> bool:
        """Whether any page of [page, end) is in a piece."""
        return next(self._pieces(page, end), None) is not None

    def live_bytes(self) -> dict[ObjectName, int]:
        """For each object that the map names: how many of its stored bytes are of pages in the map.

        A compressed run counts in proportion to its pages, rounded up.
        """
        return self._live_bytes.copy()

    def rows(self) -> Iterator[tuple[int, list[Piece]]]:
        """All pieces by row, in order; only rows that have some."""
        for row in sorted(self._rows):
            yield row, self._unpacked(row)

    def zeroes(self) -> list[tuple[int, int]]:
        """Ranges [first, end) of pages that are zeros although the base could be seen there; in order,
        apart."""
        return list(self._zeroes)

    def load(self, rows: Iterable[tuple[int, list[Piece]]], zeroes: Iterable[tuple[int, int]]) -> None:
        """Put into an empty map what rows() and zeroes() of another one gave; nothing of it is checked."""
        for row, pieces in rows:
            self._put(row, [], pieces)
        for first, end in zeroes:
            self._zeroes.add(first, end)

    @property
    def is_changed(self) -> bool:
        """Whether take_changes would give something."""
        return not self._applies and (self._touched.everything or self._touched.head)

    def take_changes(self) -> Changes | None:
        """What has to be written so that what was taken so far is this map; None: it is. A map that was not
        restored gives all of it at first, and so does one that has been rolled back.
        """
        if not self.is_changed:
            return None
        touched, anew = self._touched, self._touched.everything
        zeroes = [first for first, _ in self._zeroes] if anew else touched.zeroes | self._zeroes.touched
        objects = self._numbers.values() if anew else touched.objects
        pairs = [
            kept.head_pair(
                self.head, len(self._objects), len(self._numbers), len(self._rows), len(self._zeroes)
            ),
            *(kept.object_pair(number, self._objects[number]) for number in objects),
            *(kept.row_pair(row, self._rows.get(row, b"")) for row in (self._rows if anew else touched.rows)),
            *(kept.zeroes_pair(first, self._zeroes.end_of(first)) for first in zeroes),
        ]
        touched.clear()
        self._zeroes.touched.clear()
        return Changes(tuple(pairs), anew)

    def put_back(self, changes: Changes) -> None:
        """What was taken last was not written after all: the next take gives it again, as it is then."""
        self._touched.everything |= changes.anew
        if not self._touched.everything:
            for key, _ in changes.pairs:
                self._touched.add(key)

    @classmethod
    def restore(cls, pairs: Iterable[tuple[bytes, bytes]], *, uuid: UUID) -> ExtentMap:
        """The map of that volume out of all pairs that were taken of it and are kept, in any order; nothing
        of it has changed. ValueError: they are damaged, not all of them, or no map of that volume.
        """
        try:
            return cls._restored(kept.read(pairs, uuid))
        except Malformed as error:
            raise ValueError(f"the extents of volume {uuid} cannot be read: {error}") from None

    @classmethod
    def _restored(cls, found: Kept) -> ExtentMap:
        other = cls(found.head)
        other._objects = found.objects
        other._numbers = {name: number for number, name in enumerate(found.objects) if name is not None}
        other._free = [number for number, name in enumerate(found.objects) if name is None]
        other._live_bytes = dict.fromkeys(other._numbers, 0)
        other._rows = found.rows
        pages_end = pages_of(found.head.size_bytes)
        for row in found.rows:
            last = None
            for piece in other._unpacked(row):
                if (wrong := piece_fault(piece, last, row, pages_end)) is not None:
                    raise Malformed(wrong)
                other._live_bytes[piece.object] += piece.share_bytes
                last = piece
        if not all(other._live_bytes.values()):
            raise Malformed("it lists objects of which nothing is used")
        for first, end in found.zeroes:
            if other.is_stored(first, end):
                raise Malformed(f"of the pages {first} to {end} some are zeros and stored")
            other._zeroes.add(first, end)
        other._zeroes.touched.clear()
        other._touched.clear()
        return other

    def _take(self, other: ExtentMap) -> None:
        """All of it is another map's from here on."""
        self._touched.everything = True
        self._rows = other._rows.copy()
        self._zeroes = other._zeroes.copy()
        self._objects = other._objects.copy()
        self._numbers = other._numbers.copy()
        self._free = other._free.copy()
        self._live_bytes = other._live_bytes.copy()

    def _unpacked(self, row: int) -> list[Piece]:
        return unpack(row, self._rows.get(row, b""), self._objects)

    def _existing(self, page: int, end: int | None) -> list[int]:
        """Rows with pieces that have any of these pages, in order; however many rows there could be."""
        first, behind = page // ROW_PAGES, None if end is None else -(-end // ROW_PAGES)
        if behind is not None and behind - first <= len(self._rows):
            return [row for row in range(first, behind) if row in self._rows]
        return sorted(row for row in self._rows if row >= first and (behind is None or row < behind))

    def _pieces(self, page: int, end: int) -> Iterator[Piece]:
        for row in self._existing(page, end):
            for piece in self._unpacked(row):
                if max(page, piece.page) < min(end, piece.end):
                    yield piece.part(page, end)

    def _holes(self, page: int, end: int) -> Iterator[Hole]:
        """What there is between two pieces."""
        base_end = min(end, pages_of(self.head.base_visible_bytes))
        zero_from = page  # everything before it is told
        for first, behind in [*_gaps(self._zeroes.overlap(page, base_end), page, base_end)]:
            if zero_from < first:
                yield Hole(zero_from, first - zero_from, from_base=False)
            yield Hole(first, behind - first, from_base=True)
            zero_from = behind
        if zero_from < end:
            yield Hole(zero_from, end - zero_from, from_base=False)

    def _forget(self, page: int, end: int | None, edits: dict[int, list[_Edit]]) -> None:
        """Edits that take [page, end) out of the pieces; end None: all from page on."""
        for row in self._existing(page, end):
            row_end = (row + 1) * ROW_PAGES
            behind = row_end if end is None else min(end, row_end)
            edits[row].append(_Edit(max(page, row * ROW_PAGES), behind, None))

    def _edit(self, row: int, edits: list[_Edit]) -> None:
        """Make the edits of a row, in order. Blocks that none of them touches stay as they are."""
        blocks: dict[int, list[Piece | None]] = {}
        for edit in edits:
            for block in range(edit.page // PAGES_PER_BLOCK, (edit.end - 1) // PAGES_PER_BLOCK + 1):
                blocks.setdefault(block, [None] * PAGES_PER_BLOCK)
        kept, before = [], []
        for piece in self._unpacked(row):
            block, at = divmod(piece.page, PAGES_PER_BLOCK)
            if block in blocks:
                blocks[block][at : at + piece.pages] = [piece] * piece.pages
                before.append(piece)
            else:
                kept.append(piece)
        for edit in edits:
            for page in range(edit.page, edit.end):
                block, at = divmod(page, PAGES_PER_BLOCK)
                now = blocks[block][at]
                if edit.source is None or (now and (now.object, now.offset_bytes) == edit.source):
                    blocks[block][at] = edit.piece
        after = [piece for block, pages in blocks.items() for piece in _joined(block, pages)]
        self._put(row, before, after, kept)

    def _put(self, row: int, before: list[Piece], after: list[Piece], kept: Iterable[Piece] = ()) -> None:
        """Replace the pieces `before` of a row by those in `after`, beside the ones that it keeps."""
        for piece in before:
            self._live_bytes[piece.object] -= piece.share_bytes
            self._less_live.add(piece.object)
        for piece in after:
            if piece.object not in self._numbers:
                self._number(piece.object)
            self._live_bytes[piece.object] += piece.share_bytes
        packed = pack(sorted([*kept, *after], key=lambda piece: piece.page), self._numbers)
        if packed != self._rows.get(row, b""):
            self._touched.rows.add(row)
        if packed:
            self._rows[row] = packed
        else:
            self._rows.pop(row, None)

    def _number(self, name: ObjectName) -> None:
        number = self._free.pop() if self._free else len(self._objects)
        self._objects[number : number + 1] = [name]
        self._numbers[name] = number
        self._live_bytes[name] = 0
        self._touched.objects.add(number)

    def _drop_dead(self) -> None:
        """Forget objects that no piece names, and let others have their numbers."""
        for name in self._less_live:
            if not self._live_bytes[name]:
                number = self._numbers.pop(name)
                self._objects[number] = None
                self._free.append(number)
                self._touched.objects.add(number)
                del self._live_bytes[name]
        self._less_live.clear()


def _gaps(ranges: Iterable[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """What of [first, end) is in none of the ranges, which are in order and inside."""
    for low, high in ranges:
        if first < low:
            yield first, low
        first = high
    if first < end:
        yield first, end


def _joined(block: int, pages: list[Piece | None]) -> Iterator[Piece]:
    """Pieces out of what the 16 pages of a block are each part of."""
    at = 0
    while at < PAGES_PER_BLOCK:
        piece, first = pages[at], at
        while at < PAGES_PER_BLOCK and pages[at] is piece:
            at += 1
        if piece is not None:
            yield piece.part(block * PAGES_PER_BLOCK + first, block * PAGES_PER_BLOCK + at)
