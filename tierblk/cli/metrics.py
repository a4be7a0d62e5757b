"""Prints what running daemons count, in Prometheus' text format.

For node_exporter's textfile collector, or to look at; with daemon.metrics in its config a daemon can be
asked by Prometheus itself. Each sample has the label cache_dir.
"""

from __future__ import annotations

import argparse

from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import Daemon, ask_all, same_directory
from tierblk.cli.output import complain, put, put_json, say
from tierblk.errors import DaemonError, TierblkError

NAME = "metrics"
HELP = "print what there is to count, for Prometheus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The common ones."""
    add_cache_dir(parser, "only of the daemon of this cache directory")
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Prints all of it at once, or nothing of a daemon that does not answer."""
    texts: dict[str, str] = {}
    failed: TierblkError | None = None

    def wanted(cache_dir: str) -> bool:
        return args.cache_dir is None or same_directory(cache_dir, args.cache_dir)

    def ask(daemon: Daemon) -> tuple[str, str] | None:
        if "cache_dir" in daemon.info and not wanted(daemon.cache_dir):
            return None  # if it hangs, so be it
        cache_dir = str(daemon.get("/v1/daemon").get("cache_dir"))
        return (cache_dir, daemon.text("/metrics")) if wanted(cache_dir) else None

    for _, answer, error in ask_all(ask, args.timeout_s):
        if error:
            complain(error)
            failed = error
        elif answer:
            texts[answer[0]] = answer[1]
    if not texts and args.cache_dir is not None and not failed:
        raise DaemonError(f"no daemon serves {args.cache_dir}", "`tierblk attach CONFIG` starts one")
    from tierblk import metrics

    try:
        found = metrics.merged(texts)
    except ValueError as error:
        raise DaemonError(f"a daemon gave an answer that is not understood: {error}") from None
    if args.json:
        put_json(metrics.document_of(found))
    elif texts:
        put(metrics.text_of(found).rstrip("\n"))
    elif not failed:
        say("no daemon is running")
    return failed.exit_code if failed else 0
