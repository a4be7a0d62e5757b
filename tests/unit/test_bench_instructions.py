"""What the counting of instructions makes of what its plugin wrote, and that its two C programs fit each
other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import instructions, report
from bench.counted import ANSWERS, Load, Plan
from bench.fio import BenchError
from bench.instructions import Counts, divided, facts, parse_counts, parse_symbols, plugin_version
from bench.results import Result, Sample
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "packaging" / "vm"))

from tiervm import qemu
from tiervm.kernels import Kernel

NM = """\
000000005b002160 T hitter_start
000000005b002170 T hitter_stop
                 w __gmon_start__
000000005b0aefc0 B _end
"""


def _answers(*targets: str, value: float = 100.0) -> list[Sample]:
    return [Sample(ANSWERS, "tmpfs", target, 4096, 32, 0, value) for target in targets]


def test_counts_are_read() -> None:
    assert parse_counts("1 2 3 4\n50 60 70 80\n") == [Counts(1, 2, 3, 4), Counts(50, 60, 70, 80)]
    assert parse_counts("") == []


@pytest.mark.parametrize("text", ["1 2 3\n", "1 2 3 4 5\n", "1 2 3 x\n", "\n"])
def test_what_is_no_count_is_said_so(text: str) -> None:
    with pytest.raises(BenchError, match="no count"):
        parse_counts(text)


def test_addresses_are_found() -> None:
    assert parse_symbols(NM) == {
        "low": 0x5B000000,
        "high": 0x5B0AEFC0,
        "start": 0x5B002160,
        "stop": 0x5B002170,
    }


def test_a_symbol_that_is_missing_is_named() -> None:
    with pytest.raises(BenchError, match="hitter_stop"):
        parse_symbols(NM.replace("hitter_stop", "other"))


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", 1),
        ("QEMU emulator version 8.2.2", 1),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", 2),
    ],
)
def test_version_of_the_interface(said: str, version: int) -> None:
    assert plugin_version(said) == version


def test_a_qemu_without_a_version() -> None:
    with pytest.raises(BenchError, match="which QEMU"):
        plugin_version("no such thing")


def test_counts_are_divided_by_answers() -> None:
    samples = divided(_answers("tierblk"), [Counts(program=500, server=6_000, kernel=90_000, repetitions=7)])
    assert {sample.medium: sample.value for sample in samples} == {
        "server": 60.0,
        "kernel": 900.0,
        "both": 960.0,
    }
    assert {sample.series[0] for sample in samples} == {"instructions"}


def test_a_target_in_the_kernel_has_no_server() -> None:
    samples = divided(_answers("loop"), [Counts(program=500, server=6, kernel=90_000, repetitions=7)])
    assert {sample.medium: sample.value for sample in samples} == {"kernel": 900.0, "both": 900.0}


def test_counts_of_another_run_are_refused() -> None:
    with pytest.raises(BenchError, match="2 stretches were counted, but 1"):
        divided(_answers("tierblk"), [Counts(1, 2, 3, 4)] * 2)


def test_the_table_has_ratios_to_both_peers() -> None:
    result = Result(date="2026-01-01", commit="c0ffee", kernel={}, settings={"rounds": 1})
    counts = [Counts(1, 60_000, 900_000, 1), Counts(1, 30_000, 600_000, 1), Counts(1, 5, 800_000, 1)]
    answers = _answers("tierblk", "null", "loop")
    result.samples = divided(answers, counts)
    result.facts = facts(answers, counts)
    rows = {line[:16]: line.split()[4:] for line in report.table(result).splitlines()}
    assert rows["server 4 KiB x32"] == ["600.0", "300.0", "2.00"]
    assert rows["kernel 4 KiB x32"] == ["9,000", "6,000", "8,000", "1.50", "1.12"]
    assert result.facts["instructions null 4 KiB x32"] == {"repetitions": 0.0, "program": 0.0}


def test_plans_count_more_than_they_warm() -> None:
    for plan in (Plan(), Plan.quick()):
        assert all(isinstance(load, Load) and load.count > load.warm for load in plan.loads)


def test_a_tree_without_a_core_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tierblk" / "core").mkdir(parents=True)
    with pytest.raises(BenchError, match="make setup"):
        instructions.copied(tmp_path, tmp_path / "out")


def test_both_programs_compile_and_fit(tmp_path: Path) -> None:
    hitter = instructions.hitter(tmp_path)
    arguments = instructions.arguments(hitter, tmp_path / "counts")
    addresses = {name: int(value, 16) for name, value in (word.split("=") for word in arguments[1:])}
    assert addresses["low"] < addresses["start"] < addresses["stop"] < addresses["high"]
    assert instructions.plugin(tmp_path, 1).stat().st_size


def test_a_vm_with_a_plugin_goes_by_instructions() -> None:
    machine = qemu.Machine(
        Kernel("new", "7.3", Path("vmlinuz"), Path("initramfs")), [], plugin="count.so,out=f"
    )
    words = qemu._Run(machine, "tcg")._command(3)
    assert words[words.index("-plugin") + 1] == "count.so,out=f"
    assert words[words.index("-accel") + 1] == "tcg,thread=single"
    assert "shift=0" in words
    assert qemu.COUNTED_ARGUMENTS in words[words.index("-append") + 1]


def test_a_vm_without_one_goes_by_the_clock() -> None:
    machine = qemu.Machine(Kernel("new", "7.3", Path("vmlinuz"), Path("initramfs")), [])
    words = qemu._Run(machine, "tcg")._command(3)
    assert "-icount" not in words
    assert "-plugin" not in words
    assert qemu.COUNTED_ARGUMENTS not in words[words.index("-append") + 1]
