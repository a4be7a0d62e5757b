"""Whether a read that failed is tried again, and when."""

from __future__ import annotations

import pytest

from tierblk.errors import RemoteMismatch, RemoteRefused, RemoteUnavailable
from tierblk.extent import PAGE_BYTES
from tierblk.remote.retry import RETRY_AFTER_MAX_S, Retries

BUSY = RemoteUnavailable("busy")


def retries(count: int) -> Retries:
    return Retries(count, 0.2, lambda: 0.0)


def test_failures_in_a_row_are_counted() -> None:
    left = retries(3)
    assert [left.after(BUSY, 0) for _ in range(4)] == [0.1, 0.2, 0.4, None]


def test_a_page_is_a_success() -> None:
    left = retries(1)
    assert left.after(BUSY, 0) == 0.1
    assert left.after(BUSY, PAGE_BYTES) == 0.1
    assert left.after(BUSY, PAGE_BYTES - 1) is None


def test_requests_beside_count_as_tries() -> None:
    assert retries(3).after(BUSY, 0, tries=4) is None


@pytest.mark.parametrize(
    ("asked_s", "waits_s"), [(None, 0.1), (0.0, 0.1), (5.0, 5.0), (1e9, RETRY_AFTER_MAX_S)]
)
def test_retry_after(asked_s: float | None, waits_s: float) -> None:
    assert retries(3).after(RemoteUnavailable("busy", retry_after_s=asked_s), 0) == waits_s


def test_an_answer_that_does_not_fit_gets_one_more_chance() -> None:
    left, wrong = retries(0), RemoteMismatch("gzip")
    assert left.after(wrong, 0) == 0
    assert left.after(wrong, 0) is None
    assert retries(9).after(RemoteRefused("404"), 0) is None
