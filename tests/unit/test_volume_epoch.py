"""The record of an epoch: its bytes, its rules, and what it may follow."""

from __future__ import annotations

import struct
from dataclasses import replace
from hashlib import sha256
from typing import Any
from uuid import UUID

import pytest

from tests.unit.volume_rig import BASE, UUID_1, WRITER, sample
from tierblk.errors import RemoteRefused
from tierblk.remote import birth
from tierblk.remote.birth import Birth, Parent
from tierblk.remote.epoch import MAGIC, RECORD_BYTES_MAX, decode, encode, hash_of
from tierblk.remote.record import (
    IN_RECORD,
    INLINE_AT,
    INLINE_BYTES_MAX,
    OBJECT_BYTES_MAX,
    Codec,
    Data,
    Head,
    ObjectName,
    Record,
    Run,
    Zeroes,
    check_follows,
    fault,
)

SAMPLE = sample()
NAME = "epoch/0000000000000002"
ENCODED = SAMPLE.objects[NAME]
RECORD = decode(ENCODED, name=NAME)
BEFORE = SAMPLE.maps[1].head
RAW = Run(16, 2, 0, 0, 8192, Codec.RAW, bytes(8))
MOVE = RECORD.moves[0]


def resealed(body: bytes) -> bytes:
    return body + sha256(body).digest()


def refused(data: bytes) -> str:
    with pytest.raises(RemoteRefused) as caught:
        decode(data, name=NAME)
    assert caught.value.message.startswith(f"{NAME} ")
    assert "\n" not in caught.value.message
    return caught.value.message


def test_the_sample_has_everything() -> None:
    assert RECORD.data
    assert RECORD.runs
    assert RECORD.zeroes
    assert RECORD.moves
    assert RECORD.inline
    assert RECORD.base == BASE
    assert RECORD.released


def test_what_is_written_is_read() -> None:
    assert encode(RECORD) == ENCODED
    assert hash_of(ENCODED) == sha256(ENCODED[:-32]).digest()
    assert SAMPLE.map.head == Head.of(RECORD, ENCODED[-32:])


def test_the_bytes_are_those_of_the_documentation() -> None:
    numbers = [
        (8, 4, 1),
        (12, 4, 1),
        (32, 8, 2),
        (104, 8, 2 << 20),
        (112, 8, 1 << 19),
        (120, 8, 0),
        (128, 8, 1_795_000_001),
        (136, 8, 1 << 20),
        (144, 4, len(BASE.url.encode())),
        (148, 4, len(BASE.validator)),
        (152, 4, 2),
        (156, 4, 1),
        (160, 4, 2),
        (164, 4, 1),
        (168, 4, len(RECORD.inline)),
    ]
    for at, length, value in numbers:
        assert int.from_bytes(ENCODED[at : at + length], "little") == value, at
    assert ENCODED[:8] == b"TBEPOCH\0"
    assert ENCODED[16:32] == UUID_1.bytes
    assert ENCODED[40:56] == RECORD.attempt
    assert ENCODED[56:72] == WRITER
    assert ENCODED[72:104] == BEFORE.hash
    assert ENCODED[INLINE_AT:].startswith(RECORD.inline + BASE.url.encode() + BASE.validator.encode())
    assert len(ENCODED) == INLINE_AT + len(RECORD.inline) + len(BASE.url.encode()) + len(BASE.validator) + (
        2 * 8 + (22 + 3 * 4) + 2 * 16 + (54 + 4) + 32
    )


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


def test_i12_bytes_behind_the_end_are_refused() -> None:
    assert "sha256" in refused(ENCODED + b"\0")
    assert "4 bytes follow its end" in refused(resealed(ENCODED[:-32] + bytes(4)))


@pytest.mark.parametrize("change", [0x01, 0x02, 0x10, 0x80, 0xFF])
def test_i12_a_changed_byte_with_the_right_hash_is_refused_or_another_record(change: int) -> None:
    taken = 0
    for at in range(len(ENCODED) - 32):
        changed = bytearray(ENCODED[:-32])
        changed[at] ^= change
        data = resealed(bytes(changed))
        try:
            record = decode(data, name=NAME)
        except RemoteRefused:
            continue
        taken += 1
        assert encode(record) == data  # one spelling
        assert record != RECORD
    assert taken  # a sum, an attempt: nothing that this module could know


def test_i12_counts_are_bounded_before_anything_is_made_of_them() -> None:
    for at in (144, 148, 152, 156, 160, 164, 168):
        body = bytearray(ENCODED[:-32])
        body[at : at + 4] = b"\xff" * 4
        assert "it ends too early" in refused(resealed(bytes(body)))


def test_no_record_at_all() -> None:
    assert "does not begin like one" in refused(b"")
    assert "does not begin like one" in refused(resealed(b"TBCHECK\0" + ENCODED[8:-32]))
    assert "has more than 43 bytes" in refused(MAGIC + bytes(35))
    assert "it ends too early" in refused(resealed(ENCODED[:12]))
    assert "no record of an epoch has more" in refused(ENCODED.ljust(RECORD_BYTES_MAX + 1))
    assert "there was no format 0" in refused(resealed(MAGIC + bytes(4) + ENCODED[12:-32]))


def test_a_newer_format_says_so_whatever_it_is() -> None:
    with pytest.raises(
        RemoteRefused, match=r"made by a newer tierblk: its format is 2, this version knows 1$"
    ):
        decode(MAGIC + struct.pack("<I", 2) + b"x" * 40, name=NAME)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epoch": 0}, "there is no epoch 0"),
    ({"epoch": 2**64}, "there is no epoch"),
    ({"epoch": 1}, "zeros in epoch 1"),
    ({"previous": bytes(32)}, "zeros in epoch 1"),
    ({"previous": bytes(31)}, "zeros in epoch 1"),
    ({"attempt": bytes(15)}, "has not 16 bytes"),
    ({"writer": bytes(17)}, "has not 16 bytes"),
    ({"rolled_back_to": 2}, "cannot go back to epoch 2"),
    ({"created_unix_s": 2**40}, "at no time"),
    ({"size_bytes": 0}, "size_bytes is no multiple of 512"),
    ({"size_bytes": (2 << 20) + 1}, "size_bytes is no multiple of 512"),
    ({"size_bytes": (1 << 60) + 512}, "size_bytes is no multiple of 512"),
    ({"base_visible_bytes": (1 << 20) + 1}, "cannot be visible"),
    ({"base": None}, "524288 bytes of its base cannot be visible, at most 0"),
    ({"base": replace(BASE, url="a\nb")}, "url is no printable text"),
    ({"base": replace(BASE, url="x" * 4097)}, "url is longer"),
    ({"base": replace(BASE, validator="")}, "validator is no printable text"),
    ({"base": replace(BASE, size_bytes=2**60 + 1)}, "base's size_bytes is no whole number"),
    ({"data": (Data(0, 4096), Data(0, 4096))}, "data object 0 follows 0"),
    ({"data": (Data(1, 4096), Data(0, 4096))}, "data object 0 follows 1"),
    ({"data": (Data(0, 4096), Data(65536, 1))}, "data object 65536 follows 0"),
    ({"data": (Data(0, 0),)}, "data object 0 has 0 bytes"),
    ({"data": (Data(0, OBJECT_BYTES_MAX + 1),)}, "data object 0 has"),
    ({"data": ()}, "is not inside its object"),
    ({"inline": b""}, "is not inside its object"),
    ({"inline": bytes(INLINE_BYTES_MAX + 1)}, "inline bytes, more than"),
    ({"size_bytes": 1 << 19}, "not inside the volume"),
    ({"zeroes": (Zeroes(100, 50), Zeroes(6, 1))}, "the zeroes at page 6 are out of order"),
    ({"zeroes": (Zeroes(6, 2), Zeroes(7, 2))}, "the zeroes at page 7 are out of order"),
    ({"zeroes": (Zeroes(6, 0),)}, "the zeroes at page 6"),
    ({"zeroes": (Zeroes(511, 2),)}, "not inside the volume"),
    ({"zeroes": (Zeroes(2**63, 2**63),)}, "not inside the volume"),
    ({"zeroes": (Zeroes(0, 512),)}, "page 2 is in a run and in the zeroes"),
    ({"zeroes": (Zeroes(4, 1),)}, "page 4 is in a run and in the zeroes"),
    ({"moves": (MOVE, MOVE)}, "begins before the one before it ends"),
    ({"moves": (replace(MOVE, source=ObjectName(2, bytes(16), 0)),)}, "not from an earlier epoch"),
    ({"moves": (replace(MOVE, source=ObjectName(0, bytes(16), 0)),)}, "not from an earlier epoch"),
    ({"moves": (replace(MOVE, source=ObjectName(1, bytes(16), 65536)),)}, "was nowhere before"),
    (
        {"moves": (replace(MOVE, source=ObjectName(1, bytes(16), IN_RECORD), offset_bytes=INLINE_AT - 1),)},
        "was nowhere before",
    ),
    ({"moves": (replace(MOVE, offset_bytes=OBJECT_BYTES_MAX),)}, "was nowhere before"),
    ({"moves": (replace(MOVE, to=replace(MOVE.to, n=5)),)}, "of the moved, the run at page 40 is not inside"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_rule_that_is_broken(change: dict[str, Any], said: str) -> None:
    record = replace(RECORD, **change)
    assert said in (fault(record) or "")
    with pytest.raises(ValueError, match=r"^no record: "):
        encode(record)


RUNS: list[tuple[dict[str, Any], str]] = [
    ({"pages": 0}, "is not in one block"),
    ({"pages": 17}, "is not in one block"),
    ({"page": 31}, "is not in one block"),
    ({"page": 512}, "not inside the volume"),
    ({"page": -1}, "not inside the volume"),
    ({"page": 2**60}, "not inside the volume"),
    ({"stored_bytes": 8191}, "raw run at page 16 has 8191 bytes, not 8192"),
    ({"stored_bytes": 8192, "codec": Codec.ZSTD}, "compressed run at page 16 has 8192 bytes"),
    ({"stored_bytes": 0, "codec": Codec.ZSTD}, "compressed run at page 16 has 0 bytes"),
    ({"crcs": bytes(4)}, "not one checksum a page"),
    ({"n": 1}, "is not inside its object"),
    ({"n": IN_RECORD}, "is not inside its object"),
    ({"offset_bytes": 1}, "is not inside its object"),
    ({"offset_bytes": -1}, "is not inside its object"),
    ({"n": IN_RECORD, "offset_bytes": INLINE_AT - 1}, "is not inside its object"),
    ({"n": IN_RECORD, "offset_bytes": INLINE_AT + 1}, "is not inside its object"),
]


@pytest.mark.parametrize(("change", "said"), RUNS)
def test_a_run_that_cannot_be(change: dict[str, Any], said: str) -> None:
    least = replace(RECORD, data=(Data(0, 8192),), zeroes=(), moves=())
    assert fault(replace(least, runs=(RAW,))) is None
    inline = replace(least, inline=bytes(8192), runs=(replace(RAW, n=IN_RECORD, offset_bytes=INLINE_AT),))
    assert fault(inline) is None
    record = replace(inline if "offset_bytes" in change else least, runs=(replace(RAW, **change),))
    assert said in (fault(record) or "")
    moved = replace(record, runs=(), moves=(replace(MOVE, to=record.runs[0]),))
    assert said in (fault(moved) or "")


def test_runs_in_order_and_apart() -> None:
    least = replace(RECORD, data=(Data(0, 8192),), zeroes=(), moves=())
    after = replace(RAW, page=17)
    assert "begins before" in (fault(replace(least, runs=(RAW, after))) or "")
    assert "begins before" in (fault(replace(least, runs=(replace(RAW, page=18), RAW))) or "")
    assert fault(replace(least, runs=(RAW, replace(RAW, page=18)))) is None


def test_a_short_last_page_is_a_whole_one() -> None:
    least = replace(RECORD, data=(Data(0, 8192),), zeroes=(), moves=(), base_visible_bytes=0)
    assert fault(replace(least, size_bytes=17 * 4096 + 512, runs=(RAW,))) is None
    assert "not inside" in (fault(replace(least, size_bytes=17 * 4096, runs=(RAW,))) or "")


def test_codec_and_state_that_are_none() -> None:
    body = bytearray(ENCODED[:-32])
    body[12] = 2
    assert "its state is 2" in refused(resealed(bytes(body)))
    run_at = INLINE_AT + len(RECORD.inline) + len(BASE.url.encode()) + len(BASE.validator) + 2 * 8
    body = bytearray(ENCODED[:-32])
    body[run_at + 21] = 2
    assert "has a codec 2" in refused(resealed(bytes(body)))


FOLLOWS: list[tuple[dict[str, Any], str]] = [
    ({"uuid": UUID(int=9)}, "it is of volume 00000000-0000-0000-0000-000000000009"),
    ({"epoch": 3}, "it is of epoch 3, not 2"),
    ({"previous": bytes([1]) * 32}, "the hash that it has of the record before it is another one"),
    ({"base_visible_bytes": (1 << 20) + 1}, "bytes of the base would be visible, after 1048576 (R22)"),
    ({"size_bytes": (2 << 20) + 512}, "a volume shrinks to whole pages, and 2097664 bytes are none"),
]


@pytest.mark.parametrize(("change", "said"), FOLLOWS)
def test_what_does_not_follow(change: dict[str, Any], said: str) -> None:
    check_follows(BEFORE, RECORD)
    with pytest.raises(RemoteRefused) as caught:
        check_follows(BEFORE, replace(RECORD, **change), name="s3://b/epoch/2")
    assert caught.value.message.startswith("s3://b/epoch/2 does not follow epoch 1 of this volume: ")
    assert said in caught.value.message


def test_growing_ends_where_it_likes() -> None:
    check_follows(BEFORE, replace(RECORD, size_bytes=BEFORE.size_bytes + 512))


def test_after_a_rollback_the_size_before_is_that_of_then() -> None:
    then = replace(BEFORE, epoch=4, hash=b"4" * 32)
    now = replace(then, epoch=9, hash=b"9" * 32, size_bytes=4096, base_visible_bytes=0)
    back = replace(RECORD, epoch=10, previous=now.hash, rolled_back_to=4, base_visible_bytes=1 << 20)
    check_follows(now, back, then)
    check_follows(now, back)
    with pytest.raises(RemoteRefused, match="would be visible, after 1048576"):
        check_follows(now, replace(back, base_visible_bytes=(1 << 20) + 1), then)
    with pytest.raises(RemoteRefused, match="shrinks to whole pages"):
        check_follows(now, replace(back, size_bytes=(1 << 20) + 512), then)
    with pytest.raises(ValueError, match="epoch 4 is not epoch 5"):
        check_follows(now, back, replace(then, epoch=5))


def test_where_a_volume_stands_before_its_first_epoch() -> None:
    born = Birth(UUID_1, 4096, BASE, None, 0)
    assert Head.born(born) == Head(UUID_1, 0, bytes(32), 4096, 4096, BASE)
    assert Head.born(replace(born, size_bytes=1 << 30)).base_visible_bytes == BASE.size_bytes
    assert Head.born(replace(born, base=None)).base_visible_bytes == 0
    with pytest.raises(ValueError, match="begins as epoch 7 of another one"):
        Head.born(replace(born, parent=Parent(UUID(int=3), "x", 7)))
    assert birth.encode(born)


def test_a_claim_is_a_record_without_pages() -> None:
    claim = Record(UUID_1, 1, b"a" * 16, WRITER, bytes(32), 4096, 0, None, False, 0, 0)
    encoded = encode(claim)
    assert decode(encoded, name=NAME) == claim
    assert len(encoded) == INLINE_AT + 32


def test_more_than_a_record_can_hold_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierblk.remote.epoch.RECORD_BYTES_MAX", len(ENCODED))
    assert encode(RECORD) == ENCODED
    monkeypatch.setattr("tierblk.remote.epoch.RECORD_BYTES_MAX", len(ENCODED) - 1)
    with pytest.raises(ValueError, match=r"it has .* bytes, more than"):
        encode(RECORD)
    assert "has more than" in refused(ENCODED)
