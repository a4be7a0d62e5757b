"""The picture of a result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import plot
from bench.fio import BenchError
from bench.results import Sample
from tests.unit.bench_rig import MEMORY, hits


def test_the_picture_has_a_line_for_every_ratio() -> None:
    result = hits(tierblk=[60.0, 70.0], null=[100.0, 100.0], null_blk=[1.0, 1.0], qemu=[10.0, 10.0])
    result.samples.append(Sample(*MEMORY[:2], "tierblk", *MEMORY[2:], 0, 40.0))
    drawn = plot.lines(result)
    assert [(line.label, line.limit) for line in drawn] == [
        ("hit, tmpfs 4 KiB x32, to null", 0.70),
        ("hit, tmpfs 4 KiB x32, to qemu", None),
    ]
    assert drawn[0].ratio.value == pytest.approx(0.65)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot.draw(hits(tierblk=[60.0, 70.0], null=[100.0, 100.0]), tmp_path / "bench.svg")
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_without_matplotlib_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BenchError, match="matplotlib is not installed"):
        plot.draw(hits(tierblk=[1.0], null=[1.0]), tmp_path / "bench.svg")


def test_without_ratios_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no ratio"):
        plot.draw(hits(tierblk=[1.0]), tmp_path / "bench.svg")
