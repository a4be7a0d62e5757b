"""Prints a script that completes tierblk's commands and options in a shell.

tierblk completion bash > /etc/bash_completion.d/tierblk
"""

from __future__ import annotations

import argparse

from tierblk.errors import TierblkError

NAME = "completion"
HELP = "print a completion script for a shell"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHELL."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="for which shell")


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    try:
        import shtab
    except ImportError:
        raise TierblkError("completion needs the shtab package", "pip install tierblk[completion]") from None
    from tierblk.cli.entry import make_parser

    print(shtab.complete(make_parser(), args.shell))
    return 0
