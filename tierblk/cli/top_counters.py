"""Counters in JSON documents, and what they have grown by. Pure.

Documents come from daemons, perhaps of another version: what is missing or of a wrong type counts as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Document = dict[str, Any]


def opt_number(document: Document, key: str) -> float | None:
    """A number; None if there is none."""
    value = document.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def number(document: Document, key: str) -> float:
    """A number; 0 if there is none."""
    return opt_number(document, key) or 0


def text(document: Document, key: str) -> str | None:
    """A text that is not empty; None if there is none."""
    value = document.get(key)
    return value if isinstance(value, str) and value else None


def dicts(document: Document, key: str) -> list[Document]:
    """The objects of a list."""
    value = document.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


@dataclass(frozen=True, slots=True)
class Since:
    """From one document to a later one of the same thing. before: None: there is none. elapsed_s: between
    them, by the clock of who counts."""

    now: Document
    before: Document | None
    elapsed_s: float

    @property
    def counts(self) -> bool:
        """Whether there is an interval at all."""
        return self.before is not None and self.elapsed_s > 0

    def grown(self, *keys: str) -> float | None:
        """By how much these counters grew together; None: no interval, or one went back or is not there."""
        if self.before is None or self.elapsed_s <= 0:
            return None
        total = 0.0
        for key in keys:
            now, before = opt_number(self.now, key), opt_number(self.before, key)
            if now is None or before is None or now < before:
                return None
            total += now - before
        return total

    def rate(self, *keys: str) -> float | None:
        """`grown` a second."""
        grown = self.grown(*keys)
        return None if grown is None else grown / self.elapsed_s

    def grown_counts(self, key: str, inner: str) -> list[int] | None:
        """`grown` of each count of a list inside an object."""
        if self.before is None or self.elapsed_s <= 0:
            return None
        lists = []
        for document in (self.now, self.before):
            object_ = document.get(key)
            counts = object_.get(inner) if isinstance(object_, dict) else None
            if not isinstance(counts, list) or not all(isinstance(count, int) for count in counts):
                return None
            lists.append(counts)
        grown = [now - before for now, before in zip_longest(*lists, fillvalue=0)]
        return grown if all(count >= 0 for count in grown) else None
