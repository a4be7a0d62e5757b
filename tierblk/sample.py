"""What a daemon counts and holds at one moment, as `tierblk top` asks for it: two of these make a picture of
the time between them. All of it belongs to the event loop.

Counters only grow while a daemon lives. They are raw, and stamped with the daemon's own monotonic clock, so
that a late answer makes no wrong rate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from tierblk.latency import Latencies
from tierblk.layer import Filled
from tierblk.stacks import Stacks


def document(
    info: Mapping[str, Any],
    devices: Sequence[dict[str, Any]],
    latencies: Mapping[str, Mapping[str, Latencies]],
    tick_s: float,
    throttle: dict[str, Any] | None,
    remotes: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """{"unix_s", "monotonic_s", "daemon", "cache", "devices", "remotes"}, for JSON.

    info: Daemon.info; its cache is told apart, and has "throttle" added, see Upkeep.throttle. devices: as
    `status` shows them. latencies: of those that are served, by name and tier; a tick of them is tick_s."""
    return {
        "unix_s": time.time(),
        "monotonic_s": time.monotonic(),
        "daemon": {key: value for key, value in info.items() if key != "cache"},
        "cache": {**info.get("cache", {}), "throttle": throttle},
        "devices": [
            {**device, "tick_s": tick_s, "latency_counts": _by_tier(latencies.get(device["name"], {}))}
            for device in devices
        ],
        "remotes": list(remotes),
    }


def _by_tier(latencies: Mapping[str, Latencies]) -> dict[str, list[int]]:
    """Without the zeros at the end, which are most of them."""
    shown = {}
    for tier, found in latencies.items():
        empty = sum(1 for _ in takewhile(lambda count: not count, reversed(found.counts)))
        shown[tier] = list(found.counts[: len(found.counts) - empty])
    return shown


def remotes(stacks: Stacks) -> list[dict[str, Any]]:
    """What is fetched from, and written to: {"kind": "image" or "store", "url", "devices", as Health "state"
    to "waiting", "in_flight", "fetched_bytes", "requests", "retries", "errors"}."""
    shown = [
        _remote("image", base.image.identity.shown, sorted(base.patiences), base)
        for base in stacks.bases.by_layer.values()
    ]
    for far in stacks.volumes.by_layer.values():
        remote = _remote("store", far.shown, [far.name], far)
        trouble = stacks.volumes.store_trouble(far)
        shown.append({**remote, **trouble} if trouble and remote["state"] == "ok" else remote)
    return shown


def _remote(kind: str, url: str, devices: list[str], layer: Filled) -> dict[str, Any]:
    counters = layer.fetcher.counters
    return {
        "kind": kind,
        "url": url,
        "devices": devices,
        **layer.health(),
        "in_flight": counters.in_flight,
        "fetched_bytes": counters.fetched_bytes,
        "requests": counters.requests,
        "retries": counters.retries,
        "errors": counters.errors,
    }
