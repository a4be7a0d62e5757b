"""The live screen of `tierblk top`: rounds of questions, keys, and what they change, drawn with rich."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from tierblk.cli.top_ask import Rounds
from tierblk.cli.top_detail import device_page, help_page
from tierblk.cli.top_keys import CONTINUE, END, RESIZE, SUSPEND, WAKE, Terminal
from tierblk.cli.top_model import Model, Picture
from tierblk.cli.top_rows import SORTS, View, footer, overview, select
from tierblk.cli.top_text import Line, fit

PATIENCE_S = 1.0
_PAGE_ROWS = 10


class Drawing:
    """Lines for rich: each exactly as wide as the screen, so that nothing of the one before is left and the
    screen never has to be cleared."""

    def __init__(self, lines: list[Line], last: Line | None = None, height: int | None = None) -> None:
        """last: at the bottom of so many lines."""
        if last is not None and height is not None:
            lines = [*lines[: height - 1], *[Line()] * max(0, height - 1 - len(lines)), last]
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for at, line in enumerate(self._lines):
            if at:
                yield Segment.line()
            segments = [Segment(text, Style.parse(style)) for text, style in line.pieces]
            yield from Segment.adjust_line_length(segments, width)


def draw(picture: Picture | None, view: View) -> list[Line]:
    """The lines of the view's page, without the last one."""
    if picture is None:
        return [Line.of(fit(" tierblk top  asking the daemons", view.width), "bold")]
    page = {"device": device_page, "help": help_page}.get(view.page, overview)
    return page(picture, view)


def press(key: str, picture: Picture | None, view: View) -> View | None:
    """What a key makes of the view; None: it quits."""
    if key in ("q", "Q"):
        return None
    if view.page == "help":
        return replace(view, page="all")
    if key in ("?", "h"):
        return replace(view, page="help")
    if key == "esc" and view.page == "device":
        return replace(view, page="all")
    if key == "s" and view.page == "all":
        names = list(SORTS)
        return replace(view, sort=names[(names.index(view.sort) + 1) % len(names)])
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -_PAGE_ROWS, "page down": _PAGE_ROWS}
    if picture is None:
        return view
    if key in steps:
        return select(picture, view, steps[key])
    if key in ("enter", "d"):
        if view.page == "device":
            return replace(view, page="all")
        chosen = view if view.selected is not None else select(picture, view, 0)
        return replace(chosen, page="device") if chosen.selected is not None else view
    return view


class Screen:
    """From `run` to its end."""

    def __init__(
        self,
        rounds: Rounds,
        console: Console,
        *,
        interval_s: float,
        names: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """names: only these devices."""
        self._rounds, self._console, self._clock = rounds, console, clock
        self._names = names
        self._model = Model()
        self._picture: Picture | None = None
        self._is_asking = False
        self._asked_s = 0.0
        unicode = (console.encoding or "").lower().replace("-", "").startswith("utf")
        self._view = View(interval_s=interval_s, unicode=unicode)

    def run(self) -> int:
        """Until somebody quits; the exit code. KeyboardInterrupt after Ctrl-C. TierblkError: one may not look
        for daemons. The terminal is as it was, whatever ends this."""
        key_fd = sys.stdin.fileno() if sys.stdin is not None and not sys.stdin.closed else None
        with Terminal(key_fd) as terminal:
            live = Live(console=self._console, screen=True, auto_refresh=False, redirect_stdout=False)
            live.start()
            try:
                self._loop(terminal, live)
            finally:
                live.stop()
        if terminal.ended_by == 2:
            raise KeyboardInterrupt
        return 128 + terminal.ended_by if terminal.ended_by else 0

    def _loop(self, terminal: Terminal, live: Live) -> None:
        self._show(live)
        while True:
            self._round()
            events = terminal.events(self._wait_s(), self._rounds.fd)
            for event in events:
                if event == END:
                    return
                if event == SUSPEND:
                    live.stop()
                    terminal.suspend()
                    live.start()
                elif event == CONTINUE:
                    terminal.grab()  # whoever had the terminal meanwhile may have changed it
                elif event not in (WAKE, RESIZE):
                    view = press(event, self._picture, self._view)
                    if view is None:
                        return
                    self._view = view
            if self._is_asking and self._is_over():
                self._end_round()
                self._show(live)
            elif any(event != WAKE for event in events):
                self._show(live)

    def _round(self) -> None:
        if not self._is_asking and (self._picture is None or self._clock() >= self._next_s):
            self._asked_s, self._is_asking = self._clock(), True
            self._rounds.begin()

    @property
    def _next_s(self) -> float:
        """When the next round begins."""
        return self._asked_s + self._view.interval_s

    def _is_over(self) -> bool:
        return self._rounds.is_complete or self._clock() >= self._asked_s + PATIENCE_S

    def _wait_s(self) -> float:
        until_s = self._asked_s + PATIENCE_S if self._is_asking else self._next_s
        return until_s - self._clock()

    def _end_round(self) -> None:
        self._is_asking = False
        answers, orphans = self._rounds.close()
        picture = self._model.update(answers, orphans, now_s=self._clock(), unix_s=time.time())
        self._picture = picture.only(self._names)

    def _show(self, live: Live) -> None:
        size = os.get_terminal_size(self._console.file.fileno())
        width, height = max(20, size.columns or 80), max(4, size.lines or 24)  # a serial line says 0
        self._view = replace(self._view, width=width, height=height)
        # Else it would go by COLUMNS and LINES, which stay as they were when the terminal gets another size.
        self._console.size = ConsoleDimensions(width, height)
        lines = draw(self._picture, self._view)
        live.update(Drawing(lines, footer(self._view), height), refresh=True)
