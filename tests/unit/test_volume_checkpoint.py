"""A checkpoint: the whole map and back, and whatever a store sends instead."""

from __future__ import annotations

import struct
from collections.abc import Callable
from hashlib import sha256

import pytest

from tests.unit.volume_rig import BASE, UUID_1, sample
from tierblk.errors import RemoteRefused
from tierblk.remote import epoch
from tierblk.remote.birth import Birth
from tierblk.remote.checkpoint import CHECKPOINT_BYTES_MAX, MAGIC, decode, encode, name_of
from tierblk.remote.extents import ExtentMap
from tierblk.remote.record import IN_RECORD, Head, ObjectName

SAMPLE = sample()
MAP = SAMPLE.map
NAME = name_of(MAP.head)
ENCODED = encode(MAP)
OBJECTS_AT = 112 + len(BASE.url.encode()) + len(BASE.validator)
ZEROES_AT = OBJECTS_AT + 3 * 28
ROW_AT = ZEROES_AT + 2 * 16
PIECES_AT = ROW_AT + 12


def resealed(body: bytes) -> bytes:
    return body + sha256(body).digest()


def refused(data: bytes) -> str:
    with pytest.raises(RemoteRefused) as caught:
        decode(data, name=NAME)
    assert caught.value.message.startswith(f"{NAME} ")
    assert "\n" not in caught.value.message
    return caught.value.message


def test_what_is_written_is_read() -> None:
    read = decode(ENCODED, name=NAME)
    assert read.head == MAP.head
    assert list(read.rows()) == list(MAP.rows())
    assert read.zeroes() == MAP.zeroes() == [(6, 7), (100, 128)]
    assert read.live_bytes() == MAP.live_bytes()
    assert encode(read) == ENCODED


def test_the_bytes_are_those_of_the_documentation() -> None:
    numbers = [
        (8, 4, 1),
        (28, 8, 2),
        (68, 8, 2 << 20),
        (76, 8, 1 << 19),
        (84, 8, 1 << 20),
        (92, 4, len(BASE.url.encode())),
        (96, 4, len(BASE.validator)),
        (100, 4, 3),
        (104, 4, 2),
        (108, 4, 1),
        (ROW_AT, 8, 0),
        (ROW_AT + 8, 4, len(ENCODED) - 32 - PIECES_AT),
    ]
    for at, length, value in numbers:
        assert int.from_bytes(ENCODED[at : at + length], "little") == value, at
    assert ENCODED[:8] == b"TBCHECK\0"
    assert ENCODED[12:28] == UUID_1.bytes
    assert ENCODED[36:68] == MAP.head.hash
    assert f"checkpoint/0000000000000002.{MAP.head.hash.hex()}" == NAME


def test_it_goes_on_from_a_checkpoint() -> None:
    longer = sample()
    longer.commit({7: b"z" * 4096})
    from_checkpoint = decode(ENCODED, name=NAME)
    data = longer.objects["epoch/0000000000000003"]
    from_checkpoint.apply(epoch.decode(data, name="epoch/3"), data[-32:])
    assert encode(from_checkpoint) == encode(longer.map)


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
def test_i12_every_changed_byte_is_refused(change: int) -> None:
    for at in range(len(ENCODED)):
        changed = bytearray(ENCODED)
        changed[at] ^= change
        refused(bytes(changed))


def test_i12_every_truncation_is_refused() -> None:
    for length in range(len(ENCODED)):
        refused(ENCODED[:length])
    for length in range(len(ENCODED) - 32):
        refused(resealed(ENCODED[:length]))


@pytest.mark.parametrize("change", [0x01, 0x02, 0x10, 0x80, 0xFF])
def test_i12_a_changed_byte_with_the_right_hash_is_refused_or_another_map(change: int) -> None:
    taken = 0
    for at in range(len(ENCODED) - 32):
        changed = bytearray(ENCODED[:-32])
        changed[at] ^= change
        data = resealed(bytes(changed))
        try:
            extents = decode(data, name=NAME)
        except RemoteRefused:
            continue
        taken += 1
        assert encode(extents) == data  # one spelling
        list(extents.lookup(0, extents.head.size_bytes // 4096))
    assert taken


def test_i12_counts_are_bounded_before_anything_is_made_of_them() -> None:
    for at in (92, 96, 100, 104, 108, ROW_AT + 8):
        body = bytearray(ENCODED[:-32])
        body[at : at + 4] = b"\xff" * 4
        assert "it ends too early" in refused(resealed(bytes(body)))


def test_no_checkpoint_at_all() -> None:
    assert "does not begin like one" in refused(SAMPLE.objects["epoch/0000000000000002"])
    assert "no checkpoint has more" in refused(_Long(MAGIC))
    assert "bytes follow its end" in refused(resealed(ENCODED[:-32] + b"\0"))
    with pytest.raises(RemoteRefused, match="made by a newer tierblk: its format is 7, this version knows 1"):
        decode(MAGIC + struct.pack("<I", 7) + bytes(40), name=NAME)


class _Long(bytes):
    """As if there were more of it than a checkpoint has."""

    def __len__(self) -> int:
        return CHECKPOINT_BYTES_MAX + 1


def _put(at: int, layout: str, *values: int | bytes) -> Callable[[bytearray], None]:
    def change(body: bytearray) -> None:
        struct.pack_into("<" + layout, body, at, *values)

    return change


WRONG: list[tuple[Callable[[bytearray], None], str]] = [
    (_put(28, "Q", 0), "it is of no record"),
    (_put(36, "QQQQ", 0, 0, 0, 0), "it is of no record"),
    (_put(68, "Q", 513), "size_bytes is no multiple of 512"),
    (_put(68, "Q", 2**62), "size_bytes is no multiple of 512"),
    (_put(76, "Q", 2**20 + 1), "cannot be visible"),
    (_put(84, "Q", 0), "it has no base, but an address"),
    (_put(OBJECTS_AT, "Q", 0), "an object of epoch 0"),
    (_put(OBJECTS_AT + 56, "Q", 3), "an object of epoch 3"),
    (_put(OBJECTS_AT + 28, "Q", 1), "epoch 1 has two attempts"),
    (_put(OBJECTS_AT, "Q16s", 2, b"\x02" * 16), "out of order"),
    (_put(OBJECTS_AT + 24, "I", 65536), "there is no object 65536"),
    (_put(ZEROES_AT, "QQ", 100, 1), "the zeroes at page 100 are out of order"),
    (_put(ZEROES_AT, "QQ", 6, 0), "the zeroes at page 6"),
    (_put(ZEROES_AT, "QQ", 6, 94), "the zeroes at page 100 are out of order"),  # they touch
    (_put(ZEROES_AT, "QQ", 5, 1), "some are zeros and stored"),
    (_put(ZEROES_AT + 16, "QQ", 100, 29), "not above the base"),
    (_put(ZEROES_AT + 16, "QQ", 2**64 - 1, 2**64 - 1), "not above the base"),
    (_put(ROW_AT, "Q", 1), "is not inside its row and the volume"),
    (_put(ROW_AT, "Q", 2**64 - 1), "is not inside its row and the volume"),
    (_put(PIECES_AT, "H", 1024), "is not inside its row"),
    (_put(PIECES_AT, "H", 5), "does not begin where one can"),
    (_put(PIECES_AT, "H", 14), "is not in one block"),
    (_put(PIECES_AT + 3, "B", 3), "not inside its run"),
    (_put(PIECES_AT + 3, "B", 1), "not inside its run"),
    (_put(PIECES_AT + 4, "B", 2), "not inside its run"),
    (_put(PIECES_AT + 4, "B", 16), "not in one block"),
    (_put(PIECES_AT + 5, "B", 2), "codec 2"),
    (_put(PIECES_AT + 6, "I", 3), "has object 3"),
    (_put(PIECES_AT + 10, "I", 32 << 20), "bytes at 33554432"),
    (_put(PIECES_AT + 14, "I", 3 * 4096), "the compressed run at page 2 has 12288 bytes"),
    (_put(PIECES_AT + 14, "I", 0), "the compressed run at page 2 has 0 bytes"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_a_map_that_no_records_could_have_made(change: Callable[[bytearray], None], said: str) -> None:
    body = bytearray(ENCODED[:-32])
    change(body)
    assert said in refused(resealed(bytes(body)))


def test_an_object_of_which_nothing_is_used_is_not_listed() -> None:
    body = bytearray(ENCODED[:-32])
    struct.pack_into("<I", body, 100, 4)
    body[OBJECTS_AT + 56 : OBJECTS_AT + 56] = (
        struct.pack("<Q", 2) + (2).to_bytes(16, "big") + bytes([1, 0, 0, 0])
    )
    assert "of which nothing is used" in refused(resealed(bytes(body)))


def piece(page: int, pages: int, skip: int, sums: int | None = None) -> bytes:
    """Of a raw run of 8 pages at the begin of object 0."""
    return struct.pack("<HBBBBIII", page, pages, skip, 8, 0, 0, 0, 8 * 4096) + bytes(4 * (sums or pages))


def with_rows(*rows: tuple[int, bytes]) -> bytes:
    """A checkpoint with one object and these rows."""
    header = struct.pack("<16sQ32sQQQ5I", UUID_1.bytes, 2, b"h" * 32, 16 << 20, 0, 0, 0, 0, 1, 0, len(rows))
    parts = [MAGIC, struct.pack("<I", 1), header, struct.pack("<Q16sI", 1, b"a" * 16, 0)]
    parts += [struct.pack("<QI", row, len(pieces)) + pieces for row, pieces in rows]
    return resealed(b"".join(parts))


def test_rows_and_pieces_that_could_be() -> None:
    for rows in (
        [(0, piece(0, 8, 0))],
        [(0, piece(8, 2, 0) + piece(11, 5, 3)), (3, piece(1, 7, 1))],
        [(0, piece(0, 2, 0) + piece(12, 4, 4))],
    ):
        data = with_rows(*rows)
        assert encode(decode(data, name=NAME)) == data


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(0, b""), (1, piece(0, 8, 0))], "row 0 is out of order or empty"),
        ([(1, piece(0, 8, 0)), (0, piece(0, 8, 0))], "row 0 is out of order or empty"),
        ([(1, piece(0, 8, 0)), (1, piece(8, 8, 0))], "row 1 is out of order or empty"),
        ([(0, piece(0, 4, 0) + piece(4, 4, 4))], "does not begin where one can"),  # they are one piece
        ([(0, piece(8, 8, 0) + piece(0, 8, 0))], "does not begin where one can"),
        ([(0, piece(0, 8, 0) + piece(7, 1, 7))], "does not begin where one can"),
        ([(0, piece(0, 8, 0) + piece(9, 0, 0))], "is not inside its row"),
        ([(0, piece(0, 1, 0, sums=2))], "ends within a piece"),
        ([(0, piece(0, 2, 0)[:-1])], "ends within a piece"),
        ([(0, piece(0, 1, 1))], "is not in one block"),
        ([(1, piece(2, 1, 3))], "is not in one block"),
        ([(0, piece(9, 7, 0))], "is not in one block"),
        ([(3, piece(1022, 2, 6) + piece(1023, 1, 7))], "does not begin where one can"),
        ([(4, piece(0, 8, 0))], "not inside its row and the volume"),
        ([(2**54, piece(0, 8, 0))], "not inside its row and the volume"),
    ],
)
def test_rows_and_pieces_that_could_not_be(rows: list[tuple[int, bytes]], said: str) -> None:
    assert said in refused(with_rows(*rows))


def test_an_empty_map() -> None:
    empty = ExtentMap(Head(UUID_1, 9, b"h" * 32, 8 << 50, 0, None))
    encoded = encode(empty)
    assert len(encoded) == 112 + 32
    assert encode(decode(encoded, name=NAME)) == encoded
    with pytest.raises(ValueError, match="no epoch yet"):
        encode(ExtentMap(Head.born(Birth(UUID_1, 4096, None, None, 0))))


def test_more_than_a_checkpoint_can_hold_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierblk.remote.checkpoint.CHECKPOINT_BYTES_MAX", len(ENCODED) - 1)
    with pytest.raises(ValueError, match="bytes, more than"):
        encode(MAP)


def test_live_bytes_are_those_that_the_map_still_names() -> None:
    first, attempt = 1, (1).to_bytes(16, "big")
    assert SAMPLE.maps[1].live_bytes()[ObjectName(first, attempt, 7)] == 2 * 4096 + 4096
    second = (2).to_bytes(16, "big")
    assert MAP.live_bytes() == {
        ObjectName(1, attempt, 7): 4096,  # page 5; page 6 is zeros, page 40 has moved
        ObjectName(2, second, 0): 4096,
        ObjectName(2, second, IN_RECORD): 13,
    }
