"""A daemon at one moment, as monitoring asks for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tierblk.latency import Latencies


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a layer that is open is fetched from. shown: its address without what is secret in it; state and
    counters: see Health and FetchCounters of tierblk.remote."""

    layer_id: int
    shown: str
    state: str
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """info, devices: as control.DaemonApi gives them. latencies: by device and tier, all in ticks of one
    length, which stays the same as long as the daemon runs."""

    info: Mapping[str, Any]
    devices: Sequence[Mapping[str, Any]]
    latencies: Mapping[str, Mapping[str, Latencies]]
    remotes: Sequence[Remote] = ()
