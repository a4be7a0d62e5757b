"""On which kernel the benchmark runs: this machine's own when it has ublk, else the one that an environment
variable names, else a VM's. And whoever it is, how the results come back."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench import null
from bench.fio import BenchError
from bench.process import output
from bench.results import Result

REPO = Path(__file__).resolve().parents[1]
VM = REPO / "packaging" / "vm"
KERNEL_VARIABLE = "TIERBLK_BENCH_KERNEL"
DISK_VARIABLE = "TIERBLK_BENCH_DISK"
PACKAGES = ["fio", "nbdkit", "nbd-client", "nginx-light", "curl", "qemu-utils", "qemu-block-extra"]
LIMIT_S = 3600.0
TICK_S = 2.0
VM_LIMIT_S = 3000
RESULT_BYTES = 16 << 20

sys.path.insert(0, str(VM))

from tiervm import disks, host  # noqa: E402  (found by the line above)
from tiervm.paths import temporary  # noqa: E402
from tiervm.say import Failed  # noqa: E402


@dataclass(frozen=True)
class Kernel:
    """`how`: own, runner or vm. `words`: the same for people."""

    how: str
    words: str


def choose() -> Kernel:
    """The first that there is."""
    if os.geteuid() == 0 and not os.path.exists("/dev/ublk-control"):
        with suppress(BenchError):
            output(["modprobe", "-q", "ublk_drv"])
    if os.path.exists("/dev/ublk-control"):
        return Kernel("own", "this machine's own kernel")
    if os.environ.get(KERNEL_VARIABLE):
        return Kernel("runner", f"the kernel that {KERNEL_VARIABLE} names")
    return Kernel("vm", "a VM with Debian's newest kernel")


def install() -> None:
    """Debian's packages of the peers, those that are missing. Raises BenchError."""
    try:
        host.install(PACKAGES)
    except Failed as failure:
        raise BenchError(str(failure)) from None


class Loads:
    """Runs a command, shows that it lives, and notes the machine's load average meanwhile."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def run(self, command: Sequence[str | Path], watched: Path | None = None) -> int:
        """Its exit status; stdout goes to stderr. The last line of `watched`, a file, is shown as it
        changes."""
        shown = ""
        began_s = time.monotonic()
        with subprocess.Popen([str(word) for word in command], cwd=REPO, stdout=sys.stderr) as process:
            try:
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        return process.wait(TICK_S)
                    self.taken.append(os.getloadavg()[0])
                    line = _last_line(watched)
                    if line and line != shown:
                        sys.stderr.write(f"{line}\n")
                        shown = line
                    if time.monotonic() - began_s > LIMIT_S:
                        raise BenchError(f"the benchmark did not end within {LIMIT_S:.0f} s")
            except BaseException:
                process.terminate()
                raise


def _last_line(path: Path | None) -> str:
    if path is None or not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return lines[-1] if lines else ""


def _module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "bench", name, *words]


def here(part: str, out: Path, *, quick: bool, loads: Loads) -> Result:
    """A part that needs no ublk (native, cold), measured by a process of its own on this machine. Raises
    BenchError."""
    words = ["--result", str(out), *(["--quick"] if quick else [])]
    if loads.run(_module(part, *words)):
        raise BenchError(f"the {part} part failed; what it said is above")
    return Result.from_json(out.read_text())


def under(kernel: Kernel, out: Path, sections: Sequence[str], *, quick: bool, loads: Loads) -> Result:
    """These sections, which need ublk, on that kernel. Raises BenchError."""
    flags = [*(["--quick"] if quick else []), *sections]
    try:
        server = null.compiled(out.parent)
    except subprocess.CalledProcessError as error:
        raise BenchError(f"the null server does not compile (status {error.returncode})") from None
    if kernel.how == "vm":
        return _in_vm(out, server, flags, loads)
    progress = out.with_suffix(".progress")
    progress.unlink(missing_ok=True)
    disk = os.environ.get(DISK_VARIABLE) or (str(out.parent) if kernel.how == "own" else "")
    words = ["--result", str(out), "--null", str(server), *flags, *(["--disk", disk] if disk else [])]
    runner = shlex.split(os.environ[KERNEL_VARIABLE]) if kernel.how == "runner" else []
    if kernel.how == "own" and os.geteuid() != 0:
        raise BenchError("making ublk devices needs root")
    # A runner's console may be buffered, so what happens there is read from a file.
    watched = ["--progress", str(progress)] if runner else []
    status = loads.run([*runner, *_module("inside", *words, *watched)], progress if runner else None)
    progress.unlink(missing_ok=True)
    if status or not out.exists():
        raise BenchError(
            f"the benchmark under {kernel.words} ended with status {status}; what it said is above"
        )
    return Result.from_json(out.read_text())


def _in_vm(out: Path, server: Path, flags: list[str], loads: Loads) -> Result:
    """The VM gets this folder and the compiled null server on a disk, and writes its result on another."""
    with temporary("bench") as folder:
        tree = folder / "tree"
        (tree / "bench").mkdir(parents=True)
        for path in [*(REPO / "bench").glob("*.py"), *(REPO / "bench").glob("*.fio")]:
            (tree / "bench" / path.name).write_bytes(path.read_bytes())
        (tree / "null.so").write_bytes(server.read_bytes())
        disk = folder / "benchtree.ext4"
        disks.ext4_of(tree, disk, 16 << 20)
        result = folder / "benchresult"
        with open(result, "wb") as file:
            file.truncate(RESULT_BYTES)
        inside = [
            "python3",
            "-m",
            "bench",
            "inside",
            "--result",
            "/run/disks/benchresult",
            "--null",
            "/run/bench/null.so",
            "--disk",
            "/cache",
            *flags,
        ]
        job = "mkdir /run/bench && mount -o ro /run/disks/benchtree /run/bench && cd /run/bench && "
        job += shlex.join(inside)
        vm: list[str | Path] = [sys.executable, VM / "run.py", "--kernel", "new", "--mem", "3G"]
        vm += ["--timeout-s", str(VM_LIMIT_S), "--disk", f"{disk}:ro", "--disk", str(result), "--", job]
        status = loads.run(vm)
        text = result.read_bytes().rstrip(b"\0").decode(errors="replace")
    if status or not text:
        raise BenchError(f"the benchmark in the VM ended with status {status}; what it said is above")
    out.write_text(text)
    return Result.from_json(text)
