"""Instructions a hit: the server's own and the kernel's, counted one by one by QEMU's emulator
(bench/count.c), whatever else the machine is busy with.

`python3 -m bench instructions [--tree DIR] [--trace]`. The VM of packaging/vm runs `bench.counted`; this
compiles what it needs, and divides what was counted by what was asked for."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import null, where
from bench.fio import BenchError
from bench.process import output
from bench.results import Result, Sample

HERE = Path(__file__).resolve().parent

from tiervm import disks, host  # noqa: E402  (bench.where says where these are)
from tiervm.paths import temporary  # noqa: E402
from tiervm.say import Failed  # noqa: E402

SECTION = "instructions"
IN_KERNEL = ("loop",)
"""Targets without a server: what little runs in user mode meanwhile is not theirs."""
PROGRAM_BASE = 0x5B000000
"""Where the hitter is linked to: no other program of the guest has code there."""
SYMBOLS = {"high": "_end", "start": "hitter_start", "stop": "hitter_stop"}
"""Arguments of the plugin, and the hitter's symbols that give them."""
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
DISK_BYTES = 48 << 20
GUEST = "/run/bench"
"""Where the VM has its disk of that size."""


@dataclass(frozen=True)
class Counts:
    """Of one stretch, as bench/count.c writes them."""

    program: int
    server: int
    kernel: int
    repetitions: int


def parse_counts(text: str) -> list[Counts]:
    """Raises BenchError."""
    try:
        return [Counts(*map(int, line.split())) for line in text.splitlines()]
    except (TypeError, ValueError):
        raise BenchError(f"the plugin wrote something that is no count: {text[-200:]!r}") from None


def parse_symbols(listing: str) -> dict[str, int]:
    """The plugin's addresses out of what nm says of the hitter. Raises BenchError."""
    found = {}
    for line in listing.splitlines():
        match line.split():
            case [address, _, name]:
                found[name] = int(address, 16)
    try:
        return {"low": PROGRAM_BASE} | {argument: found[name] for argument, name in SYMBOLS.items()}
    except KeyError as missing:
        raise BenchError(f"the hitter has no symbol {missing.args[0]}") from None


def plugin_version(qemu: str) -> int:
    """Of the interface that bench/count.c says it was made for: QEMU insists on one, though what is used is
    the same in both. `qemu`: what `qemu-system-x86_64 --version` says. Raises BenchError."""
    if not (found := re.search(r"version (\d+)\.", qemu)):
        raise BenchError(f"which QEMU is this? {qemu[:100]!r}")
    return 1 if int(found[1]) < 9 else 2


def divided(answers: Sequence[Sample], counts: Sequence[Counts]) -> list[Sample]:
    """Instructions a request: `server` (user mode, without the program that asks), `kernel`, and `both`.

    answers: of bench.counted, in the order of the counts. Raises BenchError when they do not belong
    together."""
    if len(answers) != len(counts):
        raise BenchError(f"{len(counts)} stretches were counted, but {len(answers)} were asked for")
    samples = []
    for sample, each in zip(answers, counts, strict=True):
        server = 0 if sample.target in IN_KERNEL else each.server
        media = {"server": server, "kernel": each.kernel, "both": server + each.kernel}
        for medium, count in media.items():
            if count:
                value = count / sample.value
                samples.append(replace(sample, section=SECTION, medium=medium, value=value))
    return samples


def facts(answers: Sequence[Sample], counts: Sequence[Counts]) -> dict[str, dict[str, float]]:
    """What else was counted a request, in the last round: repetitions of string instructions (bytes that were
    copied or cleared), and instructions of the program that asks."""
    said = {}
    for sample, each in zip(answers, counts, strict=True):
        name = f"{SECTION} {sample.target} {sample.size_bytes // 1024} KiB x{sample.depth}"
        said[name] = {
            "repetitions": round(each.repetitions / sample.value, 1),
            "program": round(each.program / sample.value, 1),
        }
    return said


def _gcc(source: str, target: Path, *words: str) -> None:
    done = subprocess.run(
        ["gcc", *FLAGS, str(HERE / source), *words, "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"bench/{source} does not compile: {done.stderr.strip()[-300:]}")


def hitter(folder: Path) -> Path:
    """The program that asks, compiled. Raises BenchError."""
    target = folder / "hitter"
    _gcc("hitter.c", target, "-static", "-no-pie", f"-Wl,-Ttext-segment={PROGRAM_BASE:#x}", "-luring")
    return target


def plugin(folder: Path, version: int) -> Path:
    """The plugin, compiled for a version of QEMU's interface. Raises BenchError."""
    target = folder / "count.so"
    _gcc("count.c", target, "-shared", "-fPIC", "-fvisibility=hidden", f"-DPLUGIN_VERSION={version}")
    return target


def arguments(program: Path, counts: Path) -> list[str]:
    """The plugin's, to count around this program into that file. Raises BenchError."""
    addresses = parse_symbols(output(["nm", program]))
    return [f"out={counts}", *(f"{name}={address:#x}" for name, address in addresses.items())]


def copied(tree: Path, target: Path) -> None:
    """The package of another checkout, with its compiled core. Raises BenchError."""
    package = tree / "tierblk"
    if not list(package.glob("core/_core.*.so")):
        raise BenchError(f"{tree} has no compiled core: run `make setup` there first")
    ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.o", "*.h")
    shutil.copytree(package, target / "tierblk", ignore=ignored)


def measure(
    tree: Path | None, build_dir: Path, loads: where.Loads, *, quick: bool, trace: bool = False
) -> Result:
    """The tierblk of `tree` (default: of this checkout), beside this checkout's null server and the kernel's
    loop. Raises BenchError."""
    try:
        host.install(host.VM_PACKAGES)
        null_server = null.compiled(build_dir)
    except Failed as failure:
        raise BenchError(str(failure)) from None
    except subprocess.CalledProcessError as error:
        raise BenchError(f"the null server does not compile (status {error.returncode})") from None
    with temporary(SECTION) as folder:
        inside, counts = folder / "inside", folder / "counts"
        shutil.copytree(HERE, inside / "bench", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(null_server, inside / "null.so")
        version = plugin_version(output(["qemu-system-x86_64", "--version"]))
        asks = arguments(hitter(inside), counts)
        words = (["--quick"] if quick else []) + (["--trace"] if trace else [])
        if tree:
            copied(tree, inside / "other")
            words += ["--other", f"{GUEST}/other"]
        # QEMU reads a comma as the next argument, unless there are two.
        counter = ",".join(word.replace(",", ",,") for word in [str(plugin(folder, version)), *asks])
        text = _in_vm(folder, inside, counter, words, loads)
        found = parse_counts(counts.read_text())
    result = Result.from_json(text)
    answers, result.samples = result.samples, []
    result.samples = divided(answers, found)
    result.facts = facts(answers, found)
    return result


def _in_vm(folder: Path, inside: Path, counter: str, words: Sequence[str], loads: where.Loads) -> str:
    """What `bench.counted` wrote, run with these words in a VM that has what is `inside`. `counter`: the
    plugin with its arguments."""
    disk, result = folder / "benchtree.ext4", folder / "benchresult"
    disks.ext4_of(inside, disk, DISK_BYTES)
    with open(result, "wb") as file:
        file.truncate(where.RESULT_BYTES)
    tools = [
        "--result",
        "/run/disks/benchresult",
        "--null",
        f"{GUEST}/null.so",
        "--hitter",
        f"{GUEST}/hitter",
    ]
    job = f"mkdir {GUEST} && mount -o ro /run/disks/benchtree {GUEST} && cd {GUEST} && "
    job += shlex.join(["python3", "-m", "bench", "counted", *tools, *words])
    vm: list[str | Path] = [sys.executable, where.VM / "run.py", "--kernel", "new", "--plugin", counter]
    vm += ["--timeout-s", str(where.VM_LIMIT_S), "--disk", f"{disk}:ro", "--disk", str(result), "--", job]
    status = loads.run(vm)
    text = result.read_bytes().rstrip(b"\0").decode(errors="replace")
    if status or not text:
        raise BenchError(f"the counting in the VM ended with status {status}; what it said is above")
    return text
