"""The command line: one file a verb."""

from __future__ import annotations

from tierblk.cli.entry import main

__all__ = ["main"]
