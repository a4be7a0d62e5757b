"""The tables of `tierblk top`: which columns there are, and which of them matter most. Pure."""

from __future__ import annotations

from collections.abc import Callable

from tierblk.cli.top_model import CacheView, DeviceView, RemoteView
from tierblk.cli.top_tables import Column, Table, state_style
from tierblk.cli.top_text import count, latency, percent, size, span
from tierblk.cli.top_upload import Upload

_SHORT = {"recovering": "recovers", "handed over": "handed on", "no daemon": "no daemon"}


def _state(state: str) -> tuple[str, str]:
    return _SHORT.get(state, state), state_style(state)


def _tier_latency(tier: str, which: str) -> Callable[[DeviceView], str]:
    def cell(device: DeviceView) -> str:
        found = device.latencies.get(tier)
        return latency(getattr(found, which)) if found is not None else "-"

    return cell


def _wait(device: DeviceView) -> tuple[str, str]:
    return count(device.waiting), "yellow" if device.waiting else ""


def _oldest(device: DeviceView) -> tuple[str, str]:
    if not device.waiting:
        return "-", ""
    return latency(device.oldest_wait_ms * 1000), "red" if device.oldest_wait_ms >= 1000 else "yellow"


def _errors(device: DeviceView) -> tuple[str, str]:
    return count(device.errors_per_s), "red" if device.errors_per_s else ""


def _hit_percent(device: DeviceView) -> str:
    return percent(device.hit_percent)


def _dirty(device: DeviceView) -> str:
    return size(device.upload.dirty_bytes) if device.upload else "-"


_RATE, _P99, _P50, _WAITING = "per second", "99 % within", "50 % within", "waiting"

DEVICES: Table[DeviceView] = Table(
    (
        Column("DEVICE", 15, lambda d: d.name, right=False, flexible=True),
        Column("STATE", 9, lambda d: _state(d.state), right=False),
        Column("PATH", 13, lambda d: d.path, rank=5, right=False),
        Column("IOPS", 5, lambda d: count(d.iops), group=_RATE),
        Column("READ", 5, lambda d: size(d.read_bytes_per_s), group=_RATE),
        Column("WRITE", 5, lambda d: size(d.write_bytes_per_s), group=_RATE),
        Column("FETCH", 5, lambda d: size(d.fetched_bytes_per_s), rank=1, group=_RATE),
        Column("FLUSH", 5, lambda d: count(d.requests_per_s.get("flush")), rank=4, group=_RATE),
        Column("ERROR", 5, _errors, rank=3, group=_RATE),
        Column("HIT%", 5, _hit_percent),
        *(
            Column(tier.upper()[:5], 5, _tier_latency(tier, "p50_us"), rank=2, group=_P50)
            for tier in ("hit", "miss", "write")
        ),
        Column("MEM", 5, _tier_latency("memory", "p99_us"), rank=6, group=_P99),
        Column("HIT", 5, _tier_latency("hit", "p99_us"), group=_P99),
        Column("ZERO", 5, _tier_latency("zero", "p99_us"), rank=6, group=_P99),
        Column("MISS", 5, _tier_latency("miss", "p99_us"), group=_P99),
        Column("WRITE", 5, _tier_latency("write", "p99_us"), group=_P99),
        Column("FLUSH", 5, _tier_latency("flush", "p99_us"), rank=4, group=_P99),
        Column("REQS", 5, _wait, group=_WAITING),
        Column("AGE", 5, _oldest, group=_WAITING),
        Column("DIRTY", 5, _dirty, rank=5),
        Column("IMAGE", 16, lambda d: d.url or "-", rank=7, right=False, flexible=True),
    ),
    lambda device: device.stale,
)


def _pace(cache: CacheView) -> tuple[str, str]:
    """At which pace writes may take new slots."""
    if cache.throttle_bytes_per_s is None:
        return "-", ""
    return f"{size(cache.throttle_bytes_per_s)}/s", "yellow"


def _slots(cache: CacheView, size_bytes: int) -> str:
    """Of a daemon that never answered nothing is known."""
    return size(size_bytes if cache.size_bytes else None)


CACHES: Table[CacheView] = Table(
    (
        Column("CACHE", 20, lambda c: c.cache_dir, right=False, flexible=True),
        Column("STATE", 7, lambda c: _state(c.state), right=False),
        Column("SLOTS", 5, lambda c: _slots(c, c.size_bytes)),
        Column("FREE", 5, lambda c: _slots(c, c.free_bytes)),
        Column("DIRTY", 5, lambda c: _slots(c, c.dirty_bytes)),
        Column("QUARANT", 7, lambda c: _slots(c, c.quarantined_bytes)),
        Column("BAD", 5, lambda c: (_slots(c, c.bad_bytes), "red" if c.bad_bytes else "")),
        Column("EVICT/s", 7, lambda c: size(c.evicted_bytes_per_s)),
        Column("PACED", 7, _pace, rank=1),
        Column("PID", 7, lambda c: str(c.pid or "-"), rank=2),
    ),
    lambda cache: cache.stale,
)


UploadRow = tuple[DeviceView, Upload]


def _sent(row: UploadRow) -> str:
    upload = row[1]
    return f"{size(upload.sent_bytes)}/{size(upload.sealed_bytes)}" if upload.sealed_bytes else "-"


def _full(row: UploadRow) -> tuple[str, str]:
    share = row[1].fullness
    if share is None:
        return "-", ""
    return f"{min(share, 9.99):.0%}", "yellow" if share >= 0.75 else ""


UPLOADS: Table[UploadRow] = Table(
    (
        Column("UPLOAD", 15, lambda r: r[0].name, right=False, flexible=True),
        Column("STATE", 7, lambda r: _state(r[1].state), right=False),
        Column("EPOCH", 7, lambda r: str(r[1].epoch)),
        Column("DIRTY", 5, lambda r: size(r[1].dirty_bytes)),
        Column("AGE", 5, lambda r: span(r[1].dirty_s)),
        Column("LIMIT", 5, _full),
        Column("SENT", 11, _sent),
        Column("PUTS", 4, lambda r: str(r[1].sending_requests)),
        Column("RATE/s", 6, lambda r: size(r[1].bytes_per_s)),
        Column("LEFT", 5, lambda r: span(r[1].drained_in_s)),
        Column("PUT/s", 5, lambda r: size(r[1].put_bytes_per_s), rank=1),
        Column("DURABLE", 7, lambda r: r[1].durability or "-", rank=2),
        Column("STORE", 16, lambda r: r[1].url, rank=3, right=False, flexible=True),
    ),
    lambda row: row[0].stale,
)


def _troubled(remote: RemoteView, value: float | None) -> tuple[str, str]:
    return span(value), "" if remote.state == "ok" else state_style(remote.state)


REMOTES: Table[RemoteView] = Table(
    (
        Column("REMOTE", 30, lambda r: r.url, right=False, flexible=True),
        Column("KIND", 5, lambda r: r.kind, right=False),
        Column("STATE", 8, lambda r: _state(r.state), right=False),
        Column("SINCE", 5, lambda r: _troubled(r, r.for_s)),
        Column("NEXT", 5, lambda r: span(r.next_try_s)),
        Column("WAIT", 5, lambda r: (count(r.waiting), "yellow" if r.waiting else "")),
        Column("GETS/s", 6, lambda r: count(r.requests_per_s)),
        Column("RECV/s", 6, lambda r: size(r.bytes_per_s)),
        Column("RETRY/s", 7, lambda r: count(r.retries_per_s), rank=1),
        Column("ERROR/s", 7, lambda r: count(r.errors_per_s), rank=1),
        Column("DEVICES", 12, lambda r: ", ".join(r.devices), rank=2, right=False, flexible=True),
    ),
    lambda remote: remote.stale,
)
