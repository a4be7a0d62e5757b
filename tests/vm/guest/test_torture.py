"""The tortures of tests/torture, short: a server that fails, and a daemon that dies in every way."""

from __future__ import annotations

import json
from pathlib import Path

from tests.torture import kills, reads


def test_no_wrong_byte_from_a_server_that_fails_with_a_cache_a_tenth_of_the_image(scratch: Path) -> None:
    """Buffered and direct, of every size and alignment, by eight threads at once (I1, I6)."""
    summary = reads.run(reads.Reads(seed=41, count=2000, image_mib=160, folder=scratch / "torture"))
    assert not summary["wrong"], "\n".join([*summary["wrong"], json.dumps(summary, indent=1)])
    assert sum(summary["server"]["faults"].values()) > 50, "the faults came"
    assert summary["daemon"]["cache"]["evicted"] > 100, "blocks came and went"


def test_a_daemon_that_dies_in_every_way_under_load_is_not_noticed(scratch: Path) -> None:
    """Killed, replaced, frozen and killed, out of memory: no error, and nothing fetched twice (R1, I11)."""
    rounds = dict.fromkeys(kills.KINDS, 1)
    summary = kills.run(kills.Kills(seed=42, rounds=rounds, image_mib=32, folder=scratch / "torture"))
    assert not summary["wrong"], "\n".join([*summary["wrong"], json.dumps(summary, indent=1)])
    assert summary["rounds"] == rounds
