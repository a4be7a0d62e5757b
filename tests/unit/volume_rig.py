"""A writer of small volumes into a dictionary, for the tests of their formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from uuid import UUID

from tierblk.core import crc32c
from tierblk.extent import PAGE_BYTES, PAGES_PER_BLOCK
from tierblk.remote import birth, checkpoint, epoch
from tierblk.remote.birth import Base, Birth
from tierblk.remote.extents import ExtentMap
from tierblk.remote.pieces import Piece
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
)

UUID_1 = UUID("00112233-4455-6677-8899-aabbccddeeff")
WRITER = bytes(range(16))
BASE = Base("https://example.org/é.img", 1 << 20, 'etag:"v1"')


def crcs(raw: bytes) -> bytes:
    pages = range(0, len(raw), PAGE_BYTES)
    return b"".join(crc32c(raw[at : at + PAGE_BYTES]).to_bytes(4, "little") for at in pages)


def squeezed(raw: bytes) -> bytes | None:
    """A zstd frame for one byte that repeats; None: it is more than that."""
    if raw != raw[:1] * len(raw):
        return None
    block = (1 | 1 << 1 | len(raw) << 3).to_bytes(3, "little") + raw[:1]
    return b"\x28\xb5\x2f\xfd\xa0" + len(raw).to_bytes(4, "little") + block


def stretches(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbouring pages of one block, as (first, how many)."""
    ordered = sorted(pages)
    cuts = [
        i
        for i, (page, after) in enumerate(pairwise(ordered), 1)
        if after != page + 1 or after % PAGES_PER_BLOCK == 0
    ]
    edges = [0, *cuts, len(ordered)]
    return [(ordered[a], b - a) for a, b in pairwise(edges) if a < b]


@dataclass
class Volume:
    """A volume that is written: its objects, and its map after every epoch."""

    birth: Birth
    objects: dict[str, bytes] = field(default_factory=dict)
    maps: list[ExtentMap] = field(default_factory=list)
    attempts: int = 0
    inherited: list[ExtentMap] = field(default_factory=list)  # of a clone: those before it

    def __post_init__(self) -> None:
        self.objects["volume.json"] = birth.encode(self.birth)
        if not self.maps:
            self.maps.append(ExtentMap(Head.born(self.birth)))

    @property
    def map(self) -> ExtentMap:
        return self.maps[-1]

    def commit(
        self,
        writes: Mapping[int, bytes] | None = None,
        zeroes: Iterable[tuple[int, int]] = (),
        *,
        size_bytes: int | None = None,
        visible_bytes: int | None = None,
        back_to: int = 0,
        inline: bool = False,
        moves: Mapping[tuple[ObjectName, int], Mapping[int, bytes]] | None = None,
    ) -> Record:
        """One more epoch. writes: the 4096 bytes of pages; moves: the same, by where they are now."""
        head = self.map.head
        self.attempts += 1
        size_bytes = head.size_bytes if size_bytes is None else size_bytes
        store = _Store(INLINE_AT if inline else 0, IN_RECORD if inline else 7)
        runs = tuple(store.runs(writes or {}))
        moved = [Move(*source, run) for source, pages in (moves or {}).items() for run in store.runs(pages)]
        record = Record(
            uuid=head.uuid,
            epoch=head.epoch + 1,
            attempt=self.attempts.to_bytes(16, "big"),
            writer=WRITER,
            previous=head.hash,
            size_bytes=size_bytes,
            base_visible_bytes=min(size_bytes, head.base_visible_bytes)
            if visible_bytes is None
            else visible_bytes,
            base=head.base,
            released=False,
            rolled_back_to=back_to,
            created_unix_s=1_795_000_000,
            data=(Data(7, len(store.stored)),) if store.stored and not inline else (),
            runs=runs,
            zeroes=tuple(Zeroes(*pages) for pages in zeroes),
            moves=tuple(sorted(moved, key=lambda move: move.to.page)),
            inline=store.stored if inline else b"",
        )
        if store.stored and not inline:
            self.objects[str(record.object_name(7))] = store.stored
        self.take(record)
        return record

    def take(self, record: Record) -> None:
        """Put a record among the objects, and apply what its bytes say."""
        name, encoded = f"epoch/{record.epoch:016x}", epoch.encode(record)
        self.objects[name] = encoded
        by_epoch = {extents.head.epoch: extents for extents in (*self.inherited, *self.maps)}
        after = self.map.copy()
        back = by_epoch[record.rolled_back_to] if record.rolled_back_to else None
        after.apply(epoch.decode(encoded, name=name), epoch.hash_of(encoded), rolled_back=back)
        self.maps.append(after)

    def checkpoint(self) -> str:
        """Store the map of now; its name."""
        name = checkpoint.name_of(self.map.head)
        self.objects[name] = checkpoint.encode(self.map)
        return name

    def clone(self, uuid: UUID, url: str = "s3://bucket/parent") -> Volume:
        """A clone as of now, among the same objects but for its volume.json. url: of this one."""
        head = self.map.head
        parent = birth.Parent(self.birth.uuid, url, head.epoch)
        born = replace(self.birth, uuid=uuid, size_bytes=head.size_bytes, parent=parent)
        before = [*self.inherited, *self.maps]
        return Volume(born, dict(self.objects), [self.map.fork(uuid)], self.attempts, before)


@dataclass
class _Store:
    """Stored bytes of one object, of which the first is at begin_bytes."""

    begin_bytes: int
    n: int
    stored: bytes = b""

    def runs(self, writes: Mapping[int, bytes]) -> Iterable[Run]:
        for page, pages in stretches(writes):
            raw = b"".join(writes[page + i] for i in range(pages))
            short = squeezed(raw)
            stored = raw if short is None else short
            codec = Codec.RAW if short is None else Codec.ZSTD
            at = self.begin_bytes + len(self.stored)
            yield Run(page, pages, self.n, at, len(stored), codec, crcs(raw))
            self.stored += stored


def sample() -> Volume:
    """A volume over BASE with two epochs; the second has one of everything that a record can have."""
    volume = Volume(Birth(UUID_1, 3 << 20, BASE, None, 1_795_000_000))
    volume.commit({5: b"a" * PAGE_BYTES, 6: b"b" * PAGE_BYTES, 40: bytes(range(256)) * 16})
    piece = next(volume.map.lookup(40, 1))
    assert isinstance(piece, Piece)
    head = volume.map.head
    stored = squeezed(b"c" * 3 * PAGE_BYTES) or b""
    moved = bytes(range(256)) * 16
    volume.attempts += 1
    record = Record(
        uuid=head.uuid,
        epoch=2,
        attempt=volume.attempts.to_bytes(16, "big"),
        writer=WRITER,
        previous=head.hash,
        size_bytes=2 << 20,
        base_visible_bytes=1 << 19,
        base=BASE,
        released=True,
        rolled_back_to=0,
        created_unix_s=1_795_000_001,
        data=(Data(0, PAGE_BYTES), Data(9, 1)),
        runs=(Run(2, 3, IN_RECORD, INLINE_AT, len(stored), Codec.ZSTD, crcs(b"c" * 3 * PAGE_BYTES)),),
        zeroes=(Zeroes(6, 1), Zeroes(100, 50)),
        moves=(Move(piece.object, piece.offset_bytes, Run(40, 1, 0, 0, PAGE_BYTES, Codec.RAW, crcs(moved))),),
        inline=stored,
    )
    volume.objects[str(record.object_name(0))] = moved
    volume.objects[str(record.object_name(9))] = b"-"
    volume.take(record)
    return volume
