"""The pages of `tierblk top` beside the overview: one device, and the help. Pure."""

from __future__ import annotations

from tierblk.cli.top_model import CacheView, DeviceView, Picture, Tier
from tierblk.cli.top_rows import View, title
from tierblk.cli.top_tables import HEAD, STALE, Column, Table, state_style
from tierblk.cli.top_text import Line, count, fit, latency, percent, size, span, spark
from tierblk.cli.top_troubles import trouble_lines
from tierblk.latency import TIERS

HELP = """\
Numbers are of the last interval; sizes have binary units: 1.5M are 1.5 MiB.

IOPS READ WRITE  a second: requests of every kind, bytes read, bytes written
FETCH            a second: bytes from the remote for the device
HIT%             how much the cache had of what was read and is not zeros
99 % within      took at most so long: hits, misses, writes
waiting          requests that wait for the remote; how long the oldest has
FREE QUARANT     slots: to be had now; after the next commit. BAD: lost
PACED            what writes may take of new slots a second while slowed down
DIRTY AGE        of an upload: what is only here, and for how long the oldest
LIMIT            of what may be dirty; writes are slowed down from 75 % on
SENT PUTS        of the epoch under way: what the store has; objects sent now
RATE/s LEFT      speed lately, and how long all that is dirty takes at it
SINCE NEXT       of trouble: how long it has lasted; when there is another try
silent, ended    the daemon does not answer, or has ended: its last numbers

s       next order: iops, bytes, latency, waiting, dirty, name
j k     or arrows, page up, page down: select a device
enter   or d: all about that device, and back; esc: back
q       quit
"""

_TIER_ROWS: Table[tuple[str, Tier | None, float]] = Table(
    (
        Column("TIER", 8, lambda r: r[0], right=False),
        Column("REQS/s", 7, lambda r: count(r[1].requests_per_s if r[1] else 0)),
        Column("SHARE%", 6, lambda r: percent(r[1].requests_per_s / r[2] * 100) if r[1] and r[2] else "-"),
        Column("50 %", 7, lambda r: latency(r[1].p50_us if r[1] else None)),
        Column("90 %", 7, lambda r: latency(r[1].p90_us if r[1] else None)),
        Column("99 %", 7, lambda r: latency(r[1].p99_us if r[1] else None)),
        Column("99.9 %", 7, lambda r: latency(r[1].p999_us if r[1] else None)),
    ),
    lambda row: row[1] is None,
)


def help_page(picture: Picture, view: View) -> list[Line]:
    """What the columns and the keys are."""
    lines = [title(picture, view, "help")]
    lines += [Line.of(f" {text}") for text in HELP.splitlines()]
    return lines if view.height is None else lines[: view.height - 1]


def device_page(picture: Picture, view: View) -> list[Line]:
    """Everything about the selected device."""
    device = next((device for device in picture.devices if device.key == view.selected), None)
    if device is None:
        return [title(picture, view, "device"), Line.of(" this device is gone; esc: back", "dim")]
    lines = [title(picture, view, device.name), *_facts(device, view)]
    cache = next((cache for cache in picture.caches if cache.run_dir == device.run_dir), None)
    if cache is not None:
        lines += _cache(cache)
    past = f"the last {span(len(device.history) * view.interval_s)}".rjust(view.width - 14)
    lines += [Line(), *_tiers(device, view), Line.of(past, "dim"), *_sparks(device, view)]
    lines += [Line(), *_counters(device)]
    lines += _upload(device, view)
    only = picture.only([device.name])
    lines += trouble_lines(only, view.width)
    if device.stale:
        lines[1:] = [line.styled(STALE) for line in lines[1:]]
    if view.height is not None and len(lines) > view.height - 1:
        lines = [line for at, line in enumerate(lines) if at < 1 or line.pieces]  # without the spaces between
    return lines if view.height is None else lines[: view.height - 1]


def _fact(name: str, value: str, view: View) -> Line:
    return Line([(f" {name:<9}", HEAD), (fit(value, view.width - 11, dots=view.dots), "")])


def _facts(device: DeviceView, view: View) -> list[Line]:
    kind = f"{device.volume} volume" if device.volume else "read only"
    about = [device.path, size(device.size_bytes), kind, f"plane {device.plane}" if device.plane else ""]
    lines = [
        Line(
            [
                (f" {'device':<9}", HEAD),
                (device.state, state_style(device.state)),
                (f"  {'  '.join(part for part in about if part)}", ""),
            ]
        )
    ]
    if device.url:
        lines.append(_fact("image", device.url, view))
    return lines


def _cache(cache: CacheView) -> list[Line]:
    parts = [
        f"{cache.cache_dir}",
        f"{size(cache.free_bytes)} of {size(cache.size_bytes)} free",
        f"{size(cache.dirty_bytes)} dirty",
    ]
    return [Line([(f" {'cache':<9}", HEAD), ("  ".join(parts), "")])]


def _tiers(device: DeviceView, view: View) -> list[Line]:
    total = sum(tier.requests_per_s for tier in device.latencies.values())
    rows = [(name, device.latencies.get(name), total) for name in TIERS]
    fitting = _TIER_ROWS.fitting(rows, view.width)
    return [*_TIER_ROWS.header(fitting), *(_TIER_ROWS.line(fitting, row) for row in rows)]


def _sparks(device: DeviceView, view: View) -> list[Line]:
    """The last minutes, each with what the line's highest bar stands for."""
    kinds = (
        ("IOPS", [moment.iops for moment in device.history], count),
        ("READ/s", [moment.read_bytes_per_s for moment in device.history], size),
        ("WRITE/s", [moment.write_bytes_per_s for moment in device.history], size),
    )
    lines = []
    for name, values, shown in kinds:
        now, most = shown(values[-1] if values else None), shown(max(values, default=None))
        bars = spark(values, view.width - 28, first=device.history_first, unicode=view.unicode)
        lines.append(
            Line([(f" {name:<8}", HEAD), (f"{now:>5} ", ""), (bars, "cyan"), (f" most {most:>5}", "dim")])
        )
    return lines


def _counters(device: DeviceView) -> list[Line]:
    waiting = "none"
    if device.waiting:
        waiting = f"{device.waiting}, the oldest for {latency(device.oldest_wait_ms * 1000)}"
    lines = [
        Line(
            [
                (f" {'reads':<9}", HEAD),
                (f"{percent(device.hit_percent)} % hits  fetched {size(device.fetched_bytes_per_s)}/s", ""),
                ("  waiting ", HEAD),
                (waiting, "yellow" if device.waiting else ""),
                ("  errors ", HEAD),
                (str(device.errors), "red" if device.errors_per_s else ""),
            ]
        ),
    ]
    if device.volume is not None:
        slowed = (
            f"paced {count(device.paced_per_s)}/s  without a free slot {count(device.space_waits_per_s)}/s"
        )
        discards = f"discards {count(device.requests_per_s.get('discard'))}/s"
        lines.append(Line([(f" {'writes':<9}", HEAD), (f"{slowed}  {discards}", "")]))
    return lines


def _upload(device: DeviceView, view: View) -> list[Line]:
    upload = device.upload
    if upload is None:
        return []
    parts = [f"epoch {upload.epoch}", f"{size(upload.dirty_bytes)} only here"]
    if upload.dirty_s is not None:
        parts.append(f"oldest {span(upload.dirty_s)}")
    if upload.fullness is not None:
        parts.append(f"{upload.fullness:.0%} of what may be")
    sent = []
    if upload.sealed_bytes:
        sent.append(f"{size(upload.sent_bytes)} of {size(upload.sealed_bytes)} sent")
        sent.append(f"{upload.sending_requests} objects on their way")
    if upload.bytes_per_s:
        sent.append(f"{size(upload.bytes_per_s)}/s")
    if upload.drained_in_s is not None:
        sent.append(f"{span(upload.drained_in_s)} left")
    state = [(f" {'upload':<9}", HEAD), (upload.state, state_style(upload.state))]
    lines = [
        _fact("store", upload.url, view),
        Line([*state, (f"  {'  '.join(parts)}", "")]),
    ]
    return [*lines, _fact("", "  ".join(sent), view)] if sent else lines
