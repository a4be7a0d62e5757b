"""What the benchmarks make of their numbers: ratios, medians, verdicts, fio's answer, the tables."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import report
from bench.fio import BenchError, parse
from bench.process import cpu_s, io_workers
from bench.results import Ratio, Result, Sample, compare, load_summary, quantile, ratio, verdict

HIT_4K = ("hit", "tmpfs", 4096, 32)


def _result(ours: list[float], theirs: list[float], peer: str = "loop") -> Result:
    result = Result(
        date="2026-01-01", commit="c0ffee", kernel={"release": "7.3"}, settings={"rounds": len(ours)}
    )
    for target, values in (("tierblk", ours), (peer, theirs)):
        result.samples += [
            Sample("hit", "tmpfs", target, 4096, 32, i, value) for i, value in enumerate(values)
        ]
    return result


def _fio(**job: Any) -> str:
    read = {"iops": 1234.5, "bw_bytes": 5_000_000, "total_ios": 617, "lat_ns": {"mean": 25_300.0}}
    read["lat_ns"] = {"mean": 25_300.0, "percentile": {"99.000000": 81_000}}
    return json.dumps(
        {"fio version": "fio-3.33", "jobs": [{"jobname": "hits", "error": 0, "read": read, **job}]}
    )


def test_fio_answer_is_read() -> None:
    read = parse(_fio())["hits"]
    assert (read.requests, read.iops, read.bytes_per_s) == (617, 1234.5, 5_000_000)
    assert (read.mean_us, read.p99_us) == (25.3, 81.0)


def test_words_before_fios_json_do_not_matter() -> None:
    assert parse("fio: this platform does not support ...\n" + _fio())["hits"].requests == 617


def test_a_job_that_takes_no_time_has_no_latency() -> None:
    read = {"iops": 1.0, "bw_bytes": 1, "total_ios": 1, "lat_ns": {"mean": 0.0}}
    assert parse(_fio(read=read))["hits"].p99_us == 0


@pytest.mark.parametrize(
    "output", ["", "fio: no such file", "{", '{"jobs": []}', '{"jobs": [{"read": {}}]}', "{}"]
)
def test_no_result_is_said_so(output: str) -> None:
    with pytest.raises(BenchError, match="fio gave no result"):
        parse(output)


def test_a_job_that_failed_is_no_figure() -> None:
    with pytest.raises(BenchError, match="error 5"):
        parse(_fio(error=5))


def test_a_ratio_is_made_within_each_round() -> None:
    # The second round was disturbed for both alike: the ratio does not see it.
    found = ratio({0: 80.0, 1: 8.0, 2: 88.0}, {0: 100.0, 1: 10.0, 2: 100.0})
    assert found is not None
    assert found.value == pytest.approx(0.8)
    assert found.rounds == 3


def test_rounds_that_one_side_lacks_do_not_count() -> None:
    assert ratio({0: 1.0, 1: 2.0}, {1: 4.0, 2: 4.0}) == Ratio(0.5, 0.5, 0.5, 1)
    assert ratio({0: 1.0}, {1: 4.0}) is None
    assert ratio({0: 1.0}, {0: 0.0}) is None


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=20), st.floats(0, 1))
def test_a_quantile_lies_between_its_neighbours(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert ordered[0] * 0.999999 <= found <= ordered[-1] * 1.000001
    assert quantile(ordered, 0) == ordered[0]
    assert quantile(ordered, 1) == ordered[-1]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (Ratio(0.80, 0.79, 0.81, 5), "same"),
        (Ratio(0.82, 0.815, 0.83, 5), "same"),  # apart, but by less than is ever called a change
        (Ratio(0.90, 0.80, 0.99, 5), "same"),  # far, but the rounds overlap
        (Ratio(0.90, 0.88, 0.92, 5), "up"),
        (Ratio(0.70, 0.68, 0.72, 5), "down"),
        (Ratio(0.70, 0.70, 0.70, 2), "unknown"),
    ],
)
def test_a_change_is_more_than_noise(after: Ratio, expected: str) -> None:
    assert verdict(Ratio(0.80, 0.79, 0.81, 5), after) == expected


def test_compare_names_what_changed() -> None:
    before = _result([80, 81, 79, 80, 80], [100, 100, 100, 100, 100])
    after = _result([95, 96, 94, 95, 95], [100, 100, 100, 100, 100])
    (change,) = compare(before, after)
    assert (change.series, change.peer, change.verdict) == (HIT_4K, "loop", "up")
    assert change.relative == pytest.approx(0.1875)
    assert "up" in report.changes([change])


def test_compare_takes_only_what_both_have() -> None:
    assert compare(_result([1], [1]), _result([1], [1], peer="null")) == []
    assert "no figure in common" in report.changes([])


def test_other_targets_stand_beside_without_a_ratio() -> None:
    result = _result([1], [1], peer="null_blk")
    assert compare(result, result) == []
    assert "to null_blk" not in report.table(result)


def test_a_result_survives_its_file() -> None:
    result = _result([1.5, 2.5], [3, 4])
    result.facts["hit"] = {"io_workers": 0.0}
    assert Result.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "samples": [{}]}', "x"]
)
def test_a_file_that_is_no_result_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Result.from_json(text)


def test_the_table_shows_medians_and_ratios() -> None:
    result = _result([80_000, 70_000, 90_000], [100_000, 100_000, 100_000])
    result.host_load = load_summary([1.0, 3.0, 2.0])
    text = report.table(result)
    assert "load of the machine meanwhile: 1.0 to 3.0, median 2.0" in text
    (row,) = [line for line in text.splitlines() if line.startswith("tmpfs 4 KiB x32")]
    assert row.split()[4:] == ["80,000", "100,000", "0.80", "(0.75-0.85)"]


def test_a_single_round_shows_no_spread() -> None:
    assert "(" not in report.table(replace(_result([1], [2]), commit="c")).splitlines()[-1]


def test_no_load_was_taken() -> None:
    assert load_summary([]) == {}


def test_what_a_process_used() -> None:
    assert cpu_s(os.getpid()) >= 0
    assert io_workers(os.getpid()) == 0
