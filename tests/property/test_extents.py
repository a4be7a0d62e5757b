"""Extent maps against a dictionary with an entry for every page, over random records; and their bytes.

The model follows the words of docs/formats.md one page at a time. Records are drawn where things meet: at the
ends of blocks, of rows, of the base and of the volume.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import pairwise
from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property.effort import effort
from tierblk.errors import RemoteRefused
from tierblk.extent import PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.remote import checkpoint, epoch
from tierblk.remote.birth import Base, Birth
from tierblk.remote.extents import ExtentMap
from tierblk.remote.kept import Changes
from tierblk.remote.pieces import ROW_PAGES, Hole
from tierblk.remote.ranges import Ranges
from tierblk.remote.record import (
    IN_RECORD,
    INLINE_AT,
    Codec,
    Data,
    Head,
    Move,
    ObjectName,
    Record,
    Run,
    Zeroes,
    pages_of,
)

UUID_1 = UUID(int=1)
BASE = Base("file:///image", 20 * PAGE_BYTES + 512, "size:1")
SIZES = [
    3 * ROW_PAGES * PAGE_BYTES,
    (ROW_PAGES + 5) * PAGE_BYTES,
    ROW_PAGES * PAGE_BYTES,
    18 * PAGE_BYTES,
    4096,
]
RAGGED = (ROW_PAGES + 6) * PAGE_BYTES - 512
BLOCKS = [0, 0, 1, 1, 2, 63, 64, 64, 128]
OBJECT_BYTES = 1 << 20


@dataclass(frozen=True)
class At:
    """Where the model has one page."""

    object: ObjectName
    offset_bytes: int
    stored_bytes: int
    codec: Codec
    index: int
    run_pages: int
    crc: bytes


Pages = dict[int, At | None]  # None: zeros


@dataclass
class Model:
    """A volume by its pages, at every epoch."""

    head: Head
    pages: Pages = field(default_factory=dict)
    history: dict[int, tuple[Head, Pages]] = field(default_factory=dict)

    def apply(self, record: Record, record_hash: bytes) -> None:
        pages = dict(self.history[record.rolled_back_to][1] if record.rolled_back_to else self.pages)
        pages = {page: at for page, at in pages.items() if page < pages_of(record.size_bytes)}
        for move in record.moves:
            for page, at in spread(move.to, record):
                now = pages.get(page)
                if now and (now.object, now.offset_bytes) == (move.source, move.offset_bytes):
                    pages[page] = at
        for zeroes in record.zeroes:
            pages |= dict.fromkeys(range(zeroes.page, zeroes.end))
        for run in record.runs:
            pages |= dict(spread(run, record))
        self.pages, self.head = pages, Head.of(record, record_hash)
        self.history[record.epoch] = (self.head, pages)

    def expected(self, page: int) -> At | bool:
        """Where the page is, or whether the base has it."""
        at = self.pages.get(page, False)
        if at is False:
            return page < pages_of(self.head.base_visible_bytes)
        return at or False


def spread(run: Run, record: Record) -> list[tuple[int, At]]:
    name = record.object_name(run.n)
    return [
        (
            run.page + i,
            At(
                name, run.offset_bytes, run.stored_bytes, run.codec, i, run.pages, run.crcs[i * 4 : i * 4 + 4]
            ),
        )
        for i in range(run.pages)
    ]


def looked_up(extents: ExtentMap, first: int, count: int) -> dict[int, At | bool]:
    """What lookup says, page by page; also that its pieces are in order, whole and as large as can be."""
    found: dict[int, At | bool] = {}
    at, before = first, None
    for piece in extents.lookup(first, count):
        assert piece.page == at
        assert piece.pages > 0
        at += piece.pages
        if isinstance(piece, Hole):
            assert not (isinstance(before, Hole) and before.from_base == piece.from_base)
            found |= dict.fromkeys(range(piece.page, at), piece.from_base)
        else:
            assert before is None or isinstance(before, Hole) or not before.goes_on_in(piece)
            for i in range(piece.pages):
                found[piece.page + i] = At(
                    piece.object,
                    piece.offset_bytes,
                    piece.stored_bytes,
                    piece.codec,
                    piece.skip + i,
                    piece.run_pages,
                    piece.crc(piece.page + i).to_bytes(4, "little"),
                )
        before = piece
    assert at == first + count
    return found


def draw_run(random: Random, number: int, *, inline: bool) -> Run:
    first = random.choice([0, 0, 3, 7, 8, 15])
    most = PAGES_PER_BLOCK - first
    pages = min(most, random.choice([1, 4, random.randint(1, most)]))
    codec = random.choice([Codec.RAW, Codec.RAW, Codec.ZSTD])
    stored_bytes = pages * PAGE_BYTES if codec == Codec.RAW else random.randint(1, pages * PAGE_BYTES - 1)
    page = random.choice(BLOCKS) * PAGES_PER_BLOCK + first
    n = IN_RECORD if inline else random.choice([0, 9])
    return Run(page, pages, n, INLINE_AT + number * 65536, stored_bytes, codec, random.randbytes(pages * 4))


def draw_runs(random: Random, count: int, taken: set[int], pages_end: int, first_number: int) -> list[Run]:
    runs = []
    for number in range(count):
        run = draw_run(random, first_number + number, inline=random.random() < 0.3)
        pages = set(range(run.page, run.end))
        if run.end <= pages_end and not pages & taken:
            taken |= pages
            runs.append(run)
    return sorted(runs, key=lambda run: run.page)


def draw_zeroes(random: Random, taken: set[int], pages_end: int) -> list[Zeroes]:
    found = []
    for _ in range(random.choice([0, 0, 1, 1, 3])):
        page = random.choice([0, 5, 15, 16, 20, 21, 30, 1000, ROW_PAGES - 1, ROW_PAGES, 2 * ROW_PAGES])
        count = random.choice([1, 2, 14, 16, 1024, 1500])
        pages = set(range(page, min(page + count, pages_end)))
        if pages and not pages & taken:
            taken |= pages
            found.append(Zeroes(page, len(pages)))
    return sorted(found, key=lambda zeroes: zeroes.page)


def draw_moves(random: Random, model: Model, pages_end: int) -> list[Move]:
    """Moves of what is in the map, or was at some epoch; most have other pages than the old run."""
    moves = []
    was = random.choice([model.pages, *(pages for _, pages in model.history.values())])
    for run in draw_runs(random, random.choice([0, 0, 2, 5]), set(), pages_end, 9):
        sources = [at for page in range(run.page, run.end) if (at := was.get(page))]
        if sources:
            at = random.choice(sources)
            moves.append(Move(at.object, at.offset_bytes, run))
    return moves


def draw_record(random: Random, model: Model) -> Record:
    head = model.head
    back_to = random.choice(list(model.history)) if model.history and random.random() < 0.15 else 0
    before = model.history[back_to][0] if back_to else head
    size_bytes = random.choice([before.size_bytes] * 6 + SIZES + [RAGGED])
    if size_bytes % PAGE_BYTES and size_bytes < before.size_bytes:
        size_bytes = before.size_bytes
    pages_end = pages_of(size_bytes)
    visible_bytes = min(before.base_visible_bytes, size_bytes)
    if random.random() < 0.1:
        visible_bytes = random.randint(0, visible_bytes)
    taken: set[int] = set()
    runs = draw_runs(random, random.randint(0, 8), taken, pages_end, 0)
    zeroes = draw_zeroes(random, taken, pages_end)
    inline_bytes = random.choice([0, 0, OBJECT_BYTES])
    if not inline_bytes:
        runs = [run for run in runs if run.n != IN_RECORD]
    moves = [move for move in draw_moves(random, model, pages_end) if move.to.n != IN_RECORD or inline_bytes]
    return Record(
        uuid=head.uuid,
        epoch=head.epoch + 1,
        attempt=random.randbytes(16),
        writer=bytes(16),
        previous=head.hash,
        size_bytes=size_bytes,
        base_visible_bytes=visible_bytes,
        base=BASE,
        released=random.random() < 0.5,
        rolled_back_to=back_to,
        created_unix_s=0,
        data=(Data(0, OBJECT_BYTES), Data(9, OBJECT_BYTES)),
        runs=tuple(runs),
        zeroes=tuple(zeroes),
        moves=tuple(sorted(moves, key=lambda move: move.to.page)),
        inline=bytes(inline_bytes),
    )


def agree(extents: ExtentMap, model: Model, random: Random) -> None:
    assert extents.head == model.head
    pages_end = pages_of(model.head.size_bytes)
    expected = {page: model.expected(page) for page in range(pages_end)}
    assert looked_up(extents, 0, pages_end) == expected
    for _ in range(4):
        first = random.randrange(pages_end)
        count = random.randint(0, min(40, pages_end - first))
        assert looked_up(extents, first, count) == {n: expected[n] for n in range(first, first + count)}
    live = extents.live_bytes()
    assert live.keys() == {at.object for at in model.pages.values() if at}
    shares = dict.fromkeys(live, 0.0)
    for at in model.pages.values():
        if at:
            shares[at.object] += at.stored_bytes / at.run_pages
    for name, live_bytes in live.items():
        assert shares[name] - 0.01 <= live_bytes <= shares[name] + 200  # rounded up, a piece at a time


@effort(examples=150, steps=8)
@given(st.integers(1, 8), st.integers(0, 2**64))
def test_a_map_is_what_its_records_say(count: int, seed: int) -> None:
    random = Random(seed)  # one number that is drawn: choices that hypothesis draws are mostly the first ones
    born = Birth(UUID_1, SIZES[0], BASE, None, 0)
    model, extents = Model(Head.born(born)), ExtentMap(Head.born(born))
    maps: dict[int, ExtentMap] = {}
    stored_pairs = Stored()
    for _ in range(count):
        record = draw_record(random, model)
        encoded = epoch.encode(record)
        decoded = epoch.decode(encoded, name="a record")
        assert decoded == record
        back = maps[record.rolled_back_to] if record.rolled_back_to else None
        extents.apply(decoded, encoded[-32:], rolled_back=back)
        model.apply(record, encoded[-32:])
        agree(extents, model, random)
        maps[record.epoch] = extents.copy()
        stored = checkpoint.encode(extents)
        loaded = checkpoint.decode(stored, name="a checkpoint")
        assert checkpoint.encode(loaded) == stored
        restored = stored_pairs.take(extents, random)
        if restored is not None:
            assert checkpoint.encode(restored) == stored
            agree(restored, model, random)
        extents = random.choice([extents, extents, loaded, restored or extents])
        agree(extents, model, random)
    # What came later left the copies as they were.
    for number, (head, pages) in model.history.items():
        agree(maps[number], Model(head, pages), random)


@dataclass
class Stored:
    """The pairs that were taken of a map, as somebody keeps them who may fail to."""

    pairs: dict[bytes, bytes] = field(default_factory=dict)

    def write(self, changes: Changes) -> None:
        if changes.anew:
            self.pairs.clear()
        self.pairs.update(changes.pairs)
        for key in [key for key, value in self.pairs.items() if not value]:
            del self.pairs[key]

    def take(self, extents: ExtentMap, random: Random) -> ExtentMap | None:
        """What can be restored after a take; None: there was none, as when nobody has the time."""
        if random.random() < 0.3:
            return None
        for _ in range(random.choice([0, 0, 1, 2])):
            changes = extents.take_changes()
            assert changes is not None
            extents.put_back(changes)
        changes = extents.take_changes()
        assert changes is not None
        assert not extents.is_changed
        assert extents.take_changes() is None
        self.write(changes)
        shuffled = random.sample(list(self.pairs.items()), len(self.pairs))
        restored = ExtentMap.restore(shuffled, uuid=extents.head.uuid)
        assert not restored.is_changed
        whole = restored.copy().take_changes()
        assert whole is not None
        assert whole.anew
        assert dict(whole.pairs) == self.pairs, "nothing more is kept than what the map is"
        return restored


@effort(examples=200, steps=1)
@given(st.integers(0, 2**64), st.integers(0, 2**32), st.integers(1, 255))
def test_i12_damage_is_refused_or_says_something_else(seed: int, at: int, change: int) -> None:
    random = Random(seed)
    born = Birth(UUID_1, SIZES[0], BASE, None, 0)
    model, extents = Model(Head.born(born)), ExtentMap(Head.born(born))
    for _ in range(3):
        record = replace(draw_record(random, model), inline=b"", data=(Data(0, OBJECT_BYTES),))
        runs = tuple(run for run in record.runs if run.n == 0)
        moves = tuple(move for move in record.moves if move.to.n == 0)
        record = replace(record, runs=runs, moves=moves, rolled_back_to=0, size_bytes=SIZES[0])
        record = replace(record, base_visible_bytes=model.head.base_visible_bytes)
        encoded = epoch.encode(record)
        model.apply(record, encoded[-32:])
        extents.apply(record, encoded[-32:])
    for data, decode in ((encoded, decoded_record), (checkpoint.encode(extents), decoded_map)):
        place = at % len(data)
        changed = data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
        with pytest.raises(RemoteRefused):
            decode(changed)
        with pytest.raises(RemoteRefused):
            decode(data[:place])
        body = changed[:-32]
        for forged in (body, body[:place], body[:place] + body[place + 1 :], body + body[:1]):
            sealed = forged + sha256(forged).digest()
            try:
                again = decode(sealed)
            except RemoteRefused:
                continue
            assert again == sealed


def decoded_record(data: bytes) -> bytes:
    return epoch.encode(epoch.decode(data, name="a record"))


def decoded_map(data: bytes) -> bytes:
    return checkpoint.encode(checkpoint.decode(data, name="a checkpoint"))


@effort(examples=100, steps=1)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 10)), max_size=20))
def test_ranges_are_a_set(changes: list[tuple[bool, int, int]]) -> None:
    ranges, model = Ranges(), set[int]()
    for add, first, count in changes:
        numbers = range(first, first + count)
        if add:
            ranges.add(first, first + count)
            model |= set(numbers)
        else:
            ranges.remove(first, first + count)
            model -= set(numbers)
        found = list(ranges)
        assert {n for a, b in found for n in range(a, b)} == model
        assert all(a < b for a, b in found)
        assert all(b < c for (_, b), (c, _) in pairwise(found))
        inside = [n for a, b in ranges.overlap(first, first + count) for n in range(a, b)]
        assert inside == sorted(model & set(numbers))


def test_zeros_of_all_of_a_huge_volume_cost_nothing() -> None:
    base = Base("file:///huge", 1 << 60, "size:1")
    extents = ExtentMap(Head.born(Birth(UUID_1, 1 << 60, base, None, 0)))
    all_pages = pages_of(1 << 60)
    record = Record(UUID_1, 1, bytes(16), bytes(16), bytes(32), 1 << 60, 1 << 60, base, False, 0, 0)
    record = replace(record, zeroes=(Zeroes(0, all_pages),))
    extents.apply(record, b"1" * 32)
    assert list(extents.lookup(0, all_pages)) == [Hole(0, all_pages, from_base=False)]
    run = Run(1 << 40, 1, 0, 0, 4096, Codec.RAW, bytes(4))
    record = replace(record, epoch=2, previous=b"1" * 32, zeroes=(), data=(Data(0, 4096),), runs=(run,))
    extents.apply(record, b"2" * 32)
    assert [piece.pages for piece in extents.lookup(0, all_pages)] == [1 << 40, 1, all_pages - (1 << 40) - 1]
    record = replace(
        record, epoch=3, previous=b"2" * 32, data=(), runs=(), zeroes=(Zeroes(1, all_pages - 1),)
    )
    extents.apply(record, b"3" * 32)
    assert not extents.live_bytes()
    assert list(extents.lookup(0, all_pages)) == [Hole(0, all_pages, from_base=False)]


def test_what_does_not_follow_changes_nothing() -> None:
    extents = ExtentMap(Head.born(Birth(UUID_1, 1 << 20, None, None, 0)))
    claim = Record(UUID_1, 1, bytes(16), bytes(16), bytes(32), 1 << 20, 0, None, False, 0, 0)
    extents.apply(claim, b"1" * 32)
    wrong = replace(claim, epoch=2, previous=b"x" * 32, size_bytes=4096)
    with pytest.raises(RemoteRefused, match=r"^epoch/0{15}2 does not follow epoch 1 of this volume: "):
        extents.apply(wrong, b"2" * 32)
    assert extents.head == Head.of(claim, b"1" * 32)
    back = replace(claim, epoch=2, previous=b"1" * 32, rolled_back_to=1)
    with pytest.raises(ValueError, match="needs the map of then"):
        extents.apply(back, b"2" * 32)
    with pytest.raises(ValueError, match="needs the map of then"):
        extents.apply(replace(back, rolled_back_to=0), b"2" * 32, rolled_back=extents.copy())
    for page, pages in ((-1, 1), (0, 257), (257, 0), (0, -1)):
        with pytest.raises(ValueError, match="are not inside the volume"):
            list(extents.lookup(page, pages))


def test_r15_a_move_is_for_the_pages_of_one_old_run() -> None:
    extents = ExtentMap(Head.born(Birth(UUID_1, 1 << 20, None, None, 0)))
    record = Record(UUID_1, 1, bytes(16), bytes(16), bytes(32), 1 << 20, 0, None, False, 0, 0)
    one, other, last = (Run(page, 1, 0, page * 4096, 4096, Codec.RAW, bytes(4)) for page in (0, 1, 2))
    record = replace(record, data=(Data(0, 3 * 4096),), runs=(one, other, last))
    extents.apply(record, b"1" * 32)
    to = Run(0, 3, 5, 0, 3 * 4096, Codec.RAW, b"to" * 6)
    move = Move(record.object_name(0), other.offset_bytes, to)
    after = replace(record, epoch=2, previous=b"1" * 32, data=(Data(5, 3 * 4096),), runs=(), moves=(move,))
    extents.apply(after, b"2" * 32)
    places = [piece for piece in extents.lookup(0, 3) if not isinstance(piece, Hole)]
    assert [piece.object.epoch for piece in places] == [1, 2, 1]
    assert (places[1].offset_bytes, places[1].skip, places[1].run_pages) == (0, 1, 3)
    assert extents.live_bytes() == {record.object_name(0): 2 * 4096, after.object_name(5): 4096}


def test_a_fork_is_a_map_of_its_own() -> None:
    extents = ExtentMap(Head.born(Birth(UUID_1, 1 << 20, None, None, 0)))
    claim = Record(UUID_1, 1, bytes(16), bytes(16), bytes(32), 1 << 20, 0, None, False, 0, 0)
    extents.apply(claim, b"1" * 32)
    fork = extents.fork(UUID(int=2))
    mine = replace(claim, uuid=UUID(int=2), epoch=2, previous=b"1" * 32, data=(Data(0, 4096),))
    fork.apply(replace(mine, runs=(Run(0, 1, 0, 0, 4096, Codec.RAW, bytes(4)),)), b"2" * 32)
    assert (extents.head.epoch, fork.head.epoch) == (1, 2)
    assert not extents.live_bytes()
    with pytest.raises(RemoteRefused, match="it is of volume"):
        extents.apply(mine, b"2" * 32)
