"""Which of a door's counters a device's document has. Pure."""

from __future__ import annotations

SHOWN_STATS = (
    "hit_bytes",
    "zero_bytes",
    "miss_bytes",
    "requests",
    "hit_requests",
    "zero_requests",
    "miss_requests",
    "errors",
    "slot_errors",
    "active",
    "waiting",
    "oldest_wait_ms",
    "enters",
    "bounced",
    "memory_requests",
    "write_requests",
    "write_bytes",
    "partial_writes",
    "space_waits",
    "paced",
    "yielded",
    "flush_requests",
    "flush_records",
    "flush_commits",
    "discard_requests",
    "discard_bytes",
)
