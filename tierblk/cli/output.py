"""What commands print: results on stdout, everything for people's eyes only on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from tierblk.errors import TierblkError


def say(text: str) -> None:
    """A line on stderr, with what could steer a terminal made harmless."""
    print(plain(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A warning on stderr."""
    say(f"tierblk: warning: {text}")


def complain(error: TierblkError) -> None:
    """An error on stderr: a sentence, and the way out if there is one."""
    say(f"tierblk: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")


def plain(text: str) -> str:
    """The text without control characters except newlines: parts of it come from remotes and other files."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def put(text: str, to: TextIO | None = None) -> None:
    """A line on stdout, or there, when this returns."""
    print(plain(text), file=to, flush=True)


def put_line(text: str) -> None:
    """One of very many lines on stdout, of characters that can do no harm; they may come in larger pieces."""
    sys.stdout.write(f"{text}\n")


def put_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2), flush=True)


def put_table(header: Sequence[str], rows: Sequence[Sequence[str]], to: TextIO | None = None) -> None:
    """Columns as wide as they need to be; the last one is not padded."""
    lines = [header, *rows]
    widths = [max(len(plain(line[n])) for line in lines) for n in range(len(header))]
    for line in lines:
        padded = (plain(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        put("  ".join(padded).rstrip(), to)
