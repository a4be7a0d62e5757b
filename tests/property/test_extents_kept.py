"""What is kept of an extent map, piece by piece: that it costs what changed, and that damage is an error.

That it is the map, over random records, is in test_extents.py.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from uuid import UUID
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property.effort import effort
from tests.property.test_extents import BASE, OBJECT_BYTES, SIZES, UUID_1, Model, draw_record
from tierblk.extent import PAGE_BYTES
from tierblk.remote import epoch
from tierblk.remote.birth import Base, Birth
from tierblk.remote.extents import ExtentMap
from tierblk.remote.pieces import ROW_PAGES
from tierblk.remote.record import Codec, Data, Head, Record, Run, Zeroes

ROWS = 200
SIZE_BYTES = ROWS * ROW_PAGES * PAGE_BYTES
CLAIM = Record(UUID_1, 1, bytes(16), bytes(16), bytes(32), SIZE_BYTES, SIZE_BYTES, None, False, 0, 0)


def filled() -> ExtentMap:
    """A map with a piece and a range of zeroes in each of its rows, all in one object."""
    base = Base("file:///image", SIZE_BYTES, "size:1")
    extents = ExtentMap(Head.born(Birth(UUID_1, SIZE_BYTES, base, None, 0)))
    runs = tuple(Run(row * ROW_PAGES, 1, 0, row * 4096, 4096, Codec.RAW, bytes(4)) for row in range(ROWS))
    zeroes = tuple(Zeroes(row * ROW_PAGES + 100, 10) for row in range(ROWS))
    data = (Data(0, ROWS * 4096),)
    extents.apply(replace(CLAIM, base=base, data=data, runs=runs, zeroes=zeroes), b"1" * 32)
    return extents


def next_record(extents: ExtentMap, page: int, zeroes: tuple[Zeroes, ...] = ()) -> tuple[Record, bytes]:
    number = extents.head.epoch + 1
    run = Run(page, 1, 0, 0, 4096, Codec.RAW, bytes(4))
    record = replace(CLAIM, epoch=number, previous=extents.head.hash, base=extents.head.base)
    record = replace(record, data=(Data(0, 4096),), runs=(run,), zeroes=zeroes)
    return record, bytes([number]) * 32


def test_what_is_taken_is_what_changed() -> None:
    extents = filled()
    first = extents.take_changes()
    assert first is not None
    assert first.anew
    assert len(first.pairs) == 1 + 1 + 2 * ROWS
    extents.apply(*next_record(extents, 7 * ROW_PAGES, (Zeroes(9 * ROW_PAGES + 109, 5),)))
    changes = extents.take_changes()
    assert changes is not None
    assert not changes.anew
    keys = [key for key, _ in changes.pairs]
    row, zeroes = (kind + number.to_bytes(8, "big") for kind, number in ((b"r", 7), (b"z", 9 * 1024 + 100)))
    assert sorted(keys) == sorted([b"h", b"o" + (1).to_bytes(4, "big"), row, zeroes])
    restored = ExtentMap.restore((dict(first.pairs) | dict(changes.pairs)).items(), uuid=UUID_1)
    extents.apply(*next_record(extents, 7 * ROW_PAGES))
    restored.apply(*next_record(restored, 7 * ROW_PAGES))
    for each in (extents, restored):
        later = each.take_changes()
        assert later is not None
        assert not later.anew
        assert len(later.pairs) == 4, "the head, a row, an object that came, and one that went"


def test_what_is_put_back_is_taken_as_it_is_then() -> None:
    extents = filled()
    first = extents.take_changes()
    assert first is not None
    extents.apply(*next_record(extents, 0))
    changes = extents.take_changes()
    assert changes is not None
    extents.apply(*next_record(extents, ROW_PAGES))
    extents.put_back(changes)
    both = extents.take_changes()
    assert both is not None
    rows = {key: value for key, value in both.pairs if key[:1] == b"r"}
    assert [key[-1] for key in rows] == [0, 1]
    restored = ExtentMap.restore((dict(first.pairs) | dict(both.pairs)).items(), uuid=UUID_1)
    assert list(restored.rows()) == list(extents.rows())
    assert not extents.is_changed
    extents.put_back(first)
    again = extents.take_changes()
    assert again is not None
    assert again.anew
    assert len(again.pairs) == 1 + 3 + 2 * ROWS


def test_another_map_is_kept_as_a_whole() -> None:
    extents = filled()
    assert extents.take_changes() is not None
    before = extents.copy()
    assert not extents.is_changed
    fork = extents.fork(UUID(int=2))
    back, record_hash = next_record(extents, 0)
    extents.apply(replace(back, rolled_back_to=1), record_hash, rolled_back=before)
    for each in (before, fork, extents):
        changes = each.take_changes()
        assert changes is not None
        assert changes.anew
        restored = ExtentMap.restore(changes.pairs, uuid=each.head.uuid)
        assert restored.head == each.head
        assert list(restored.rows()) == list(each.rows())


def test_a_volume_without_an_epoch_is_kept_too() -> None:
    for base in (BASE, None):
        extents = ExtentMap(Head.born(Birth(UUID_1, SIZES[0], base, None, 0)))
        changes = extents.take_changes()
        assert changes is not None
        assert ExtentMap.restore(changes.pairs, uuid=UUID_1).head == extents.head


def pairs_of(seed: int) -> dict[bytes, bytes]:
    """Of the map of a few random records."""
    random = Random(seed)
    born = Birth(UUID_1, SIZES[0], BASE, None, 0)
    model, extents = Model(Head.born(born)), ExtentMap(Head.born(born))
    for _ in range(3):
        record = replace(draw_record(random, model), rolled_back_to=0, size_bytes=SIZES[0], moves=())
        record = replace(record, base_visible_bytes=model.head.base_visible_bytes)
        record = replace(record, inline=bytes(OBJECT_BYTES))
        record_hash = epoch.hash_of(epoch.encode(record))
        model.apply(record, record_hash)
        extents.apply(record, record_hash)
    changes = extents.take_changes()
    assert changes is not None
    return dict(changes.pairs)


def forged(key: bytes, body: bytes) -> bytes:
    return body + crc32(body, crc32(key)).to_bytes(4, "little")


@effort(examples=150, steps=1)
@given(st.integers(0, 2**64), st.integers(0, 2**32), st.integers(1, 255))
def test_i12_damage_is_an_error_or_another_map(seed: int, at: int, change: int) -> None:
    """Another one only if its checksum has been made for it."""
    pairs = pairs_of(seed)
    key = sorted(pairs)[at % len(pairs)]
    value = pairs[key]
    place = at // len(pairs) % len(value)
    changed = value[:place] + bytes([value[place] ^ change]) + value[place + 1 :]
    other_key = key[:-1] + bytes([key[-1] ^ change])
    moved = {name: each for name, each in pairs.items() if name != key}
    for damaged in [
        pairs | {key: changed},
        pairs | {key: value[:place]},
        moved,
        moved | {other_key: value},
        pairs | {other_key: value},
        *([] if other_key in pairs else [pairs | {other_key: forged(other_key, value[:-4])}]),
    ]:
        with pytest.raises(ValueError, match=f"^the extents of volume {UUID_1} cannot be read: "):
            ExtentMap.restore(damaged.items(), uuid=UUID_1)
    place = min(place, len(value) - 5)
    body = value[:place] + bytes([value[place] ^ change]) + value[place + 1 : -4]
    for again in (body, body[:place], body + body[:1]):
        damaged = pairs | {key: forged(key, again)}
        try:
            restored = ExtentMap.restore(damaged.items(), uuid=UUID_1)
        except ValueError:
            continue
        whole = restored.copy().take_changes()
        assert whole is not None
        assert dict(whole.pairs) == damaged


def test_what_is_no_map_of_that_volume_is_named() -> None:
    pairs = pairs_of(1)
    head = pairs[b"h"]
    newer = forged(b"h", b"\2" + head[1:-4])
    for wrong, uuid, why in [
        (list(pairs.items()), UUID(int=2), f"it is of volume {UUID_1}, not {UUID(int=2)}"),
        ([], UUID_1, "it has no head"),
        ([*pairs.items(), (b"h", head)], UUID_1, "the key 68 is there twice"),
        ([(b"h", newer)], UUID_1, "its format is 2, and this version knows 1"),
    ]:
        with pytest.raises(ValueError, match=f"cannot be read: {why}$"):
            ExtentMap.restore(wrong, uuid=uuid)
