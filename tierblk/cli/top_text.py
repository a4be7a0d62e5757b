"""Numbers in columns of a screen: right-aligned, of stable width, never cut; and texts cut to a width. Pure.

Sizes have binary units: 1.5M are 1.5 MiB. "-": there is no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size

from tierblk.cli.output import plain

NONE = "-"

_SPARKS = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS = "_.-=+*#@"
_SHARES = (1, 2, 5, 10, 20, 60)


def size(value: float | None) -> str:
    """Bytes in at most five characters: "0", "512B", "4.0K", "12.3M", "999G"."""
    if value is None:
        return NONE
    if round(value) <= 0:
        return "0"
    unit = 0
    while value >= 999.5 and unit < 6:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{value:.0f}B"
    return f"{value:.1f}{'BKMGTPE'[unit]}" if value < 99.95 else f"{value:.0f}{'BKMGTPE'[unit]}"


def count(value: float | None) -> str:
    """A number or a rate in at most five characters: "0", "0.4", "9999", "12345", "123K", "1.2M"."""
    if value is None:
        return NONE
    if value <= 0:
        return "0"
    if value < 0.95:
        return f"{max(value, 0.1):.1f}"
    if value < 99_999.5:
        return f"{value:.0f}"
    unit = 0
    while value >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f}{' KMGT'[unit]}" if value < 99.95 else f"{value:.0f}{' KMGT'[unit]}"


def latency(us: float | None) -> str:
    """Microseconds in at most five characters: "81us", "1.2ms", "999ms", "12s", "20m"."""
    if us is None:
        return NONE
    if us < 999.5:
        return f"{us:.0f}us"
    if us < 999_500:
        ms = us / 1e3
        return f"{ms:.1f}ms" if ms < 9.95 else f"{ms:.0f}ms"
    return span(us / 1e6)


def span(seconds: float | None) -> str:
    """Seconds in at most five characters, as people say them: "0s", "0.4s", "59s", "12m", "3.5h", "12d"."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f}s" if seconds >= 0.05 else "0s"
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if seconds < 5970:
        return f"{seconds / 60:.0f}m"
    if seconds < 99 * 3600:
        hours = seconds / 3600
        return f"{hours:.1f}h" if hours < 9.95 else f"{hours:.0f}h"
    days = seconds / 86400
    return f"{days:.0f}d" if days < 999.5 else ">999d"


def percent(value: float | None) -> str:
    """In at most five characters. 100 only when it is."""
    if value is None:
        return NONE
    return "100" if value >= 100 else f"{int(value * 10) / 10:.1f}"


def cut(value: str, width: int, dots: str = "…") -> str:
    """At most that many cells, cut in the middle: names differ at their ends."""
    value = plain(value).replace("\n", " ")
    if cell_len(value) <= width:
        return value
    if width <= len(dots):
        return dots[:width]
    left = (width - len(dots) + 1) // 2
    right = width - len(dots) - left
    head = set_cell_size(value, left)
    tail = ""
    for letter in reversed(value):
        if cell_len(letter + tail) > right:
            break
        tail = letter + tail
    return head + dots + tail


def fit(value: str, width: int, *, right: bool = False, dots: str = "…") -> str:
    """Exactly that many cells."""
    value = cut(value, width, dots)
    spaces = " " * (width - cell_len(value))
    return spaces + value if right else value + spaces


def wrapped(value: str, width: int, indent: str = "  ") -> list[str]:
    """Lines of at most that many cells, broken between words where that can be; later ones are indented."""
    lines, line = [], ""
    for word in plain(value).split():
        while word:
            start = line + (" " if line.strip() else "")
            if cell_len(start + word) <= width:
                line, word = start + word, ""
            elif line.strip():
                lines.append(line)
                line = indent
            else:
                room = max(1, width - len(line))
                piece = set_cell_size(word, room).rstrip() if cell_len(word) > room else word
                piece = piece or word[0]
                lines.append(line + piece)
                line, word = indent, word[len(piece) :]
    return [*lines, line] if line.strip() else lines


def spark(values: Sequence[float], width: int, *, first: int = 0, unicode: bool = True) -> str:
    """A line of bars, the newest at the right. When there are more values than cells, neighbours share a bar
    as high as the highest of them. first: the number of the first value, from the beginning of all: those
    that share a bar go on sharing it while others come."""
    marks = _SPARKS if unicode else _ASCII_SPARKS
    share = next(step for step in _SHARES if len(values) // step < width or step == _SHARES[-1])
    bars: dict[int, float] = {}
    for at, value in enumerate(values, first):
        bars[at // share] = max(bars.get(at // share, 0.0), value)
    shown = list(bars.values())[-width:]
    most = max(shown, default=0.0)
    return "".join(marks[_height(bar, most, len(marks))] for bar in shown).rjust(width)


def _height(value: float, most: float, levels: int) -> int:
    return 0 if value <= 0 or most <= 0 else max(1, min(levels - 1, round(value / most * (levels - 1))))


@dataclass(slots=True)
class Line:
    """A line of a screen: pieces of text, each with its style."""

    pieces: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, value: str, style: str = "") -> Line:
        """In one style."""
        return cls([(value, style)])

    @property
    def text(self) -> str:
        """Without styles."""
        return "".join(piece for piece, _ in self.pieces)

    def styled(self, style: str) -> Line:
        """All of it in one style."""
        return Line([(piece, style) for piece, _ in self.pieces])


def plain_lines(lines: Iterable[Line]) -> list[str]:
    """As text, without spaces at the ends."""
    return [line.text.rstrip() for line in lines]
