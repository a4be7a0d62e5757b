"""RANGE, and the text of a dump."""

from __future__ import annotations

import pytest

from tierblk.cli.byterange import parse_range, within
from tierblk.cli.cache_dump import hex_lines
from tierblk.errors import DeviceError
from tierblk.extent import BLOCK_BYTES, Extent


@pytest.mark.parametrize(
    ("text", "offset", "length"),
    [
        ("0+1", 0, 1),
        ("64KiB+4096", 65536, 4096),
        ("0x10000+0x200", 65536, 512),
        ("1.5 MiB-2MiB", 3 << 19, 1 << 19),
        ("0-0x100000", 0, 1 << 20),
        ("block:0", 0, BLOCK_BYTES),
        ("block:7-9", 7 * BLOCK_BYTES, 3 * BLOCK_BYTES),
    ],
)
def test_a_range(text: str, offset: int, length: int) -> None:
    assert parse_range(text) == Extent(offset, length)


def test_all_of_a_device() -> None:
    assert parse_range("all").clamp(12345) == Extent(0, 12345)


@pytest.mark.parametrize(
    "text",
    [
        *("", "5", "5+", "+5", "5+0", "7-7", "9-7", "-1+5", "1+2+3", "1-2-3", "a-b", "0x+1", "block:"),
        *("block:9-7", "block:x", "block:999999999999999999", "0+9000PiB", "0xfffffffffffffffff+1"),
    ],
)
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a (range|size) "):
        parse_range(text)


def test_a_dump_looks_like_that_of_hexdump() -> None:
    """As `hexdump -C` prints these 72 bytes, however they come in pieces."""
    data = bytes(40) + b"text and\x00\xff\x7f " + bytes(20)
    for piece in (1, 7, 16, 100):
        parts = [data[at : at + piece] for at in range(0, len(data), piece)]
        assert list(hex_lines(0, parts)) == [
            "00000000  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
            "*",
            "00000020  00 00 00 00 00 00 00 00  74 65 78 74 20 61 6e 64  |........text and|",
            "00000030  00 ff 7f 20 00 00 00 00  00 00 00 00 00 00 00 00  |... ............|",
            "00000040  00 00 00 00 00 00 00 00                           |........|",
            "00000048",
        ]


def test_the_last_line_of_a_dump_is_never_squeezed_away() -> None:
    assert list(hex_lines(0x1000, [bytes(35)]))[1:] == [
        "*",
        "00001020  00 00 00                                          |...|",
        "00001023",
    ]


def test_what_lies_behind_the_end_is_cut_or_refused() -> None:
    # what a daemon is asked fits in 63 bits then
    assert within(parse_range("all"), 10 << 20, "web") == Extent(0, 10 << 20)
    assert within(Extent(5, 100), 10, "web") == Extent(5, 5)
    with pytest.raises(DeviceError, match="behind the end of web, which has 10 MiB"):
        within(Extent(10 << 20, 1), 10 << 20, "web")
