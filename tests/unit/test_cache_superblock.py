"""The superblock: two copies, of which one survives whatever a power cut does to the other."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierblk.cache.superblock import COPY_BYTES, Superblock, choose, pack, renumbered, unpack
from tierblk.core import crc32c
from tierblk.errors import CacheError

U64 = st.integers(0, 2**64 - 1)
SUPERBLOCK = Superblock(UUID(int=7), 256, 1_795_000_000, sequence=4, session=9, confirmed=9)


@given(st.builds(Superblock, st.uuids(), U64, U64, U64, U64, U64, st.just(65536), st.integers(0, 2**32 - 1)))
def test_what_is_packed_is_unpacked(superblock: Superblock) -> None:
    copy = pack(superblock)
    assert len(copy) == COPY_BYTES
    assert unpack(copy) == superblock


@given(st.integers(0, 511), st.integers(1, 255))
def test_one_changed_byte_is_noticed(at: int, change: int) -> None:
    copy = bytearray(pack(SUPERBLOCK))
    copy[at] ^= change
    assert unpack(bytes(copy)) is None


def test_all_of_it_is_in_one_sector() -> None:
    assert not any(pack(SUPERBLOCK)[512:])


def test_copies_take_turns() -> None:
    assert [renumbered(SUPERBLOCK, sequence).offset_bytes for sequence in range(4)] == [0, 4096, 0, 4096]


def test_the_newest_valid_copy_counts() -> None:
    old, new = renumbered(SUPERBLOCK, 4), renumbered(SUPERBLOCK, 5)
    assert choose([pack(old), pack(new)], "slots") == (new, 0)
    assert choose([pack(new), pack(old)], "slots") == (new, 0)


@pytest.mark.parametrize("kept_bytes", [0, 1, 64, 100, 511])
def test_a_torn_write_leaves_the_copy_before_it(kept_bytes: int) -> None:
    older, old, new = (renumbered(SUPERBLOCK, sequence) for sequence in (3, 4, 5))
    torn = pack(new)[:kept_bytes] + pack(older)[kept_bytes:]
    found, damaged = choose([pack(old), torn], "slots")
    assert found == old or (found, damaged) == (new, 0)
    assert found.sequence >= old.sequence


def test_both_copies_damaged() -> None:
    copy = pack(SUPERBLOCK)[:100] + b"x" * (COPY_BYTES - 100)
    with pytest.raises(CacheError, match=r"^both superblocks of slots are damaged$"):
        choose([copy, copy], "slots")


@pytest.mark.parametrize(
    "copies", [[], [b""], [b"short", b""], [bytes(COPY_BYTES)] * 2, [b"\x7fELF" * 1024] * 2]
)
def test_no_superblock_at_all(copies: list[bytes]) -> None:
    with pytest.raises(CacheError, match=r"^slots is not a slots file of tierblk$"):
        choose(copies, "slots")


def test_a_newer_format_is_refused_even_beside_one_that_we_know() -> None:
    newer = replace(SUPERBLOCK, version=3)
    with pytest.raises(
        CacheError, match=r"was made by a newer tierblk: its format is 3, this version knows 2"
    ):
        choose([pack(newer), pack(SUPERBLOCK)], "slots")


@pytest.mark.parametrize("wrong", [{"slot_bytes": 4096}, {"slot_count": 1}, {"confirmed": 10}])
def test_fields_that_cannot_be(wrong: dict[str, int]) -> None:
    copy = pack(replace(SUPERBLOCK, **wrong))  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="contradicts its format"):
        choose([copy, copy], "slots")


def test_the_bytes_are_those_of_the_documentation() -> None:
    copy = pack(SUPERBLOCK)
    assert copy[0:8] == b"TIERBLK\0"
    numbers = [
        (8, 4, 2),
        (12, 4, 65536),
        (32, 8, 256),
        (40, 8, 1_795_000_000),
        (48, 8, 4),
        (56, 8, 9),
        (64, 8, 9),
    ]
    for at, length, value in numbers:
        assert int.from_bytes(copy[at : at + length], "little") == value
    assert copy[16:32] == UUID(int=7).bytes
    assert int.from_bytes(copy[508:512], "little") == crc32c(copy[:508])
