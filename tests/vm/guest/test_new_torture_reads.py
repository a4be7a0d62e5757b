"""The torture of tests/torture that reads, short: a server that fails. Which kernel asks is nothing to it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.torture import reads


def test_no_wrong_byte_from_a_server_that_fails_with_a_cache_a_tenth_of_the_image(scratch: Path) -> None:
    """Buffered and direct, of every size and alignment, by eight threads at once (I1, I6)."""
    summary = reads.run(reads.Reads(seed=41, count=2000, image_mib=160, folder=scratch / "torture"))
    assert not summary["wrong"], "\n".join([*summary["wrong"], json.dumps(summary, indent=1)])
    assert sum(summary["server"]["faults"].values()) > 50, "the faults came"
    assert summary["daemon"]["cache"]["evicted"] > 100, "blocks came and went"
