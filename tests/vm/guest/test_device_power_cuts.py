"""Power cuts on a disk whose writes are logged (tests/torture/cuts.py), few of them."""

from __future__ import annotations

from pathlib import Path

from tests.torture.cuts import Cuts, go

CUTS = 4


def test_i2_what_was_flushed_is_there_after_a_power_cut(scratch: Path) -> None:
    summary = go(Cuts(seed=3, count=CUTS, folder=scratch / "cuts"))
    assert summary["cuts"] == CUTS
    assert summary["between_marks"] > 0
    assert summary["wrong"] == []
