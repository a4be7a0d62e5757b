"""A repair by the daemon that serves the directory."""

from __future__ import annotations

from typing import Any, cast

from tierblk.cache import LayerRecord
from tierblk.cli.repairing import _by_daemon

IMAGE = LayerRecord(3, "base", "http://images.example/a.raw", 1 << 20, 'etag:"a"', 0)


class Busy:
    """In the place of a daemon that has pages of block 7 in use."""

    def devices(self) -> list[dict[str, Any]]:
        return []

    def request(self, method: str, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert (method, path, body["layer_id"]) == ("POST", "/v1/cache/drop", 3)
        dropped = sum(mask.bit_count() for block, mask in body["pages"] if block != 7)
        return {"layer_id": 3, "dropped_pages": dropped, "busy_blocks": [7]}


def test_what_is_in_use_is_said_to_be_as_bad_as_before() -> None:
    seen = list[int]()
    done = _by_daemon(cast(Any, Busy()), [IMAGE], [(3, 7, 0b11), (3, 8, 0b111)], seen.append)
    assert (done.pages, done.left, done.left_pages) == (3, [(3, 7, 0b11)], 2)
    assert "in use" in done.reasons[0]
    assert sum(seen) == 5
