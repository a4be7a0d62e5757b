"""RANGE of a command line: which bytes of a device, or which blocks.

OFFSET+LENGTH, OFFSET-END (END is the first byte behind it), block:N, block:FIRST-LAST (LAST is one of them),
or all. Offsets are sizes as everywhere ("64KiB"), or hexadecimal ("0x10000").
"""

from __future__ import annotations

import argparse
import re

from tierblk.errors import DeviceError
from tierblk.extent import BLOCK_BYTES, Extent
from tierblk.units import format_size, parse_size

FORMS = "OFFSET+LENGTH, OFFSET-END, block:N, block:FIRST-LAST or all"
RULE = f"a range is {FORMS}: 1GiB+64KiB, 0-0x100000"
_BLOCKS = re.compile(r"block:([0-9]{1,18})(?:-([0-9]{1,18}))?")
_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_END_MAX = 1 << 63


def parse_range(text: str) -> Extent:
    """The bytes, at least one; a device may have fewer. ValueError says the rule."""
    if text == "all":
        return Extent(0, _END_MAX)
    if (match := _BLOCKS.fullmatch(text)) is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        found = first * BLOCK_BYTES, (last + 1) * BLOCK_BYTES
    elif (parts := re.fullmatch(r"([^+-]+)([+-])(.+)", text)) is not None:
        offset = _bytes(parts[1])
        found = offset, _bytes(parts[3]) + (offset if parts[2] == "+" else 0)
    else:
        raise ValueError(f"{RULE}; this is {text!r:.60}")
    if not found[0] < found[1] < _END_MAX:
        raise ValueError(f"a range has at least one byte, and ends below 8 EiB; {text!r:.60} does not")
    return Extent(found[0], found[1] - found[0])


def _bytes(text: str) -> int:
    return int(text, 16) if _HEX.fullmatch(text) else parse_size(text)


def add_range(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """RANGE, an Extent in args.range; None when it is optional and was left out."""
    parser.add_argument(
        "range",
        metavar="RANGE",
        nargs="?" if optional else None,
        type=range_argument,
        help=FORMS,
    )


def within(wanted: Extent, size_bytes: int, name: str) -> Extent:
    """The part of a RANGE that there is. DeviceError when there is none of it."""
    found = wanted.clamp(size_bytes)
    if not found:
        raise DeviceError(f"the range begins behind the end of {name}, which has {format_size(size_bytes)}")
    return found


def range_argument(text: str) -> Extent:
    """A RANGE as argparse wants it."""
    try:
        return parse_range(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
