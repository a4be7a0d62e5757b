"""Runs one of the tortures; exits with 1 when anything was wrong. Needs root and a kernel with ublk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.torture import cuts, kills, reads
from tests.torture.rig import put_summary, say


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    where = {} if options.run == "cuts" else {"folder": options.folder, "images": options.images}
    if options.run == "reads":
        faults = reads.FAULTS if options.faults is None else options.faults
        summary = reads.run(
            reads.Reads(options.seed, options.count, options.image_mib, options.threads, faults, **where)
        )
    elif options.run == "cuts":
        summary = cuts.go(cuts.Cuts(options.seed, options.count, options.folder))
    else:
        rounds = {kind: getattr(options, kind) for kind in kills.KINDS}
        summary = kills.run(
            kills.Kills(options.seed, rounds, options.image_mib, options.threads, options.keeper, **where)
        )
    put_summary(summary, options.json)
    for sentence in summary["wrong"]:
        say(f"WRONG: {sentence}")
    return 1 if summary["wrong"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.torture", description=__doc__)
    runs = parser.add_subparsers(dest="run", required=True)
    for name, text in (("reads", reads.__doc__), ("kills", kills.__doc__)):
        run = runs.add_parser(name, help=text, description=text)
        run.add_argument("--seed", type=int, default=1)
        run.add_argument("--image-mib", type=int, default=192)
        run.add_argument("--threads", type=int, default=8)
        run.add_argument(
            "--folder", type=Path, default=Path("/cache/torture"), help="made, and removed afterwards"
        )
        run.add_argument("--images", type=Path, default=Path("/srv"), help="a folder for the image")
        run.add_argument("--json", type=Path, help="the summary goes there too")
    run = runs.add_parser("cuts", help=cuts.__doc__, description=cuts.__doc__)
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--count", type=int, default=200)
    run.add_argument("--folder", type=Path, default=Path("/cache/cuts"), help="made, and removed afterwards")
    run.add_argument("--json", type=Path, help="the summary goes there too")
    runs.choices["reads"].add_argument("--count", type=int, default=5000)
    runs.choices["reads"].add_argument(
        "--faults", help="for tests.faults; default: all that heal by themselves"
    )
    runs.choices["kills"].add_argument(
        "--no-keeper", dest="keeper", action="store_false", help="an attach starts each next daemon"
    )
    for kind, text in kills.KINDS.items():
        runs.choices["kills"].add_argument(f"--{kind}", type=int, default=1, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
