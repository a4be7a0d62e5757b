"""The lines of `tierblk top`'s screen: a picture and a view of it, to rows of text with styles. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from rich.cells import cell_len

from tierblk.cli.top_columns import CACHES, DEVICES, REMOTES, UPLOADS
from tierblk.cli.top_model import DeviceView, Picture
from tierblk.cli.top_tables import Table
from tierblk.cli.top_text import Line, cut, fit
from tierblk.cli.top_troubles import trouble_lines
from tierblk.units import format_duration

T = TypeVar("T")

WIDTH_MIN = 80


@dataclass(frozen=True, slots=True)
class View:
    """How it is looked at. height: None: as many lines as there are. selected: of a device, see
    DeviceView.key. page: "all", "device" or "help"."""

    width: int = WIDTH_MIN
    height: int | None = None
    interval_s: float = 1.0
    sort: str = "iops"
    selected: tuple[str, str] | None = None
    page: str = "all"
    unicode: bool = True

    @property
    def dots(self) -> str:
        """What stands for what was cut out."""
        return "…" if self.unicode else "~"


def _slowest(device: DeviceView) -> float:
    return max((tier.p99_us or 0 for tier in device.latencies.values()), default=0)


SORTS: dict[str, Callable[[DeviceView], float]] = {
    "iops": lambda d: d.iops or 0,
    "bytes": lambda d: (d.read_bytes_per_s or 0) + (d.write_bytes_per_s or 0),
    "latency": _slowest,
    "waiting": lambda d: d.waiting,
    "dirty": lambda d: d.upload.dirty_bytes if d.upload else 0,
    "name": lambda d: 0,
}
"""The largest first, and by name where that is the same."""


def in_order(devices: Sequence[DeviceView], sort: str) -> list[DeviceView]:
    """As the view shows them."""
    return sorted(devices, key=lambda d: (-SORTS[sort](d), d.name, d.cache_dir))


@dataclass
class _Section(Generic[T]):
    """A table on the screen, of whose rows so many are shown. selected: the number of one that always is."""

    table: Table[T]
    rows: Sequence[T]
    shown: int
    selected: int | None = None

    @property
    def height(self) -> int:
        """Lines that it takes."""
        if not self.rows or self.shown <= 0:
            return 0
        return self.shown + (2 if any(column.group for column in self.table.columns) else 1)

    def lines(self, view: View) -> list[Line]:
        """Its header, rows, and how many there are besides."""
        if not self.height:
            return []
        fitting = self.table.fitting(self.rows, view.width)
        lines = self.table.header(fitting)
        is_whole = self.shown >= len(self.rows)
        visible = self.shown if is_whole else self.shown - 1
        begin = 0
        if self.selected is not None and not is_whole:
            begin = min(max(0, self.selected - visible + 1), len(self.rows) - visible)
        for at in range(begin, begin + visible):
            mark = ">" if at == self.selected else " "
            lines.append(self.table.line(fitting, self.rows[at], mark=mark, dots=view.dots))
        if not is_whole:
            lines.append(Line.of(f" {view.dots} {len(self.rows) - visible} more", "dim"))
        return lines


_SHRINKING = ((3, 3), (2, 2), (1, 5), (0, 3), (3, 2), (0, 2), (3, 0), (2, 0), (0, 0), (1, 2), (1, 0))
"""What goes first when there is little room: (number of a section, to how many lines it may shrink)."""


def overview(picture: Picture, view: View) -> list[Line]:
    """All there is, in as many lines as the view has at most, without the last one of the screen."""
    if not picture.caches and not picture.devices:
        return [title(picture, view, ""), Line.of(" no daemon is running", "dim")]
    devices = in_order(picture.devices, view.sort)
    selected = next((at for at, device in enumerate(devices) if device.key == view.selected), None)
    uploads = [(device, device.upload) for device in devices if device.upload is not None]
    remotes = sorted(picture.remotes, key=lambda remote: remote.state == "ok")
    sections = (
        _Section(CACHES, picture.caches, len(picture.caches)),
        _Section(DEVICES, devices, len(devices), selected),
        _Section(UPLOADS, uploads, len(uploads)),
        _Section(REMOTES, remotes, len(remotes)),
    )
    troubles, is_spaced = trouble_lines(picture, view.width), True
    if view.height is not None:
        room = view.height - 2
        is_spaced = _height(sections) + len(troubles) + len(sections) <= room
        if _height(sections) + len(troubles) > room:
            troubles = trouble_lines(picture, view.width, each_one_line=view.dots)
        del troubles[max(1, room // 3) :]
        _shrink(sections, room - len(troubles))
    blocks = [section.lines(view) for section in sections]
    if not devices:
        silent = any(cache.state == "silent" for cache in picture.caches)
        words = "which devices are attached is not known" if silent else "no device is attached"
        blocks[1] = [Line.of(f" {words}", "dim")]
    lines = [title(picture, view, f"sorted by {view.sort}")]
    for block in [*blocks, troubles]:
        if block and is_spaced and len(lines) > 1:
            lines.append(Line())
        lines += block
    return lines if view.height is None else lines[: view.height - 1]


def _height(sections: Sequence[_Section[Any]]) -> int:
    return sum(section.height for section in sections)


def _shrink(sections: Sequence[_Section[Any]], room: int) -> None:
    for number, least in _SHRINKING:
        section = sections[number]
        while _height(sections) > room and section.shown > least:
            section.shown -= 1
            if section.shown == 1 and least == 0:
                section.shown = 0  # a header above "2 more" tells nothing


def title(picture: Picture, view: View, what: str) -> Line:
    """The first line: what this is, and when."""
    devices, caches = len(picture.devices), len(picture.caches)
    counted = f"{devices} device{'s' * (devices != 1)} of {caches} cache{'s' * (caches != 1)}"
    begin = f" tierblk top  {counted}, every {format_duration(view.interval_s)}{what and ', '}{what}"
    when = time.strftime("%H:%M:%S ", time.localtime(picture.unix_s))
    return Line.of(fit(begin, view.width - cell_len(when), dots=view.dots) + when, "bold")


def select(picture: Picture, view: View, step: int) -> View:
    """With another device selected, so many further down; the first one if none was."""
    devices = in_order(picture.devices, view.sort)
    if not devices:
        return replace(view, selected=None)
    at = next((at for at, device in enumerate(devices) if device.key == view.selected), None)
    at = 0 if at is None else min(max(0, at + step), len(devices) - 1)
    return replace(view, selected=devices[at].key)


def footer(view: View) -> Line:
    """The last line: the keys."""
    arrows = "↑↓" if view.unicode else "j k"
    keys = {
        "all": f"q quit   s sort   {arrows} select   enter detail   ? help",
        "device": f"q quit   esc back   {arrows} another device   ? help",
        "help": "q quit   any other key: back",
    }[view.page]
    return Line.of(fit(f" {cut(keys, view.width - 2, view.dots)}", view.width), "reverse")
