"""The torture of tests/torture that kills, short: a daemon that dies in every way."""

from __future__ import annotations

import json
from pathlib import Path

from tests.torture import kills


def test_a_daemon_that_dies_in_every_way_under_load_is_not_noticed(scratch: Path) -> None:
    """Killed, replaced, frozen and killed, out of memory: no error, and nothing fetched twice (R1, I11)."""
    rounds = dict.fromkeys(kills.KINDS, 1)
    summary = kills.run(kills.Kills(seed=42, rounds=rounds, image_mib=32, folder=scratch / "torture"))
    assert not summary["wrong"], "\n".join([*summary["wrong"], json.dumps(summary, indent=1)])
    assert summary["rounds"] == rounds
