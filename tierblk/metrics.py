"""A Snapshot in Prometheus' text format, named by its conventions: base units, `_total` for what only grows,
one meaning a name. docs/operations.md lists what an operator looks at.

Labels: device, the name in its config; layer, its number in the cache directory; remote, an address without
what is secret in it. Nothing else of an address, of a header or of a message gets here."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import InfoMetricFamily as Info
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

import tierblk
from tierblk.extent import BLOCK_BYTES
from tierblk.latency import Latencies, bounds_s
from tierblk.snapshot import Snapshot

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

DEVICE_STATES = (
    "ok",
    "degraded",
    "refused",
    "fenced",
    "starting",
    "recovering",
    "failed",
    "stopping",
    "stopped",
    "handed over",
    "gone",
)
REMOTE_STATES = ("ok", "degraded", "refused")
THROTTLE_REASONS = ("upload", "slots")

Table = Sequence[tuple[str, str, str]]
"""(key, name behind the prefix, what it says)"""

_SLOTS: Table = (
    ("free", "free_slots", "Slots that can be taken at once."),
    ("quarantined", "quarantined_slots", "Freed slots that wait for a commit of the index."),
    ("bad", "bad_slots", "Slots whose place on the disk failed; not used until the next start."),
    ("probation", "probation_slots", "Slots with blocks that nobody has read a second time."),
    ("volume_slots", "volume_slots", "Slots that volumes have, dirty or not."),
    ("dirty_slots", "dirty_slots", "Slots with pages that are nowhere else: never evicted."),
    ("pinned", "pinned_slots", "Slots that a sealed epoch keeps until it is uploaded."),
    ("needy", "waiting_writes", "Writes that wait for a free slot."),
)
_CACHE: Table = (
    ("evicted", "evicted_blocks", "Blocks that were evicted."),
    ("fills", "fills", "Blocks of which something was fetched."),
    ("passed_blocks", "passed_blocks", "Blocks that went to readers and were not kept."),
    ("slot_writes", "slot_writes", "Fetched blocks that were written to the cache's disk."),
    ("slot_write_errors", "slot_write_errors", "Such writes that the cache's disk failed."),
)
_REMOTE: Table = (
    ("requests", "requests", "Requests begun (GETs), retries and second ones included."),
    ("fetched_bytes", "fetched_bytes", "Bytes that arrived."),
    ("wasted_bytes", "wasted_bytes", "Bytes that a second request brought and nobody used."),
    ("retries", "retries", "Requests that continued one that failed or fell silent."),
    ("errors", "errors", "Fetches that were given up."),
    ("hedges", "hedges", "Second requests for slow answers."),
)
_DEVICE: Table = (
    ("requests", "requests", "Requests of every kind that were completed."),
    ("errors", "request_errors", "Requests that ended in an error."),
    ("slot_errors", "slot_errors", "Reads and writes of slots that the cache's disk failed."),
    ("memory_requests", "memory_hits", "Reads that were answered from hot memory; they are hits too."),
    ("write_requests", "write_requests", "Writes completed."),
    ("write_bytes", "written_bytes", "Bytes written to the device."),
    ("partial_writes", "partial_writes", "Writes that began or ended inside a page."),
    ("flush_requests", "flush_requests", "FLUSHes completed."),
    ("flush_records", "flush_records", "Records of the journal made for FLUSHes."),
    ("flush_commits", "flush_commits", "FLUSHes that waited for a commit of the index."),
    ("discard_requests", "discard_requests", "DISCARDs and WRITE_ZEROES completed."),
    ("discard_bytes", "discarded_bytes", "Bytes that they covered."),
    ("paced", "paced_writes", "Writes that were slowed down because few slots were free or much was dirty."),
    ("yielded", "yielded_writes", "Writes that waited for others because reads came between them."),
    ("space_waits", "space_waits", "Writes that had to wait for a free slot."),
)
_READS = ("hit", "zero", "miss")
_LEVELS: Table = (
    ("size_bytes", "size_bytes", "How large it is."),
    ("active", "active_requests", "Requests that are under way."),
    ("waiting", "waiting_requests", "Requests that wait for the remote, for room, or for their turn."),
    ("queues", "queues", "Hardware queues."),
    ("queue_depth", "queue_depth", "Requests that each queue takes at once."),
    ("hot_memory_bytes", "hot_memory_bytes", "Memory that may hold its hottest blocks."),
    ("attached", "attached_timestamp_seconds", "When it was attached."),
)
_EPOCHS: Table = (
    ("epochs", "epochs", "Epochs made since it was attached."),
    ("put_requests", "put_requests", "Requests that uploaded something (PUTs), or tried to."),
    ("put_bytes", "put_bytes", "Bytes that the store has taken."),
)


def exposition(snapshot: Snapshot) -> bytes:
    """All there is to say, for CONTENT_TYPE."""
    return b"".join([*pieces(snapshot, time.time()), process()])


def pieces(snapshot: Snapshot, now_unix_s: float) -> Iterator[bytes]:
    """The same without `process`, in pieces of which each is made in a millisecond or less: many devices have
    thousands of lines, and the event loop has others to serve."""
    last = ""
    for family in families(snapshot, now_unix_s):
        text = generate_latest(_Said([family]))
        # A family is said in one go, under one head.
        yield text.split(b"\n", 2)[2] if family.name == last else text
        last = family.name


def process() -> bytes:
    """Memory, CPU and open files of this process, by the names that every exporter has."""
    return generate_latest(ProcessCollector(registry=None))  # in no registry


class _Said(Collector):
    """Stands where the library would have its registry of everything in the process."""

    def __init__(self, said: Sequence[Metric]) -> None:
        self._said = said

    def collect(self) -> Iterator[Metric]:
        yield from self._said


def merged(texts: Mapping[str, str]) -> list[Metric]:
    """Expositions of several daemons, by cache directory, as one: each sample gets the label cache_dir.
    ValueError: one of them is none."""
    found: dict[str, Metric] = {}
    for cache_dir, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples += [s._replace(labels={"cache_dir": cache_dir, **s.labels}) for s in family.samples]
    return list(found.values())


def text_of(said: Sequence[Metric]) -> str:
    """Families as an exposition."""
    return generate_latest(_Said(said)).decode()


def document_of(said: Sequence[Metric]) -> dict[str, Any]:
    """Families as JSON: {"metrics": [{"name", "type", "help", "samples": [{"name", "labels", "value"}]}]}.
    What is no number in JSON is None."""
    return {
        "metrics": [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [
                    {"name": s.name, "labels": s.labels, "value": s.value if isfinite(s.value) else None}
                    for s in family.samples
                ],
            }
            for family in said
        ]
    }


def families(snapshot: Snapshot, now_unix_s: float) -> Iterator[Metric]:
    """Everything but the process itself; one of many samples comes as several of one name."""
    build = {"version": tierblk.__version__, "python": platform.python_version()}
    yield Info("tierblk_build", "The version that runs.", value=build)
    yield from _cache(snapshot.info)
    yield from _layers(snapshot)
    yield from _remotes(snapshot)
    served = [device for device in snapshot.devices if "requests" in device]
    yield from _devices(snapshot.devices, served)
    yield from _volumes(served, now_unix_s)
    yield from _latencies(snapshot.latencies)


# -- the cache directory ---


def _cache(info: Mapping[str, Any]) -> Iterator[Metric]:
    cache: Mapping[str, Any] = info.get("cache") or {}
    yield Info("tierblk_cache", "The cache directory.", value={"path": str(info.get("cache_dir", ""))})
    slots = int(cache.get("slots", 0))
    yield Gauge("tierblk_cache_size_bytes", "The space for cached data.", value=slots * BLOCK_BYTES)
    yield Gauge("tierblk_cache_slots", "The same, in slots of 64 KiB.", value=slots)
    for key, name, what in _SLOTS:
        yield Gauge(f"tierblk_cache_{name}", what, value=cache.get(key, 0))
    for key, name, what in _CACHE:
        yield Counter(f"tierblk_cache_{name}", what, value=cache.get(key, 0))
    yield Gauge(
        "tierblk_cache_fills_in_progress",
        "Blocks that are being fetched or kept.",
        value=info.get("fills", 0),
    )
    failure: Mapping[str, Any] = cache.get("commit_failure") or {}
    what = "1: the last commit of the index failed, so nothing more is recorded."
    yield Gauge("tierblk_cache_commit_failing", what, value=bool(failure))
    what = "1: no commit is tried any more; only a restart of the daemon helps."
    yield Gauge("tierblk_cache_commit_refused", what, value=bool(failure.get("final")))
    what = "1: the cache's disk takes no fetched data at present; reads pass it by."
    yield Gauge("tierblk_cache_slot_writes_failing", what, value=bool(info.get("slot_write_failure")))
    yield from _throttle(info.get("throttle") or {})


def _throttle(throttle: Mapping[str, Any]) -> Iterator[Metric]:
    what = "1: writes are slowed down, by what: the speed of uploads, or that of making room in the cache."
    family = Gauge("tierblk_write_throttled", what, labels=["reason"])
    for reason in THROTTLE_REASONS:
        family.add_metric([reason], throttle.get("reason") == reason)
    yield family
    what = "How much that is new writes may take of the cache each second; +Inf: as much as they like."
    pace = throttle.get("bytes_per_s")
    yield Gauge("tierblk_write_pace_bytes_per_second", what, value=float("inf") if pace is None else pace)


def _layers(snapshot: Snapshot) -> Iterator[Metric]:
    """Of bases and volumes that have something cached, or are open."""
    remotes = {remote.layer_id: remote.shown for remote in snapshot.remotes}
    labels = ["layer", "kind", "volume", "remote"]
    size = Gauge("tierblk_layer_size_bytes", "How large an image or a volume is.", labels=labels)
    cached = Gauge("tierblk_layer_cached_bytes", "How much of it is in the cache.", labels=labels)
    for layer in (snapshot.info.get("cache") or {}).get("layers", ()):
        if not layer["cached_bytes"] and layer["layer_id"] not in remotes:
            continue
        shown = layer["url"] if layer["kind"] == "base" else remotes.get(layer["layer_id"])
        values = [str(layer["layer_id"]), layer["kind"], layer["name"] or "", shown or ""]
        size.add_metric(values, layer["size_bytes"])
        cached.add_metric(values, layer["cached_bytes"])
    yield from (size, cached)


def _remotes(snapshot: Snapshot) -> Iterator[Metric]:
    labels = ["layer", "remote"]
    what = (
        "1 for the state that it is in. degraded: no answer; refused: a final one, such as another version."
    )
    state = Gauge("tierblk_remote_state", what, labels=[*labels, "state"])
    flying = Gauge("tierblk_remote_active_requests", "Requests that are under way.", labels=labels)
    waiting = Gauge("tierblk_remote_waiting_fetches", "Fetches that wait for their turn.", labels=labels)
    counters = [(key, Counter(f"tierblk_remote_{name}", what, labels=labels)) for key, name, what in _REMOTE]
    for remote in snapshot.remotes:
        values = [str(remote.layer_id), remote.shown]
        for known in REMOTE_STATES:
            state.add_metric([*values, known], remote.state == known)
        flying.add_metric(values, remote.counters.get("in_flight", 0))
        waiting.add_metric(values, remote.counters.get("waiting", 0))
        for key, family in counters:
            family.add_metric(values, remote.counters.get(key, 0))
    yield from (state, flying, waiting, *(family for _, family in counters))


# -- devices ---


def _devices(known: Sequence[Mapping[str, Any]], served: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """known: those that wait for this daemon to take them over too, of which nobody counts anything."""
    labels = ["device", "path", "plane", "volume", "remote"]
    info = Gauge("tierblk_device_info", "What there is, always 1.", labels=labels)
    state = Gauge("tierblk_device_state", "1 for the state that it is in.", labels=["device", "state"])
    for device in known:
        texts = [str(device.get(key) or "") for key in ("name", "path", "plane", "volume", "url")]
        info.add_metric(texts, 1)
        for each in DEVICE_STATES:
            state.add_metric([texts[0], each], device.get("state") == each)
    yield from (info, state)
    for key, name, what in _LEVELS:
        yield _of_each(Gauge(f"tierblk_device_{name}", what, labels=["device"]), served, key)
    oldest = Gauge(
        "tierblk_device_oldest_wait_seconds", "How long the first of those has waited.", labels=["device"]
    )
    for device in served:
        oldest.add_metric([device["name"]], device.get("oldest_wait_ms", 0) / 1000)
    yield oldest
    for key, name, what in _DEVICE:
        yield _of_each(Counter(f"tierblk_device_{name}", what, labels=["device"]), served, key)
    what = "by where the answer came from: the cache, known zeros, the remote"
    for unit, name in (("requests", "read_requests"), ("bytes", "read_bytes")):
        family = Counter(
            f"tierblk_device_{name}", f"{name[5:].title()} of reads, {what}.", labels=["device", "tier"]
        )
        for device in served:
            for tier in _READS:
                family.add_metric([device["name"], tier], device.get(f"{tier}_{unit}", 0))
        yield family


def _of_each(family: Any, devices: Sequence[Mapping[str, Any]], key: str) -> Metric:
    for device in devices:
        family.add_metric([device["name"]], device.get(key) or 0)
    filled: Metric = family
    return filled


def _volumes(served: Sequence[Mapping[str, Any]], now_unix_s: float) -> Iterator[Metric]:
    """Those in object storage, by the device that shows each."""
    found = [(device["name"], device["write_back"]) for device in served if device.get("write_back")]
    labels = ["device", "remote"]
    flags = (
        ("uploading", "uploading", "1: an epoch is sealed and on its way."),
        ("held", "claim_held", "1: the claim of its writer is ours."),
        ("fenced", "fenced", "1: another host has taken it over; nothing that is here reaches it any more."),
        ("trouble", "upload_failing", "1: nothing gets through to its store; what is written is kept here."),
    )
    levels = (
        ("dirty_bytes", "dirty_bytes", "What would be lost with this machine."),
        ("epoch", "epoch", "The last consistent state that is in the store."),
        ("epoch_at", "epoch_timestamp_seconds", "When that was made."),
    )

    def add(family: Any, values: Sequence[float]) -> Metric:
        for (name, far), value in zip(found, values, strict=True):
            family.add_metric([name, far.get("url") or ""], value)
        filled: Metric = family
        return filled

    for key, name, what in levels:
        family = Gauge(f"tierblk_volume_{name}", what, labels=labels)
        yield add(family, [far.get(key) or 0 for _, far in found])
    ages_s = [_age_s(far, now_unix_s) for _, far in found]
    what = "How long the oldest of what is dirty has been; 0 when nothing is."
    yield add(Gauge("tierblk_volume_dirty_age_seconds", what, labels=labels), ages_s)
    for key, name, what in flags:
        family = Gauge(f"tierblk_volume_{name}", what, labels=labels)
        yield add(family, [bool(far.get(key)) for _, far in found])
    for key, name, what in _EPOCHS:
        counted = Counter(f"tierblk_volume_{name}", what, labels=labels)
        yield add(counted, [far.get(key) or 0 for _, far in found])


def _age_s(far: Mapping[str, Any], now_unix_s: float) -> float:
    since = far.get("dirty_since")
    return max(0.0, now_unix_s - since) if since and far.get("dirty_bytes") else 0.0


def _latencies(found: Mapping[str, Mapping[str, Latencies]]) -> Iterator[Metric]:
    what = (
        "How long requests took, from the turn of the queue in which they came to the one in which they were "
        "done. Tier hit is without memory. What lies less than a quarter below a bound may count at the next."
    )
    bounds = [str(floatToGoString(bound_s)) for bound_s in bounds_s()]  # type: ignore[no-untyped-call]
    for name, tiers in found.items():
        family = Histogram("tierblk_device_latency_seconds", what, labels=["device", "tier"])
        for tier, latencies in tiers.items():
            buckets = [*zip(bounds, latencies.cumulative(), strict=True), ("+Inf", latencies.total)]
            family.add_metric([name, tier], buckets, latencies.sum_s)
        yield family
