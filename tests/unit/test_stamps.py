"""The verdict of the consistency test can be that something is wrong: each way that it knows."""

from __future__ import annotations

import pytest

from tests.torture.stamps import PAGE_BYTES, History, seq_of, stamp

PAGES = 8


def told(*lines: str) -> History:
    history = History.of(PAGES)
    for line in lines:
        history.tell(line)
    history.died()
    return history


def content(**pages: int) -> bytes:
    """p3=7: page 3 is of write 7; the others are zeros."""
    found = bytearray(PAGES * PAGE_BYTES)
    for name, seq in pages.items():
        page = int(name[1:])
        found[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = stamp(seq, page)
    return bytes(found)


TWO = ("I 1 0 2 w", "C 1", "I 2 1 1 w", "C 2")
SEALED = ("I 1 0 1 w", "C 1", "E", "L", "N 5 aa", "I 2 1 1 w", "C 2")


def test_a_page_is_one_whole_stamp_of_its_own() -> None:
    assert seq_of(stamp(7, 3), 3) == 7
    assert seq_of(bytes(PAGE_BYTES), 3) == 0
    torn = stamp(7, 3)[:2048] + stamp(8, 3)[2048:]
    for data, page in ((stamp(7, 3), 4), (torn, 3), (b"\1" * PAGE_BYTES, 3)):
        with pytest.raises(ValueError, match="no whole stamp"):
            seq_of(data, page)


@pytest.mark.parametrize(
    ("lines", "found", "kept", "records", "says"),
    [
        (TWO, content(p0=1, p1=2), "all", {}, ""),
        (TWO, content(p0=1, p1=1), "all", {}, "write 2 came later"),
        (TWO, content(p0=1, p1=1), "disk", {}, ""),
        ((*TWO, "F 1", "f 1"), content(p0=1, p1=1), "disk", {}, "write 2 came later"),
        ((*TWO, "F 1"), content(p0=1, p1=1), "disk", {}, ""),
        (TWO, content(), "none", {}, ""),
        (TWO, content(p0=1), "none", {}, "began after the cut"),
        (SEALED, content(p0=1), "none", {5: "aa"}, ""),
        (SEALED, content(), "none", {5: "aa"}, "write 1 came later"),
        (SEALED, content(), "none", {5: "bb"}, ""),
        (SEALED, content(p0=1, p1=2), "none", {5: "aa"}, "began after the cut"),
        # No cut has the second and not the first.
        ((*TWO, "E", "L", "N 5 aa"), content(p1=2), "none", {5: "aa"}, "write 1 came later"),
        (("I 1 0 1 w", "C 1", "I 2 0 1 z", "C 2"), content(p0=1), "all", {}, "write 2 came later"),
        (("I 1 0 1 w", "C 1", "I 2 0 1 z"), content(p0=1), "all", {}, ""),
        (("I 1 0 1 w", "C 1"), content(p3=9), "all", {}, "older than what was known"),
    ],
)
def test_verdicts(
    lines: tuple[str, ...], found: bytes, kept: str, records: dict[int, str], says: str
) -> None:
    wrong = told(*lines).verdict(found, kept, records)
    assert bool(wrong) == bool(says)
    assert says in " ".join(wrong)


def test_a_prefix_needs_what_ended_before_anything_in_it_began() -> None:
    """Without an epoch that asks for it: the second write is there, so the first has to be."""
    history = told("I 1 0 1 w", "C 1", "I 2 1 1 w", "E", "L", "N 5 aa")
    assert "write 1 came later" in history.verdict(content(p1=2), "none", {5: "aa"})[0]


def test_what_was_lost_does_not_come_back() -> None:
    history = told(*SEALED)
    assert history.verdict(content(p0=1), "none", {5: "aa"}) == []
    assert "older than what was known" in history.verdict(content(p0=1, p1=2), "all", {5: "aa"})[0]
