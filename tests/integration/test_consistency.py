"""A few rounds of tests/torture/consistency.py: `python -m tests.torture consistency` runs many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.consistency import Consistency, run


@pytest.mark.timeout(240)  # some 15 s where nothing else runs
def test_what_is_there_after_a_host_died_is_what_it_wrote_up_to_some_moment(tmp_path: Path) -> None:
    summary = run(Consistency(seed=1, count=10, folder=tmp_path / "run"))
    assert summary["wrong"] == []
    assert summary["epochs"] > 5
    assert summary["writes"] > 100
