"""What is said of figures besides ratios: bars, figures without a peer, what was left out."""

from __future__ import annotations

import pytest

from bench import boot, report
from bench.bars import BARS, Bar, check
from bench.results import FIGURES, PEERS, Result, Sample, compare
from tests.unit.bench_rig import HIT_4K, MEMORY, hits


def _with_memory(value: float) -> Result:
    result = hits(tierblk=[1.0])
    result.samples.append(Sample(*MEMORY[:2], "tierblk", *MEMORY[2:], 0, value))
    return result


# -- bars ---


@pytest.mark.parametrize(("value", "meets"), [(0.69, False), (0.7, True), (2.0, True)])
def test_a_bar_of_at_least(value: float, meets: bool) -> None:
    assert Bar(HIT_4K, "null", at_least=0.7).meets(value) is meets


@pytest.mark.parametrize(("value", "meets"), [(41.0, False), (40.0, True), (0.0, True)])
def test_a_bar_of_at_most(value: float, meets: bool) -> None:
    assert Bar(MEMORY, "", at_most=40).meets(value) is meets


def test_every_bar_has_one_limit_and_a_series_of_its_own() -> None:
    assert all((bar.at_least is None) != (bar.at_most is None) for bar in BARS)
    assert len({(bar.series, bar.peer) for bar in BARS}) == len(BARS)
    assert {bar.peer for bar in BARS} <= {"", *PEERS}
    assert all(bar.series[0] in {*report.TITLES, *FIGURES} for bar in BARS)


def test_writes_have_a_bar_on_every_medium() -> None:
    bars = {(bar.series[:2], bar.peer): bar for bar in BARS}
    for medium in ("tmpfs", "disk"):
        for section in ("write", "write-stream", "fsync", "fsync-row"):
            assert bars[(section, medium), "loop"].at_least is not None
        assert bars[("p99-writing", medium), "idle"].meets(3.0)
        assert not bars[("p99-writing", medium), "idle"].meets(3.1)


def test_a_bar_is_checked_against_the_ratio_or_the_figure() -> None:
    result = _with_memory(41.5)
    result.samples += hits(null=[2.0]).samples
    bars = [Bar(HIT_4K, "null", at_least=0.5), Bar(MEMORY, "", at_most=40), Bar(HIT_4K, "loop", at_least=1)]
    assert [each.verdict for each in check(result, bars)] == ["meets", "misses", "not measured"]


def test_the_report_says_which_bars_are_met() -> None:
    text = report.table(hits(tierblk=[60.0], null=[100.0]))
    (line,) = [line for line in text.splitlines() if "hit tmpfs 4 KiB x32 to null" in line]
    assert line.split()[-5:] == ["0.600", "at", "least", "0.7", "misses"]
    assert "not measured" in text


def test_a_result_without_any_of_them_says_nothing_of_bars() -> None:
    assert "bars" not in report.table(hits(tierblk=[1.0], qemu=[1.0]))


# -- figures ---


def test_a_figure_stands_by_itself() -> None:
    text = report.table(_with_memory(41.5))
    (line,) = [line for line in text.splitlines() if FIGURES["memory-block"].title in line]
    assert line.split()[-2:] == ["41.5", "bytes"]


@pytest.mark.parametrize(("after", "verdict"), [(40.0, "same"), (41.0, "same"), (60.0, "up"), (30.0, "down")])
def test_figures_are_compared_without_rounds(after: float, verdict: str) -> None:
    (change,) = compare(_with_memory(40.0), _with_memory(after))
    assert (change.series, change.peer, change.verdict) == (MEMORY, "", verdict)
    assert "(itself)" in report.changes([change])


def test_a_figure_that_is_timed_needs_rounds() -> None:
    share = ("devices-share", "tmpfs", 4096, 160)

    def measured(*values: float) -> Result:
        result = hits()
        result.samples = [
            Sample(*share[:2], "tierblk", *share[2:], i, value) for i, value in enumerate(values)
        ]
        return result

    (one,) = compare(measured(0.5), measured(0.9))
    assert one.verdict == "unknown"
    (three,) = compare(measured(0.5, 0.51, 0.52), measured(0.9, 0.91, 0.92))
    assert three.verdict == "up"


def test_a_result_of_before_has_no_figure_in_common() -> None:
    assert compare(hits(tierblk=[1.0]), _with_memory(40.0)) == []


def test_what_was_left_out_is_said_and_kept() -> None:
    result = hits(tierblk=[1.0])
    result.skipped["two queues"] = "two queues need two processors, this kernel has 1"
    assert "two queues: two queues need two processors" in report.table(result)
    assert Result.from_json(result.to_json()) == result


def test_a_result_from_before_there_was_anything_to_leave_out_is_read() -> None:
    text = hits(tierblk=[1.0]).to_json().replace(' "skipped": {},\n', "")
    assert "skipped" not in text
    assert Result.from_json(text).skipped == {}


def test_the_boot_of_the_report() -> None:
    result = hits()
    boot.measure(result)
    figures = {s.section: s.value for s in result.samples if s.target == "tierblk"}
    assert figures.keys() == {"boot-bytes", "boot-gets", "boot-wait"}
    assert 1 <= figures["boot-bytes"] < 1.4
    assert "whole blocks, nothing ahead" in report.table(result)
