"""Tables of a screen that is so many cells wide: columns of fixed width, of which the important ones come
first, and one that takes what is left. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len

from tierblk.cli.top_text import Line, fit

T = TypeVar("T")

HEAD = "bold"
STALE = "dim"
_STYLES = {
    **dict.fromkeys(("ok", "clean", "sending"), "green"),
    **dict.fromkeys(("degraded", "slowed", "waits", "recovering", "starting", "stopping"), "yellow"),
}


def state_style(state: str) -> str:
    """Green is well, yellow passes by itself, red does not."""
    return _STYLES.get(state, "red")


@dataclass(frozen=True)
class Column(Generic[T]):
    """cell: its text, and a style if it has one of its own. rank: columns of a higher one are left out first
    when there is little room; those of rank 0 are always there. width: its least, of a flexible one. group: a
    title above several."""

    title: str
    width: int
    cell: Callable[[T], str | tuple[str, str]]
    rank: int = 0
    right: bool = True
    flexible: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table(Generic[T]):
    """Columns for rows of one kind. is_stale: whose row is grey."""

    columns: Sequence[Column[T]]
    is_stale: Callable[[T], bool]

    def fitting(self, rows: Sequence[T], width: int) -> list[tuple[Column[T], int]]:
        """The columns that there is room for, in order, each with its width."""
        ranks = sorted({column.rank for column in self.columns})
        chosen = [column for column in self.columns if column.rank == 0]
        for rank in ranks[1:]:
            more = [column for column in self.columns if column.rank <= rank]
            if _least(more) > width:
                break
            chosen = more
        widths = {id(column): column.width for column in chosen}
        left = max(0, width - _least(chosen))
        for column in chosen:
            if column.flexible and left:
                texts = [_text(column.cell(row))[0] for row in rows]
                wanted = max((cell_len(each) for each in texts), default=0)
                more_cells = min(left, max(0, wanted - column.width))
                widths[id(column)] += more_cells
                left -= more_cells
        return [(column, widths[id(column)]) for column in chosen]

    def header(self, fitting: list[tuple[Column[T], int]]) -> list[Line]:
        """One line, or two if columns have groups."""
        titles = [fit(column.title, width, right=column.right) for column, width in fitting]
        lines = [Line.of(" " + " ".join(titles), HEAD)]
        if any(column.group for column, _ in fitting):
            lines.insert(0, Line.of(" " + _groups(fitting), "dim"))
        return lines

    def line(self, fitting: list[tuple[Column[T], int]], row: T, *, mark: str = " ", dots: str = "…") -> Line:
        """A row. mark: one cell before it; any but a space makes it stand out."""
        line = Line([(mark, "")])
        for at, (column, width) in enumerate(fitting):
            text, style = _text(column.cell(row))
            if at:
                line.pieces.append((" ", ""))
            line.pieces.append((fit(text, width, right=column.right, dots=dots), style))
        if self.is_stale(row):
            line = line.styled(STALE)
        if mark != " ":
            line = line.styled(f"{STALE} reverse" if self.is_stale(row) else "reverse")
        return line


def _text(cell: str | tuple[str, str]) -> tuple[str, str]:
    return (cell, "") if isinstance(cell, str) else cell


def _least(columns: Sequence[Column[T]]) -> int:
    """With one cell before each."""
    return sum(column.width + 1 for column in columns)


def _groups(fitting: list[tuple[Column[T], int]]) -> str:
    """The line above the titles: each group's name amid dashes over its columns."""
    parts: list[str] = []
    at = 0
    while at < len(fitting):
        end = at + 1
        group = fitting[at][0].group
        while end < len(fitting) and fitting[end][0].group == group:
            end += 1
        width = sum(width for _, width in fitting[at:end]) + end - at - 1
        parts.append(f" {group} ".center(width, "-")[:width] if group else " " * width)
        at = end
    return " ".join(parts)
