"""Looks at this machine for everything that tierblk needs, and says how to fix what is missing.

With --json: {"ok": bool, "checks": [{"name", "state", "message", "fix"}]}, state being ok, warn or fail.
The exit code is 7 if a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses

from tierblk.cli.arguments import add_json, add_timeout
from tierblk.cli.checks import run_checks
from tierblk.cli.output import put, put_json
from tierblk.errors import DeviceError

NAME = "doctor"
HELP = "look for what this machine lacks"
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but the common ones."""
    add_json(parser)
    add_timeout(parser, 2.0)


def run(args: argparse.Namespace) -> int:
    """Prints a line a check."""
    checks = run_checks(args.timeout_s)
    failed = any(check.state == "fail" for check in checks)
    if args.json:
        put_json({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        for check in checks:
            put(f"{MARKS[check.state]}  {check.name}: {check.message}")
            if check.fix:
                put(f"      fix: {check.fix}")
    return DeviceError.exit_code if failed else 0
