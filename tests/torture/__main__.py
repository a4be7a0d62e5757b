"""Runs one of the tortures; exits with 1 when anything was wrong. All but consistency need
root and a kernel with ublk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.torture import consistency, cuts, databases, kills, reads
from tests.torture.rig import put_summary, say


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    where = {"folder": options.folder, "images": options.images} if options.run in ("reads", "kills") else {}
    if options.run == "reads":
        faults = reads.FAULTS if options.faults is None else options.faults
        summary = reads.run(
            reads.Reads(options.seed, options.count, options.image_mib, options.threads, faults, **where)
        )
    elif options.run == "cuts":
        summary = cuts.go(cuts.Cuts(options.seed, options.count, options.folder))
    elif options.run == "consistency":
        summary = consistency.run(consistency.Consistency(options.seed, options.count, options.folder))
    elif options.run == "databases":
        names = tuple(options.only or databases.NAMES)
        summary = databases.go(
            databases.Databases(options.seed, options.count, options.folder, options.plane, names)
        )
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
    for name, text, count in (
        ("cuts", cuts.__doc__, 200),
        ("databases", databases.__doc__, 50),
        ("consistency", consistency.__doc__, 200),
    ):
        run = runs.add_parser(name, help=text, description=text)
        run.add_argument("--seed", type=int, default=1)
        run.add_argument("--count", type=int, default=count)
        where = Path("/cache") / name
        run.add_argument("--folder", type=Path, default=where, help="made, and removed afterwards")
        run.add_argument("--json", type=Path, help="the summary goes there too")
    runs.choices["consistency"].set_defaults(folder=Path("/tmp/tierblk-consistency"))
    runs.choices["databases"].add_argument("--plane", default="auto")
    runs.choices["databases"].add_argument("--only", choices=databases.NAMES, action="append")
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
