"""Runs tests/vm/guest on the oldest and the newest supported kernel."""

from __future__ import annotations

import pytest

from tests.vm.suite import SUITE_LIMIT_S, Case, Suite, cases


@pytest.mark.timeout(SUITE_LIMIT_S)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_in_guest(case: Case, suite: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    """The first case of a boot waits for the whole boot, in the open: it takes minutes."""
    with capfd.disabled():
        suite.check(case)
