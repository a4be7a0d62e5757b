"""The one main(): parses the command line, runs a verb, and turns errors into sentences and exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import tierblk


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tierblk", description=tierblk.__doc__)
    parser.add_argument("--version", action="version", version=f"tierblk {tierblk.__version__}")
    parser.parse_args(argv)
    return 0
