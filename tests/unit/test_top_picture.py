"""docs/top.svg is what `make picture` draws now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_picture_in_the_docs_is_what_the_screen_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "top.svg"
    command = [sys.executable, "-m", "bench.top", "picture", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, env=os.environ | {"TZ": "Asia/Tokyo"})
    kept = (ROOT / "docs" / "top.svg").read_text()
    assert path.read_text() == kept, "run `make picture`"
    assert "font-face" not in kept
