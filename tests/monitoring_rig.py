"""A daemon as monitoring sees it, with every number at hand: two devices, an image, a volume in object
storage. It goes on a little each time that it is asked, and can be ill in every way at once."""

from __future__ import annotations

import time
from typing import Any

from tierblk.latency import TIERS, Latencies, by_tier
from tierblk.snapshot import Remote, Snapshot

IMAGE, VOLUME = "http://images.example/debian.raw?…", "s3://bucket/volumes/web"
TICK_S = 1e-9
_COUNTED = (
    *("requests", "hit_requests", "hit_bytes", "zero_requests", "zero_bytes", "miss_requests", "miss_bytes"),
    *("memory_requests", "write_requests", "write_bytes", "partial_writes", "flush_requests"),
    *("flush_records", "flush_commits", "discard_requests", "discard_bytes", "paced", "yielded"),
)
_TROUBLES = ("errors", "slot_errors", "space_waits")


class Scripted:
    """Stands for the part of a Daemon that is asked for a snapshot."""

    def __init__(self, *, ill: bool = False) -> None:
        self.ill = ill
        self.asked = 0

    async def snapshot(self) -> Snapshot:
        """The next one."""
        self.asked += 1
        state = "degraded" if self.ill else "ok"
        counters = dict.fromkeys(("requests", "fetched_bytes", "wasted_bytes", "hedges"), 100 * self.asked)
        trouble = self.asked if self.ill else 0
        counters |= {"in_flight": 2, "waiting": 1, "retries": trouble, "errors": trouble}
        remotes = [Remote(1, IMAGE, state, counters)]
        remotes += [Remote(2, VOLUME, "refused" if self.ill else "ok", counters)]
        devices = [self._device("debian"), self._device("web") | {"write_back": self._write_back()}]
        if self.ill:
            devices.append({"name": "lost", "path": "/dev/ublkb7", "state": "failed", "warnings": []})
        return Snapshot(
            self._info(), devices, {name: self._latencies() for name in ("debian", "web")}, remotes
        )

    def _info(self) -> dict[str, Any]:
        ill = self.ill
        failure = {"reason": "no space", "since": time.time() - 60, "final": True}
        layer = {"size_bytes": 2 << 30, "cached_bytes": 1 << 20}
        return {
            "cache_dir": "/var/cache/tierblk",
            "pid": 7,
            "fills": 3,
            "slot_write_failure": "Input/output error" if ill else None,
            "throttle": {"bytes_per_s": 1 << 20, "reason": "upload"} if ill else None,
            "warnings": [],
            "cache": {
                "slots": 1000,
                "free": 100,
                "quarantined": 10,
                "probation": 90,
                "volume_slots": 50,
                "dirty_slots": 20,
                "pinned": 5,
                "bad": 3 if ill else 0,
                "needy": 4 if ill else 0,
                "evicted": 5 * self.asked,
                "fills": 8 * self.asked,
                "slot_writes": 7 * self.asked,
                "passed_blocks": self.asked,
                "slot_write_errors": self.asked if ill else 0,
                "commit_failure": failure if ill else None,
                "layers": [
                    {"layer_id": 1, "kind": "base", "name": None, "url": IMAGE, **layer},
                    {"layer_id": 2, "kind": "write-back", "name": "web", "url": IMAGE, **layer},
                    {"layer_id": 3, "kind": "base", "name": None, "url": "http://old/x", **layer}
                    | {"cached_bytes": 0},
                ],
            },
        }

    def _device(self, name: str) -> dict[str, Any]:
        counted = dict.fromkeys(_COUNTED, 10 * self.asked)
        troubles = dict.fromkeys(_TROUBLES, self.asked if self.ill else 0)
        return {
            "name": name,
            "path": "/dev/ublkb0",
            "plane": "copy",
            "volume": None,
            "url": IMAGE,
            "state": ("fenced" if name == "web" else "gone") if self.ill else "ok",
            "warnings": [],
            **counted,
            **troubles,
            "size_bytes": 2 << 30,
            "active": 2,
            "waiting": 1,
            "queues": 2,
            "queue_depth": 64,
            "oldest_wait_ms": 90_000 if self.ill else 12,
            "hot_memory_bytes": 0,
            "attached": time.time() - 3600,
        }

    def _write_back(self) -> dict[str, Any]:
        now = time.time()
        return {
            "url": VOLUME,
            "epoch": self.asked,
            "epoch_at": now - 5,
            "dirty_bytes": 1 << 20,
            "dirty_since": now - (7200 if self.ill else 3),
            "uploading": True,
            "epochs": self.asked,
            "put_requests": self.asked,
            "put_bytes": self.asked,
            "held": not self.ill,
            "fenced": "HOST has it" if self.ill else None,
            "trouble": "403" if self.ill else None,
        }

    def _latencies(self) -> dict[str, Latencies]:
        counts = [0] * 160
        counts[60], counts[100] = 99 * self.asked, self.asked
        return by_tier([(counts, 40_000_000 * self.asked)] * len(TIERS), TICK_S)
