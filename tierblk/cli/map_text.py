"""A heat map for the terminal: two cells a character in colours, or a letter a cell without them.

A cell shows what is dirty or lost of it, however little, else what most of it is that is here; the less of
it, the fainter (in letters: a small letter for less than half). Partitions are brackets below each row.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from itertools import groupby, zip_longest

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tierblk.cache.heat import Heat
from tierblk.cli.heatmap import STATES, HeatMap, Part
from tierblk.cli.output import plain
from tierblk.units import format_exact_size, format_size

LABEL_COLUMNS = 10
STEP_COLUMNS = 32
ROWS_MAX = 12

LETTERS = {"dirty": "D", "volume": "V", "base": "B", "zero": "Z", "stored": "S", "lost": "X", "absent": "."}
USED_MARK = "^"
COLOURS = {
    "dirty": (240, 101, 30),
    "volume": (151, 117, 250),
    "base": (51, 141, 232),
    "zero": (134, 142, 150),
    "stored": (92, 74, 150),
    "lost": (230, 45, 110),
    "absent": (52, 58, 64),
}
NAMED = {  # for terminals of 16 colours, where nothing can be faint
    "dirty": "bright_red",
    "volume": "magenta",
    "base": "blue",
    "zero": "white",
    "stored": "cyan",
    "lost": "bright_magenta",
    "absent": "bright_black",
}
USED_COLOURS = {"volume": (214, 200, 255), "base": (150, 205, 255)}
USED_NAMED = {"volume": "bright_magenta", "base": "bright_blue"}
FIRST = ("lost", "dirty")
HERE = ("base", "volume", "zero", "stored")
FAINTEST, FAINTEST_FIRST = 0.4, 0.65
CELL_MIN, CELL_MAX = 8, 24
TYPE_COLUMN, LABEL_COLUMN, USED_COLUMN = 1, 5, 6


def columns_of(width: int) -> int:
    """How many characters of a terminal of that width are for cells."""
    return max(STEP_COLUMNS // 2, (width - LABEL_COLUMNS - 1) // STEP_COLUMNS * STEP_COLUMNS)


def shown_class(cell: Heat) -> tuple[str, float]:
    """What a cell shows, and how much of the cell is that."""
    size = cell.size_bytes or 1
    for name in FIRST:
        if getattr(cell, name):
            return name, getattr(cell, name) / size
    name = max(HERE, key=lambda one: getattr(cell, one))
    share = getattr(cell, name) / size
    return (name, share) if share else ("absent", 1.0)


def is_used(cell: Heat) -> bool:
    """Whether a good part of what is cached was used lately."""
    return 0 < cell.dirty + cell.volume + cell.base <= 2 * cell.used


def put_map(drawn: HeatMap, console: Console, *, colours: bool, columns: int) -> None:
    """columns: characters a row; a character has two cells with colours, one without."""
    console.print(
        Text(plain(f"{drawn.name}: {format_size(drawn.size_bytes)}, {STATES[drawn.state]}"), "bold")
    )
    console.print(Text(plain("  " + ", over ".join(drawn.layers))))
    console.print()
    per_row = columns * (2 if colours else 1)
    truecolour = console.color_system in ("truecolor", "256")
    for at in range(0, len(drawn.cells), per_row):
        cells = drawn.cells[at : at + per_row]
        offset = drawn.range.offset + at * drawn.cell_bytes
        label = f"{offset_text(offset):>{LABEL_COLUMNS}} "
        row = _coloured(cells, truecolour=truecolour) if colours else Text(_letters(cells))
        console.print(Text(label) + row)
        blank = " " * len(label)
        if not colours and drawn.knows_use and any(map(is_used, cells)):
            marks = "".join(USED_MARK if is_used(cell) else " " for cell in cells)
            console.print(Text(blank + marks.rstrip()))
        brackets = _brackets(drawn, offset, len(row), drawn.cell_bytes * (2 if colours else 1), lines=colours)
        if brackets.strip():
            console.print(Text(blank + brackets.rstrip()))
    console.print()
    _put_legend(drawn, console, colours=colours, truecolour=truecolour)
    for note in drawn.notes:
        console.print(Text(textwrap.fill(plain(note), console.width)))
    if drawn.parts:
        console.print()
        for line in table(drawn, console.width):
            console.print(Text(line))


def offset_text(offset: int) -> str:
    """Exact, unless that is too long."""
    exact = re.sub(r"(?<=\d)(?=[A-Z])", " ", format_exact_size(offset)) if offset else "0 B"
    return exact if len(exact) <= LABEL_COLUMNS else format_size(offset)


def _coloured(cells: list[Heat], *, truecolour: bool) -> Text:
    colours: list[Color | None] = [_colour(cell, truecolour=truecolour) for cell in cells]
    text = Text()
    for (left, right), same in groupby(zip_longest(colours[::2], colours[1::2])):
        text.append("▌" * sum(1 for _ in same), Style(color=left, bgcolor=right))
    return text


def _colour(cell: Heat, *, truecolour: bool) -> Color:
    name, share = shown_class(cell)
    used = is_used(cell) and name in USED_COLOURS
    if not truecolour:
        return Color.parse(USED_NAMED[name] if used else NAMED[name])
    full, ground = USED_COLOURS[name] if used else COLOURS[name], COLOURS["absent"]
    faintest = FAINTEST_FIRST if name in FIRST else FAINTEST
    strength = faintest + (1 - faintest) * share
    mixed = (round(below + (above - below) * strength) for above, below in zip(full, ground, strict=True))
    return Color.from_rgb(*mixed)


def _letters(cells: list[Heat]) -> str:
    shown = (shown_class(cell) for cell in cells)
    return "".join(LETTERS[name] if 2 * share >= 1 else LETTERS[name].lower() for name, share in shown)


def _brackets(drawn: HeatMap, offset: int, count: int, each_bytes: int, *, lines: bool) -> str:
    """Which partition each of the row's characters belongs to: the one that has most of it."""
    owners = [_owner(drawn, offset + n * each_bytes, each_bytes) for n in range(-1, count + 1)]
    left, fill, right = "└─┘" if lines else "\\_/"
    line, at = "", 1
    while at <= count:
        part, stop = owners[at], at
        while stop <= count and owners[stop] is part:
            stop += 1
        if part is None:
            line += " " * (stop - at)
        else:
            begin = fill if owners[at - 1] is part else left
            end = fill if owners[stop] is part else right
            line += _bracket(str(part.partition.number), stop - at, begin, fill, end)
        at = stop
    return line


def _bracket(number: str, length: int, begin: str, fill: str, end: str) -> str:
    if length <= len(number):
        return number[-length:]
    if length == len(number) + 1:
        return begin + number
    return begin + number + fill * (length - len(number) - 2) + end


def _owner(drawn: HeatMap, start: int, length: int) -> Part | None:
    best, most = None, 0
    for part in drawn.parts:
        begin, end = part.partition.start_bytes, part.partition.end_bytes
        shared = min(end, start + length) - max(begin, start)
        if shared > most and not part.is_extended:
            best, most = part, shared
    return best


def _put_legend(drawn: HeatMap, console: Console, *, colours: bool, truecolour: bool) -> None:
    sums = drawn.total
    size = sums.size_bytes or 1
    names = drawn.present
    texts = [drawn.text_of(name) for name in names]
    amounts = [getattr(sums, name) for name in names]
    marks: list[Text] = []
    for name in names:
        style = Style(color=Color.from_rgb(*COLOURS[name]) if truecolour else Color.parse(NAMED[name]))
        marks.append(Text("██", style) if colours else Text(f"{LETTERS[name]} "))
    if drawn.knows_use:
        texts.append("cached and used lately")
        amounts.append(sums.used)
        light = Color.from_rgb(*USED_COLOURS["base"]) if truecolour else Color.parse(USED_NAMED["base"])
        marks.append(Text("██", Style(color=light)) if colours else Text(f"{USED_MARK} "))
    widest = max(map(len, texts))
    for mark, text, amount in zip(marks, texts, amounts, strict=True):
        line = f" {text:<{widest}}  {format_size(amount):>10}  {percent(amount, size):>7}"
        console.print(Text.assemble(mark, line))
    half = "half a character" if colours else "a letter"
    faint = "; fainter: less of it" if colours else "; small letters: less of it"
    scale = f"{half} is {format_size(drawn.cell_bytes)}"
    console.print(Text(scale + (faint if truecolour or not colours else "")))


def percent(amount: int, of: int) -> str:
    """Never "0.0 %" or "100.0 %" of what is not."""
    share = 100 * amount / of if of else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.1f} %"


def table(drawn: HeatMap, width: int) -> Iterator[str]:
    """The partitions, a line each, below a header. With too little room the column of what is used goes, and
    types and labels are cut; with much, UUIDs are there too."""
    rows = table_rows(drawn)
    wide = [[*row, uuid] for row, uuid in zip(rows, ["UUID", *map(_uuid, drawn.parts)], strict=True)]
    if _over(wide, width) <= 0:
        rows = wide
    elif _over(rows, width) > 0:
        rows = [row[:USED_COLUMN] + row[USED_COLUMN + 1 :] for row in rows]
    widths = _widths(rows)
    for _ in range(_over(rows, width)):
        longer = max(TYPE_COLUMN, LABEL_COLUMN, key=lambda column: widths[column])
        widths[longer] = max(CELL_MIN, widths[longer] - 1)
    for row in rows:
        cells = (_short(cell, length).ljust(length) for cell, length in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _over(rows: list[list[str]], width: int) -> int:
    """How many columns too wide they are."""
    widths = _widths(rows)
    return sum(widths) + 2 * (len(widths) - 1) - width


def table_rows(drawn: HeatMap) -> list[list[str]]:
    """A header, and each partition's cells; harmless, and not too long. What is cached and dirty is of the
    part that is in the map's range."""
    rows = [("#", "TYPE", "START", "SIZE", "HOLDS", "LABEL", "USED", "CACHED", "DIRTY")]
    for part in drawn.parts:
        one, holds = part.partition, part.contents
        rows.append(
            (
                str(one.number),
                part.type_name,
                format_size(one.start_bytes),
                format_size(one.length_bytes),
                part.holds,
                (holds.label if holds else "") or one.name or "-",
                format_size(holds.used_bytes) if holds and holds.used_bytes is not None else "-",
                percent(part.heat.cached, part.heat.size_bytes) if part.heat.size_bytes else "-",
                format_size(part.heat.dirty) if part.heat.dirty else "-",
            )
        )
    return [[_short(plain(cell).replace("\n", " "), CELL_MAX) for cell in row] for row in rows]


def _uuid(part: Part) -> str:
    return plain(part.contents.uuid) if part.contents and part.contents.uuid else "-"


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 2]}.."
