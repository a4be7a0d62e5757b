"""Prints bytes of a device as it would read them, out of what is cached: as hexadecimal text, or raw.
Nothing is fetched: if any of them is not cached, it says which, prints none, and ends with 6.

RANGE is OFFSET+LENGTH, OFFSET-END, block:N, block:FIRST-LAST or all, with sizes such as 64KiB or 0x10000. In
the text a * stands for lines that are like the one before, and the last line is the offset behind the range.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

from tierblk.cli.byterange import add_range, within
from tierblk.cli.cache_blocks import add_layer, layers_wanted
from tierblk.cli.output import put_line
from tierblk.cli.target import add_target, looking
from tierblk.errors import CacheError, DeviceError
from tierblk.extent import Extent
from tierblk.units import format_exact_size

if TYPE_CHECKING:
    from tierblk.cache.reading import Reader

NAME = "dump"
HELP = "print bytes out of the cache"
LINE_BYTES = 16
NAMED_MAX = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET RANGE."""
    add_target(parser)
    add_range(parser)
    add_layer(parser)
    parser.add_argument("--raw", action="store_true", help="the bytes themselves")


def run(args: argparse.Namespace) -> int:
    """Prints while it reads; what is missing is found before anything is printed."""
    if args.raw and sys.stdout.isatty():
        raise DeviceError("raw bytes would be written to a terminal", "send them to a file or a pipe")
    from tierblk.cache.reading import Missing, Reader

    with looking(args) as (view, device):
        records = layers_wanted(device, args.layer)
        size_bytes = records[0].size_bytes
        wanted = within(args.range, size_bytes, device.name)
        reader = Reader(view, records, size_bytes)
        _refuse_missing(reader, wanted)
        try:
            if args.raw:
                _write_raw(reader.read(wanted))
            else:
                for line in hex_lines(wanted.offset, reader.read(wanted)):
                    put_line(line)
        except Missing:  # evicted since
            _refuse_missing(reader, wanted)
            raise CacheError("a page was evicted while it was read", "try again") from None
    return 0


def _refuse_missing(reader: Reader, wanted: Extent) -> None:
    found = list(islice(reader.missing(wanted), NAMED_MAX + 1))
    if found:
        _refuse(found)


def _refuse(found: list[Extent]) -> NoReturn:
    ranges = (f"{extent.offset:#x}+{format_exact_size(extent.length)}" for extent in found[:NAMED_MAX])
    named = ", ".join(ranges) + (" and more" if len(found) > NAMED_MAX else "")
    raise CacheError(f"not cached: {named}", "`tierblk cache warm` fetches them while the device is attached")


def _write_raw(parts: Iterable[bytes]) -> None:
    for part in parts:
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


def hex_lines(offset: int, parts: Iterable[bytes]) -> Iterator[str]:
    """As hexdump -C has it: offset, 16 bytes, and what of them is printable; equal lines are squeezed."""
    before, squeezed, rest = b"", False, b""
    for part in parts:
        rest += part
        whole = len(rest) - len(rest) % LINE_BYTES
        for at in range(0, whole, LINE_BYTES):
            data = rest[at : at + LINE_BYTES]
            if data != before:
                yield _hex_line(offset, data)
                before, squeezed = data, False
            elif not squeezed:
                yield "*"
                squeezed = True
            offset += LINE_BYTES
        rest = rest[whole:]
    if rest:
        yield _hex_line(offset, rest)
    yield f"{offset + len(rest):08x}"


def _hex_line(offset: int, data: bytes) -> str:
    halves = (data[at : at + LINE_BYTES // 2].hex(" ") for at in (0, LINE_BYTES // 2))
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)
    left, right = halves
    return f"{offset:08x}  {left:<23}  {right:<23}  |{text}|"
