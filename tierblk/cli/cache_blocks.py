"""Shows what is known of each block of a device, layer by layer: its slot, and what each of its 16 pages is.

RANGE is OFFSET+LENGTH, OFFSET-END, block:N, block:FIRST-LAST or all, with sizes such as 64KiB or 0x10000.
Each page is a letter, the first page leftmost:

  .  nothing is known here (the layer below, or the image, has it)
  c  cached                    z  known to be zeros
  D  cached, and nowhere else  Z  zeros, and nowhere else
  p  written, and not here: object storage has it (of other volumes: it is lost)
  !  a contradiction; the masks follow

Behind the pages, while block maps are there: r used since the eviction hand passed, n not yet used twice,
s sealed for an upload. With --sums a line for each cached page: the kept crc32c, and whether the bytes fit;
the exit code is 6 when one does not. Dirty pages have one when nobody has written to their block for a while.

With --json: {"layers": [{"layer_id", "kind", "name", "url", "has_map", "blocks": [{"block", "offset_bytes",
"length_bytes", "slot", "present", "cached", "zero", "dirty", "marks", "sums"}], "bad_rows"}]}; a mask is 16
characters, 1 or 0, the first page leftmost. Blocks of which nothing is known are left out. sums, only with
--sums: [{"page", "crc32c", "fits"}].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tierblk.cli.arguments import add_json
from tierblk.cli.byterange import add_range, within
from tierblk.cli.output import put, put_line, say
from tierblk.cli.target import CachedDevice, add_target, looking
from tierblk.errors import CacheError, DeviceError
from tierblk.extent import BLOCK_BYTES, PAGES_PER_BLOCK, Extent, block_extent

if TYPE_CHECKING:
    from tierblk.cache.layers import LayerRecord
    from tierblk.cache.rows import Entry
    from tierblk.cache.view import LayerView, View

NAME = "blocks"
HELP = "show masks, slot and sums of each block"
# (present, cached, zero, dirty) of a page
LETTERS = {
    (0, 0, 0, 0): ".",
    (0, 1, 0, 0): "c",
    (0, 0, 1, 0): "z",
    (1, 1, 0, 0): "c",
    (1, 0, 1, 0): "z",
    (1, 0, 0, 0): "p",
    (1, 1, 0, 1): "D",
    (1, 0, 1, 1): "Z",
}


PageSums = tuple[tuple[int, int | None, bool | None], ...]
"""(page, kept, whether the bytes fit); kept and fits are None of a dirty page that has no sum yet."""


class Line(NamedTuple):
    """One block, or a run of blocks of which nothing is known: entry is None then."""

    first: int
    end: int
    entry: Entry | None = None
    marks: str = ""
    sums: PageSums = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET RANGE."""
    add_target(parser)
    add_range(parser)
    add_layer(parser)
    parser.add_argument("--sums", action="store_true", help="read the slots, and show the sum of each page")
    add_json(parser)


def add_layer(parser: argparse.ArgumentParser) -> None:
    """--layer."""
    parser.add_argument("--layer", choices=("volume", "base"), help="only this one of the device's layers")


def layers_wanted(device: CachedDevice, layer: str | None) -> list[LayerRecord]:
    """DeviceError when it has none of that kind."""
    found = [each for each in device.layers if layer is None or each.is_volume == (layer == "volume")]
    if not found:
        raise DeviceError(f"nothing is here of a {layer} of {device.name}")
    return found


def run(args: argparse.Namespace) -> int:
    """Prints a line a block, as it finds them."""
    with looking(args) as (view, device):
        records = layers_wanted(device, args.layer)
        wanted = within(args.range, max(record.size_bytes for record in records), device.name)
        show = _put_json if args.json else _put_lines
        layers = [view.layer(record) for record in records]
        bad = show([(layer, _lines(view, layer, wanted, with_sums=args.sums)) for layer in layers], wanted)
    return CacheError.exit_code if bad else 0


def _lines(view: View, layer: LayerView, wanted: Extent, *, with_sums: bool) -> Iterator[Line]:
    """All blocks of the layer that hold any of these bytes, in order."""
    first, end = wanted.blocks().start, min(wanted.blocks().stop, layer.blocks)
    next_block = first
    for piece in layer.pieces(first, end):
        marked = zip(piece.entries(), piece.marks(), strict=True)
        for block, (entry, marks) in enumerate(marked, piece.first_block):
            if not any(entry) or not first <= block < end:
                continue
            if next_block < block:
                yield Line(next_block, block)
            next_block = block + 1
            sums: PageSums = ()
            if with_sums and entry.cached:
                entry, sums = _sums(view, layer, block)
            yield Line(block, block + 1, entry, _marks(marks), sums)
    if next_block < end:
        yield Line(next_block, end)


def _marks(marks: int) -> str:
    from tierblk.cache.maps import PROBATION, REFERENCED, SEALED

    known = ((REFERENCED, "r"), (PROBATION, "n"), (SEALED, "s"))
    return "".join(letter for bit, letter in known if marks & bit)


def _sums(view: View, layer: LayerView, block: int) -> tuple[Entry, PageSums]:
    """The entry that they are of, and the sums of its cached pages."""
    from tierblk.cache.pagecheck import settled

    found = settled(view, layer, block)
    if found is None:
        raise CacheError(f"block {block} changes faster than it can be read", "try again")
    return found.entry, tuple(
        (page, None, None)
        if not found.entry.checkable >> page & 1
        else (page, found.kept[page], not found.bad >> page & 1)
        for page in range(PAGES_PER_BLOCK)
        if found.entry.cached >> page & 1
    )


def _letters(entry: Entry) -> str:
    _, present, cached, zero, dirty, _ = entry
    return "".join(
        LETTERS.get((present >> page & 1, cached >> page & 1, zero >> page & 1, dirty >> page & 1), "!")
        for page in range(PAGES_PER_BLOCK)
    )


def _bits(mask: int) -> str:
    return f"{mask:016b}"[::-1]


Layers = list[tuple["LayerView", Iterator[Line]]]


def _put_lines(layers: Layers, wanted: Extent) -> bool:
    bad = False
    for number, (layer, lines) in enumerate(layers):
        if number:
            put("")
        put(f"{layer.record.kind} layer {layer.record.layer_id}: {layer.record.shown}")
        put(f"{'BLOCK':>10}  {'BYTES':<31}  {'SLOT':>9}  PAGES")
        for line in lines:
            _put_line(layer, line)
            bad = bad or any(fits is False for _, _, fits in line.sums)
        _say_bad_rows(layer)
    return bad


def _put_line(layer: LayerView, line: Line) -> None:
    end_bytes = block_extent(line.end - 1, layer.record.size_bytes).end
    where = f"{line.first * BLOCK_BYTES:#014x}-{end_bytes:#014x}"
    if line.entry is None:
        blocks = f"{line.first}" if line.end == line.first + 1 else f"{line.first}-{line.end - 1}"
        put_line(f"{blocks:>10}  {where:<31}  {'-':>9}  nothing is known")
        return
    letters = _letters(line.entry)
    masks = ""
    if "!" in letters:
        named = zip(("present", "cached", "zero", "dirty"), line.entry[1:5], strict=True)
        masks = "".join(f"  {name} {mask:#06x}" for name, mask in named)
    slot = str(line.entry.slot) if line.entry.slot else "-"
    put_line(f"{line.first:>10}  {where:<31}  {slot:>9}  {letters}  {line.marks}{masks}".rstrip())
    for page, kept, fits in line.sums:
        if kept is None:
            put_line(f"{'':>10}  page {page:<2}  dirty: no checksum yet")
        else:
            put_line(f"{'':>10}  page {page:<2}  crc32c {kept:08x}  {'fits' if fits else 'DOES NOT FIT'}")


def _say_bad_rows(layer: LayerView) -> None:
    if layer.bad_rows:
        say(f"{len(layer.bad_rows)} rows of the index cannot be believed, first row {layer.bad_rows[0]}")


def _put_json(layers: Layers, wanted: Extent) -> bool:
    """One document, written as it is found: it may be longer than memory."""
    bad = False
    put_line('{"layers": [')
    for number, (layer, lines) in enumerate(layers):
        record = layer.record
        head = {
            "layer_id": record.layer_id,
            "kind": record.kind,
            "name": record.name or None,
            "url": record.shown_base if record.url else None,
            "has_map": layer.has_map,
        }
        put_line(("," if number else "") + json.dumps(head)[:-1] + ', "blocks": [')
        comma = ""
        for line in lines:
            if line.entry is not None:
                put_line(comma + json.dumps(_document(layer, line)))
                comma = ","
            bad = bad or any(fits is False for _, _, fits in line.sums)
        put_line(f'], "bad_rows": {json.dumps(layer.bad_rows)}}}')
    put_line("]}")
    return bad


def _document(layer: LayerView, line: Line) -> dict[str, Any]:
    assert line.entry is not None
    extent = block_extent(line.first, layer.record.size_bytes)
    slot, present, cached, zero, dirty, _ = line.entry
    document: dict[str, Any] = {
        "block": line.first,
        "offset_bytes": extent.offset,
        "length_bytes": extent.length,
        "slot": slot or None,
        "present": _bits(present),
        "cached": _bits(cached),
        "zero": _bits(zero),
        "dirty": _bits(dirty),
        "marks": line.marks,
    }
    if line.sums:
        document["sums"] = [
            {"page": page, "crc32c": None if kept is None else f"{kept:08x}", "fits": fits}
            for page, kept, fits in line.sums
        ]
    return document
