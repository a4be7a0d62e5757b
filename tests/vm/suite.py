"""The guest's tests as seen from the host: which there are, how a VM runs them, what each one said."""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GUEST = HERE / "guest"
sys.path.insert(0, str(HERE.parents[1] / "packaging" / "vm"))

from tiervm import disks, kernels, payload, qemu  # noqa: E402  (found by the line above)
from tiervm.apt import quoted  # noqa: E402
from tiervm.paths import temporary  # noqa: E402
from tiervm.say import Step, say  # noqa: E402

SCRATCH_BYTES = 16 * disks.GIB
# An emulator on a loaded machine is thirty times slower than a processor; what hangs is ended by the guest
# before.
BOOT_LIMIT_S = 240
TEST_LIMIT_S = 300
SUITE_LIMIT_S = 3600
VMS_AT_ONCE = 2
# Make some tests longer, on request.
LONGER = {
    name: os.environ[name]
    for name in ("TIERBLK_KILLS", "TIERBLK_DATABASE_ROUNDS", "TIERBLK_HOSTS_LOST")
    if name in os.environ
}
if LONGER:
    TEST_LIMIT_S *= 10
# Tests in files named so may leave the kernel in a state that nobody else should inherit.
OWN_BOOT_PREFIX = "test_alone_"
# What no kernel could do otherwise than the other is tested on one only: an emulator is slow. Most of it is
# on the oldest, which has a plane less and so less else to do.
NEWEST_PREFIX, OLDEST_PREFIX = "test_new_", "test_old_"
ONLY = {"on_oldest": kernels.KINDS[0], "on_newest": kernels.KINDS[-1]}  # see tests/vm/guest/helpers.py


@dataclass(frozen=True)
class Case:
    """A test function of the guest on one kernel; its parametrised variants are reported together."""

    kernel: str
    file: str
    name: str

    @property
    def boot(self) -> tuple[str, str]:
        """Cases with the same value share one boot."""
        return self.kernel, self.file if self.file.startswith(OWN_BOOT_PREFIX) else ""

    def __str__(self) -> str:
        return f"{self.kernel}-{self.file.removesuffix('.py')}-{self.name}"


@dataclass
class Verdict:
    """What the guest's pytest said of a case: how many variants began and passed, and the words of what
    failed.
    """

    began: int = 0
    passed: int = 0
    seconds: float = 0.0
    words: list[str] = field(default_factory=list)


@dataclass
class Boot:
    """One VM that ran some cases."""

    verdicts: dict[tuple[str, str], Verdict]
    trouble: str
    console: str


def cases() -> list[Case]:
    """Every test function of tests/vm/guest for every kernel, found without importing: the guest has other
    modules.
    """
    found: list[Case] = []
    for kernel in kernels.KINDS:
        for path in sorted(
            GUEST.glob("test_*.py"), key=lambda path: (path.name.startswith(OWN_BOOT_PREFIX), path.name)
        ):
            if path.name.startswith(NEWEST_PREFIX) and kernel != kernels.KINDS[-1]:
                continue
            if path.name.startswith(OLDEST_PREFIX) and kernel != kernels.KINDS[0]:
                continue
            for node in ast.parse(path.read_text()).body:
                functions = ast.FunctionDef | ast.AsyncFunctionDef
                if not isinstance(node, functions) or not node.name.startswith("test_"):
                    continue
                marks = {each.id for each in node.decorator_list if isinstance(each, ast.Name)}
                if all(kernel == only for mark, only in ONLY.items() if mark in marks):
                    found.append(Case(kernel, path.name, node.name))
    return found


def run(group: Sequence[Case], *, beside_others: bool = False) -> Boot:
    """Boots the kernel of the cases (all of one boot) and runs exactly them. beside_others: another VM shows
    what it does at the same time."""
    kernel = kernels.kernel(group[0].kernel)
    root = disks.test_root()
    ids = [f"/opt/tierblk/tests/vm/guest/{case.file}::{case.name}" for case in group]
    command = ["python3", "-m", "pytest", "-c", "/opt/tierblk/pyproject.toml", "--rootdir=/opt/tierblk"]
    command += [
        "--confcutdir=/opt/tierblk/tests/vm/guest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--no-header",
        "--tb=short",
    ]
    command += ["-o", f"timeout={TEST_LIMIT_S}", *ids]
    listener = _Listener(f"kernel {kernel.release}", len(group), alone=not beside_others)
    with temporary("test") as folder:
        attached = [
            qemu.Disk("root", root, "snapshot"),
            qemu.Disk("payload", payload.make_payload(folder / "payload", {"command": _job(command)}), "ro"),
            qemu.Disk("cache", disks.scratch(folder / "cache", SCRATCH_BYTES)),
        ]
        machine = qemu.Machine(kernel, attached, mem_mib=2048, timeout_s=_limit_s(len(group)))
        machine.on_note = listener.hear
        outcome = listener.watch(machine)
    trouble = outcome.trouble
    if outcome.status is not None and outcome.status not in (0, 1):
        trouble = f"the guest's pytest ended with status {outcome.status}"
    return Boot(listener.verdicts, trouble, "\n".join(outcome.tail))


def _tried(group: Sequence[Case], beside_others: bool) -> Boot:
    """Also when there is no VM."""
    began_s = time.monotonic()
    try:
        return run(group, beside_others=beside_others)
    except Exception as error:
        kernel = group[0].kernel
        return Boot(
            {}, f"no VM with the {kernel} kernel after {time.monotonic() - began_s:.0f} s: {error}", ""
        )


def _limit_s(count: int) -> float:
    return min(SUITE_LIMIT_S, BOOT_LIMIT_S + count * TEST_LIMIT_S)


def _job(command: list[str]) -> str:
    settings = quoted([f"{name}={value}" for name, value in LONGER.items()])
    return f"cd /tmp && export {settings} TIERBLK_VM_NOTES=/dev/ttyS1 && {quoted(command)}\n"


class _Listener:
    """Turns the guest's notes into verdicts, and shows the person where it is."""

    def __init__(self, title: str, count: int, *, alone: bool) -> None:
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        self._title = title
        self._count = count
        self._alone = alone
        self._step: Step | None = None

    def watch(self, machine: qemu.Machine) -> qemu.Outcome:
        """Boots it under a line that moves; two such lines would be in each other's way."""
        if not self._alone:
            say(f"    {self._title}, {self._count} tests")
            return qemu.boot(machine)
        with Step(f"{self._title}, {self._count} tests") as self._step:
            return qemu.boot(machine)

    def hear(self, note: dict[str, Any]) -> None:
        """One note: {"began": id} or {"test": id, "outcome", "seconds", "words"}; others are for somebody
        else.
        """
        began, done = note.get("began"), note.get("test")
        if isinstance(began, str):
            self._verdict(began).began += 1
            if self._step is not None:
                self._step.hint = began.rpartition("::")[2]
        if isinstance(done, str):
            verdict = self._verdict(done)
            verdict.seconds += float(note.get("seconds", 0))
            if note.get("outcome") == "passed":
                verdict.passed += 1
            else:
                verdict.words.append(f"{done}: {note.get('outcome')}\n{note.get('words', '')}")
            seconds = float(note.get("seconds", 0))
            whose = "" if self._alone else f"{self._title.removeprefix('kernel ')}  "
            say(f"    {note.get('outcome'):>7} {seconds:6.1f} s  {whose}{done.rpartition('/')[2]}")

    def _verdict(self, test_id: str) -> Verdict:
        path, _, name = test_id.partition("::")
        return self.verdicts.setdefault((Path(path).name, name.partition("[")[0]), Verdict())


class Suite:
    """All boots of a session: they begin when the first case is asked for, as many at once as there are
    processors for. An emulator keeps one busy, with whatever number it shows its guest."""

    def __init__(self, selected: Sequence[Case]) -> None:
        self._selected = selected
        self._boots: dict[tuple[str, str], Future[Boot]] = {}

    def _begin(self) -> None:
        groups: dict[tuple[str, str], list[Case]] = {}
        for case in self._selected:
            groups.setdefault(case.boot, []).append(case)
        at_once = min(len(groups), VMS_AT_ONCE, os.cpu_count() or 1)
        executor = ThreadPoolExecutor(at_once, "vm")
        self._boots = {boot: executor.submit(_tried, group, at_once > 1) for boot, group in groups.items()}
        executor.shutdown(wait=False)

    def check(self, case: Case) -> None:
        """Fails (AssertionError with the guest's words) unless every variant of the case ran and passed."""
        if not self._boots:
            self._begin()
        boot = self._boots[case.boot].result()
        verdict = boot.verdicts.get((case.file, case.name), Verdict())
        if verdict.words:
            raise AssertionError("\n".join(verdict.words))
        if verdict.began == 0 or verdict.passed < verdict.began:
            state = "began and did not end" if verdict.began else "did not run"
            raise AssertionError(f"{case} {state}: {boot.trouble or 'no report came'}\n{boot.console}")
