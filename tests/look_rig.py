"""Commands that look into a cache directory, as processes of their own: LMDB allows one look a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tierblk.rundir import RUN_DIR_VARIABLE

TIMEOUT_S = 60.0


def cache_command(run_dir: Path, *arguments: str | Path, code: int = 0) -> bytes:
    """What `tierblk cache ...` printed; it has to end with that code."""
    done = subprocess.run(
        [sys.executable, "-m", "tierblk", "cache", *map(str, arguments)],
        capture_output=True,
        check=False,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env={**os.environ, RUN_DIR_VARIABLE: str(run_dir)},
    )
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def cache_json(run_dir: Path, *arguments: str | Path, code: int = 0) -> Any:
    """The document that it printed."""
    return json.loads(cache_command(run_dir, *arguments, "--json", code=code))
