"""Benchmarks of tierblk, beside its peers.

    python3 -m bench               measures, prints the tables, keeps everything in build/bench/DATE.json
    python3 -m bench cold [PART]…  only the cold reads: random, stream, other (or those that are named)
    python3 -m bench instructions  only the instructions a hit; --tree DIR: of another checkout's tierblk
    python3 -m bench show FILE     prints the tables of a kept result; --plot PICTURE draws its ratios
    python3 -m bench compare A B   says which ratios changed beyond noise from A to B

docs/benchmarks.md says what is measured, where, and what the figures are good for.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

from bench import report
from bench.fio import BenchError
from bench.process import Progress, output
from bench.results import Result, compare, load_summary

REPO = Path(__file__).resolve().parents[1]
QUICK_VARIABLE = "TIERBLK_BENCH_QUICK"
ONLY_VARIABLE = "TIERBLK_BENCH_ONLY"
HERE = ("native", "cold")
"""Parts that need no ublk."""
INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb")
    for name in ("inside", "native"):  # what `run` starts, on the kernel that it found and here
        part = verbs.add_parser(name)
        part.add_argument("--result", type=Path, required=True)
        part.add_argument("--quick", action="store_true")
        part.add_argument("--progress", type=Path)
        part.add_argument("--disk")
        part.add_argument("--null", type=Path)
        part.add_argument("sections", nargs="*")
    cold = verbs.add_parser("cold")
    cold.add_argument("--quick", action="store_true")
    cold.add_argument("--result", type=Path)
    cold.add_argument("parts", nargs="*", help="random, stream, other; default: all")
    counting = verbs.add_parser("instructions")
    counting.add_argument("--quick", action="store_true")
    counting.add_argument(
        "--tree", type=Path, help="a checkout whose tierblk is measured instead of this one's"
    )
    counting.add_argument("--trace", action="store_true", help="also while `tierblk trace` looks")
    counted = verbs.add_parser("counted")  # what `instructions` starts in its VM
    counted.add_argument("--result", type=Path, required=True)
    counted.add_argument("--quick", action="store_true")
    counted.add_argument("--trace", action="store_true")
    for name in ("null", "hitter", "other"):
        counted.add_argument(f"--{name}", type=Path)
    showing = verbs.add_parser("show")
    showing.add_argument("file", type=Path)
    showing.add_argument("--plot", type=Path, help="draws the ratios into this file, .svg or .png")
    comparing = verbs.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    return parser


def _load(path: Path) -> Result:
    try:
        return Result.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from None


def _commit(tree: Path = REPO) -> str:
    """What is measured: the commit, with a plus when files differ from it."""
    words = ["git", "-C", str(tree), "describe", "--always", "--dirty=+", "--abbrev=9"]
    try:
        return output(words).strip()
    except BenchError:  # no git, or no repository
        return "unknown"


def _empty(plan_settings: dict[str, object]) -> Result:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%SZ")
    return Result(date=now, commit="", kernel={}, settings=dict(plan_settings))


def _write(result: Result, path: Path) -> None:
    """To a file, or onto a disk of a VM, which keeps its length."""
    with open(path, "wb") as file:
        file.write(result.to_json().encode())
        file.flush()
        os.fsync(file.fileno())


def _part(options: argparse.Namespace) -> None:
    from bench import inside, native
    from bench.plan import Plan

    plan = Plan.quick() if options.quick else Plan()
    result = _empty(vars(plan))
    progress = Progress(options.progress)
    if options.verb == "inside":
        inside.measure(plan, result, options.disk, options.null, progress, options.sections)
    else:
        native.measure(plan, result, options.result.resolve().parent, progress)
    _write(result, options.result)


def _cold(options: argparse.Namespace) -> None:
    from bench import cold

    if unknown := set(options.parts) - set(cold.PARTS):
        raise BenchError(f"there is no part {min(unknown)}; the parts are {', '.join(cold.PARTS)}")
    plan = cold.Plan.quick() if options.quick else cold.Plan()
    result = _empty(vars(plan))
    result.commit = _commit()
    where = "this machine, in-process door"
    result.kernel = {"release": os.uname().release, "where": where, "cpus": os.cpu_count(), "plane": "none"}
    build_dir = REPO / "build" / "bench"
    build_dir.mkdir(parents=True, exist_ok=True)
    cold.measure(plan, result, build_dir, Progress(), options.parts or cold.PARTS)
    kept = options.result or build_dir / f"{result.date}-cold.json"
    _write(result, kept)
    if options.result is None:
        sys.stdout.write(report.table(result))
        sys.stderr.write(f"kept as {kept.relative_to(REPO)}\n")


def _counted(options: argparse.Namespace) -> None:
    from bench import counted

    plan = counted.Plan.quick() if options.quick else counted.Plan()
    result = _empty({"rounds": plan.rounds})
    tools = counted.Tools(options.null, options.hitter, options.other, options.trace)
    counted.measure(plan, result, tools, Progress())
    _write(result, options.result)


def _instructions(options: argparse.Namespace) -> None:
    from bench import instructions, where

    build_dir = REPO / "build" / "bench"
    build_dir.mkdir(parents=True, exist_ok=True)
    quick = options.quick or os.environ.get(QUICK_VARIABLE, "") not in ("", "0")
    loads = where.Loads()
    result = instructions.measure(options.tree, build_dir, loads, quick=quick, trace=options.trace)
    result.commit = _commit(options.tree or REPO)
    result.kernel["where"] = "a VM that counts instructions"
    result.host_load = load_summary(loads.taken)
    kept = build_dir / f"{result.date}-instructions.json"
    _write(result, kept)
    sys.stdout.write(report.table(result))
    sys.stderr.write(f"kept as {kept.relative_to(REPO)}\n")


def _sections() -> list[str]:
    """What is measured: everything, or what the environment names. Raises BenchError."""
    from bench.inside import SECTIONS

    known = [*HERE, *SECTIONS]
    named = os.environ.get(ONLY_VARIABLE, "").replace(",", " ").split()
    if unknown := set(named) - set(known):
        raise BenchError(f"{ONLY_VARIABLE}: there is no section {min(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in named] if named else known


def _run() -> None:
    from bench import boot, where

    quick = os.environ.get(QUICK_VARIABLE, "") not in ("", "0")
    wanted = _sections()
    kernel = where.choose()
    sys.stderr.write(f"== benchmarks on {kernel.words}\n")
    where.install()
    build_dir = REPO / "build" / "bench"
    build_dir.mkdir(parents=True, exist_ok=True)
    loads = where.Loads()
    part = build_dir / f"part-{os.getpid()}.json"
    try:
        parts = [where.here(name, part, quick=quick, loads=loads) for name in HERE if name in wanted]
        part.unlink(missing_ok=True)
        inside = [name for name in wanted if name not in HERE]
        result = where.under(kernel, part, inside, quick=quick, loads=loads)
    finally:
        part.unlink(missing_ok=True)
    for each in parts:
        result.samples += each.samples
        result.facts |= each.facts
        result.skipped |= each.skipped
    boot.measure(result)
    result.commit = _commit()
    result.kernel |= {"how": kernel.how, "where": kernel.words}
    result.settings["quick"] = quick
    result.host_load = load_summary(loads.taken)
    kept = build_dir / f"{result.date}.json"
    _write(result, kept)
    sys.stdout.write(report.table(result))
    sys.stderr.write(f"kept as {kept.relative_to(REPO)}\n")
    _draw(result, kept.with_suffix(".svg"))


def _draw(result: Result, path: Path) -> None:
    """A picture, if that can be made; if not, a sentence."""
    from bench import plot

    try:
        plot.draw(result, path)
    except (BenchError, OSError, ValueError) as failure:
        sys.stderr.write(f"bench: {failure}\n")
    else:
        sys.stderr.write(f"drawn as {path}\n")


def main() -> int:
    """The command line; a failure is one sentence on stderr."""
    options = _parser().parse_args()
    try:
        if options.verb in ("inside", "native"):
            _part(options)
        elif options.verb == "cold":
            _cold(options)
        elif options.verb == "counted":
            _counted(options)
        elif options.verb == "instructions":
            _instructions(options)
        elif options.verb == "show":
            result = _load(options.file)
            sys.stdout.write(report.table(result))
            if options.plot:
                _draw(result, options.plot)
        elif options.verb == "compare":
            sys.stdout.write(report.changes(compare(_load(options.before), _load(options.after))))
        else:
            _run()
    except BenchError as failure:
        sys.stderr.write(f"bench: {failure}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("bench: interrupted\n")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
