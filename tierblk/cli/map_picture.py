"""A heat map laid out as a picture of rectangles and texts, which map_svg.py and map_png.py render. Pure.

A cell is a stack, each class as high as its share of the cell; below it a strip says how much of it was used
lately, and below the row bars are the partitions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby

from tierblk.cache.heat import Heat
from tierblk.cli.heatmap import CLASSES, STATES, HeatMap, Part
from tierblk.cli.map_text import offset_text, percent, table_rows
from tierblk.cli.output import plain
from tierblk.units import format_size

MARGIN = 24.0
LABEL_WIDTH = 72.0
CELL_WIDTH, CELL_HEIGHT = 6.5, 16.0
STRIP_HEIGHT = 3.0
BAR_HEIGHT, BAR_TEXT = 2.5, 10.0
LABEL_SIZE = 9.5
ROW_GAP = 5.0
LINE = 19.0
USE_LEVELS = 4
CHARACTER_WIDTH = 0.56  # of a text's size, about
PART_COLOURS = 4


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Shape:
    """Rectangles of one colour; colour: a name of map_svg's and map_png's palettes."""

    colour: str
    rects: tuple[Rect, ...]
    opacity: float = 1.0


@dataclass(frozen=True)
class Words:
    """A text whose baseline begins, or with `right` ends, at x and y. size: in units of the picture."""

    x: float
    y: float
    text: str
    size: float = 13.0
    colour: str = "text"
    bold: bool = False
    right: bool = False


@dataclass
class Picture:
    """Shapes, later ones over earlier ones, below texts; title and description say it without a picture."""

    width: float
    height: float
    title: str
    description: str
    shapes: list[Shape] = field(default_factory=list)
    words: list[Words] = field(default_factory=list)


def layout(drawn: HeatMap, columns: int, when: datetime) -> Picture:
    """columns: cells a row. when: the picture's date, with its zone."""
    left = MARGIN + LABEL_WIDTH
    sums = drawn.total
    seen = [name for name in CLASSES if getattr(sums, name)]
    said = ", ".join(f"{drawn.text_of(name)}: {_amount(getattr(sums, name), drawn)}" for name in seen)
    picture = Picture(
        width=left + columns * CELL_WIDTH + MARGIN,
        height=0.0,
        title=plain(f"What is cached of {drawn.name}"),
        description=plain(f"{said}. A cell is {format_size(drawn.cell_bytes)}."),
    )
    y = _head(picture, drawn, when)
    classes: dict[str, list[Rect]] = {name: [] for name in ("absent", *CLASSES)}
    used: dict[int, list[Rect]] = {}
    for at in range(0, len(drawn.cells), columns):
        cells = drawn.cells[at : at + columns]
        offset = drawn.range.offset + at * drawn.cell_bytes
        label = Words(left - 8, y + CELL_HEIGHT - 4, offset_text(offset), 11.0, "faint", right=True)
        picture.words.append(label)
        _stack(classes, cells, left, y)
        y += CELL_HEIGHT
        if drawn.knows_use:
            _strip(used, cells, left, y + 1)
            y += STRIP_HEIGHT + 1
        if drawn.parts:
            labelled = _bars(picture, drawn, left, y + 2, offset, columns * drawn.cell_bytes, columns)
            y += 2 + BAR_HEIGHT + (BAR_TEXT if labelled else 0)
        y += ROW_GAP
    picture.shapes[:0] = [Shape(name, tuple(rects)) for name, rects in classes.items() if rects]
    picture.shapes += [
        Shape("used", tuple(used[level]), (1 + level) / (1 + USE_LEVELS)) for level in sorted(used)
    ]
    y = _legend(picture, drawn, seen, y + 8)
    y = _table(picture, drawn, y)
    picture.height = y + MARGIN - 4
    return picture


def _amount(amount: int, drawn: HeatMap) -> str:
    return f"{format_size(amount)} ({percent(amount, drawn.range.length)})"


def _head(picture: Picture, drawn: HeatMap, when: datetime) -> float:
    size = format_size(drawn.size_bytes)
    picture.words.append(Words(MARGIN, MARGIN + 16, _cut(drawn.name, 60), 20.0, bold=True))
    part = "" if drawn.range.length == drawn.size_bytes else (
        f", of it {format_size(drawn.range.length)} from {format_size(drawn.range.offset)} on"
    )  # fmt: skip
    facts = f"{size}{part} · {', over '.join(drawn.layers)}"
    picture.words.append(Words(MARGIN, MARGIN + 38, _cut(facts, 110), 13.0, "faint"))
    time = f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''} · {STATES[drawn.state]}"
    picture.words.append(Words(picture.width - MARGIN, MARGIN + 16, time.strip(), 12.0, "faint", right=True))
    return MARGIN + 58


def _cut(text: str, length: int) -> str:
    text = plain(text).replace("\n", " ")
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _stack(classes: dict[str, list[Rect]], cells: Sequence[Heat], left: float, y: float) -> None:
    """Neighbours that look the same become one rectangle."""
    classes["absent"].append(Rect(left, y, len(cells) * CELL_WIDTH, CELL_HEIGHT))
    x = left
    for heights, same in groupby(map(_heights, cells)):
        width, bottom = sum(1 for _ in same) * CELL_WIDTH, y + CELL_HEIGHT
        for name, height in heights:
            bottom -= height
            classes[name].append(Rect(x, bottom, width, height))
        x += width


def _heights(cell: Heat) -> tuple[tuple[str, float], ...]:
    """Of each class that the cell has, from the bottom up; a little of one can be seen too."""
    size = cell.size_bytes or 1
    here = [name for name in CLASSES if name != "absent" and getattr(cell, name)]
    heights = {name: max(2.0, round(2 * CELL_HEIGHT * getattr(cell, name) / size) / 2) for name in here}
    over = sum(heights.values()) - CELL_HEIGHT
    if over > 0:
        heights[max(heights, key=lambda name: heights[name])] -= over
    return tuple(heights.items())


def _strip(used: dict[int, list[Rect]], cells: Sequence[Heat], left: float, y: float) -> None:
    x = left
    for level, same in groupby(-(-USE_LEVELS * cell.used // (cell.size_bytes or 1)) for cell in cells):
        width = sum(1 for _ in same) * CELL_WIDTH
        if level:
            used.setdefault(level, []).append(Rect(x, y, width, STRIP_HEIGHT))
        x += width


def _bars(
    picture: Picture, drawn: HeatMap, left: float, y: float, offset: int, row_bytes: int, columns: int
) -> bool:
    """Of one row, which shows row_bytes from an offset on. A bar ends a little before its neighbour, and has
    its label where it begins. Whether any label is there."""
    free, labelled = left, False
    for number, part in enumerate(drawn.parts):
        start = max(part.partition.start_bytes, offset)
        end = min(part.partition.end_bytes, offset + row_bytes, drawn.range.end)
        if end <= start or part.is_extended:
            continue
        unit = columns * CELL_WIDTH / row_bytes
        x, width = left + (start - offset) * unit, max(1.5, (end - start) * unit - 1)
        picture.shapes.append(Shape(f"part{number % PART_COLOURS}", (Rect(x, y, width, BAR_HEIGHT),)))
        begins = start == part.partition.start_bytes or start == drawn.range.offset
        if begins and x >= free:
            text = _label(part, width)
            picture.words.append(Words(x, y + BAR_HEIGHT + 9, text, LABEL_SIZE, "faint"))
            free, labelled = x + len(text) * LABEL_SIZE * CHARACTER_WIDTH + 4, True
    return labelled


def _label(part: Part, width: float) -> str:
    """As much as fits, its number at least."""
    holds = part.contents
    words = [str(part.partition.number), holds.kind if holds else "", holds.label if holds else ""]
    if words[2] == words[1]:
        words.pop()
    for count in (3, 2):
        text = plain(" ".join(word for word in words[:count] if word)).replace("\n", " ")
        if len(text) * LABEL_SIZE * CHARACTER_WIDTH <= width:
            return text
    return words[0]


def _legend(picture: Picture, drawn: HeatMap, seen: Iterable[str], y: float) -> float:
    sums = drawn.total
    entries = [(name, drawn.text_of(name), getattr(sums, name)) for name in seen]
    if drawn.knows_use:
        entries.append(("used", "cached and used lately", sums.used))
    columns, rows = 2, -(-len(entries) // 2)
    width = (picture.width - 2 * MARGIN) / columns
    for n, (colour, text, amount) in enumerate(entries):
        x, top = MARGIN + n // rows * width, y + n % rows * LINE
        if colour == "used":
            picture.shapes.append(Shape("absent", (Rect(x, top + 2, 12, 12),)))
            picture.shapes.append(Shape(colour, (Rect(x, top + 10, 12, 4),)))
        else:
            picture.shapes.append(Shape(colour, (Rect(x, top + 2, 12, 12),)))
        picture.words.append(Words(x + 20, top + 12, text))
        picture.words.append(Words(x + 330, top + 12, format_size(amount), right=True))
        picture.words.append(
            Words(x + 400, top + 12, percent(amount, drawn.range.length), 13.0, "faint", right=True)
        )
    y += rows * LINE + 4
    scale = f"A cell is {format_size(drawn.cell_bytes)}, a row {format_size(_row_bytes(picture, drawn))}. "
    picture.words.append(Words(MARGIN, y + 12, _cut(scale + " ".join(drawn.notes), 140), 12.0, "faint"))
    return y + LINE


def _row_bytes(picture: Picture, drawn: HeatMap) -> int:
    return round((picture.width - 2 * MARGIN - LABEL_WIDTH) / CELL_WIDTH) * drawn.cell_bytes


def _table(picture: Picture, drawn: HeatMap, y: float) -> float:
    if not drawn.parts:
        return y
    y += 10
    rows = table_rows(drawn)
    longest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    unit = (picture.width - 2 * MARGIN) / (sum(longest) + 2 * len(longest))
    for n, row in enumerate(rows):
        x = MARGIN
        if n:
            colour = f"part{(n - 1) % PART_COLOURS}"
            picture.shapes.append(Shape(colour, (Rect(x, y + 5, 8, 8),)))
        for cell, length in zip(row, longest, strict=True):
            text = cell if n else cell.capitalize()
            inset = 14 if x == MARGIN else 0
            picture.words.append(Words(x + inset, y + 13, text, 12.0, "text" if n else "faint"))
            x += (length + 2) * unit
        y += LINE
    return y
