"""Shows what devices do: how much was read, from where, and what is wrong.

With --json: {"daemons": [...], "devices": [...]}; with NAME, the device alone. Numbers count from
the attachment; sizes are bytes.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from tierblk.cli import orphans
from tierblk.cli.arguments import add_cache_dir, add_json, add_timeout
from tierblk.cli.client import Daemon, ask_all, find_device
from tierblk.cli.output import complain, put, put_json, say
from tierblk.errors import TierblkError
from tierblk.units import format_size

NAME = "status"
HELP = "show what devices do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[NAME]."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="the device's name in its config; default: all"
    )
    add_cache_dir(parser, "only devices of this cache directory")
    add_json(parser)
    add_timeout(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a paragraph a device."""
    if args.name is not None:
        orphan = orphans.find(args.name, args.cache_dir, args.timeout_s)
        if orphan is not None:
            device = orphans.shown(orphan[1])
        else:
            _, device = find_device(args.name, args.cache_dir, args.timeout_s)
        if args.json:
            put_json(device)
        else:
            _put_device(device)
        return 0
    return _all(args)


def _all(args: argparse.Namespace) -> int:
    from tierblk.cli.client import same_directory

    daemons: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    failed: TierblkError | None = None
    for daemon, answer, error in ask_all(lambda d: (d.get("/v1/daemon"), d.devices()), args.timeout_s):
        if args.cache_dir is not None and not same_directory(daemon.cache_dir, args.cache_dir):
            continue
        if error:
            complain(error)
            failed = error
            continue
        info, devices = answer
        daemons.append(info)
        found += devices
        if not args.json:
            _put_daemon(daemon, info, devices)
    alone = [orphans.shown(record) for _, record in orphans.waiting(args.timeout_s, args.cache_dir)]
    if args.json:
        put_json({"daemons": daemons, "devices": found + alone})
        return failed.exit_code if failed else 0
    for device in alone:
        _put_device(device)
        put("")
    if not daemons and not alone and not failed:
        say("no daemon is running" if args.cache_dir is None else f"no daemon serves {args.cache_dir}")
    return failed.exit_code if failed else 0


def _put_daemon(daemon: Daemon, info: dict[str, Any], devices: list[dict[str, Any]]) -> None:
    put(f"cache {info.get('cache_dir')}, daemon {info.get('pid')}, {len(devices)} attached")
    for warning in info.get("warnings") or ():
        put(f"warning: {warning}")
    put("")
    for device in devices:
        _put_device(device)
        put("")


def _latency(device: dict[str, Any], tier: str) -> str:
    """How long requests of a tier take, if there were any."""
    found = device.get("latencies", {}).get(tier, {})
    if not found.get("requests"):
        return ""
    return f", half within {_duration(found['p50_us'])}, 99 % within {_duration(found['p99_us'])}"


def _share(hit_bytes: int, miss_bytes: int) -> str:
    return f", hits {hit_ratio(hit_bytes, miss_bytes)}" if hit_bytes + miss_bytes else ""


def _duration(us: float) -> str:
    for unit, divisor in (("s", 1e6), ("ms", 1e3)):
        if us >= divisor:
            return f"{us / divisor:.3g} {unit}"
    return f"{us:.3g} us"


def _put_device(device: dict[str, Any]) -> None:
    number = {key: value for key, value in device.items() if isinstance(value, int)}
    put(f"{device.get('name')}: {device.get('path')}, {device.get('state')}")
    _put_trouble(device, number)
    size = format_size(number.get("size_bytes", 0))
    if device.get("url"):
        # a volume may be larger than the image under it
        put(f"  image     {'' if device.get('volume') else f'{size} at '}{device['url']}")
    if device.get("volume"):
        kept = format_size(number.get("volume_bytes", 0))
        put(f"  volume    {size}, {device['volume']}, {kept} of it in the cache directory")
    if isinstance(far := device.get("write_back"), dict):
        _put_write_back(far)
    if device.get("recovered"):
        put(f"  recovered {ago(device['recovered'])}: an earlier daemon made it; numbers count from there")
    if "requests" not in device:  # nobody serves it, so nobody counts
        return
    hit, miss, zero = (number.get(key, 0) for key in ("hit_bytes", "miss_bytes", "zero_bytes"))
    queues, depth = number.get("queues", 1), number.get("queue_depth", 0)
    shape = f"{depth} requests deep" if queues == 1 else f"{queues} queues, each {depth} requests deep"
    put(f"  plane     {device.get('plane')}, {shape}")
    reads = sum(number.get(f"{tier}_requests", 0) for tier in ("hit", "miss", "zero"))
    put(f"  read      {format_size(hit + miss + zero)} in {reads} requests{_share(hit, miss)}")
    put(f"  hits      {format_size(hit)}{_latency(device, 'hit')}")
    if hot := number.get("hot_memory_bytes", 0):
        hits, quick = number.get("hit_requests", 0), number.get("memory_requests", 0)
        share = f", {quick * 100 // hits} % of the requests among them" if hits else ""
        put(f"  memory    {format_size(hot)} for hot blocks{share}")
    put(f"  misses    {format_size(miss)}{_latency(device, 'miss')}")
    fetched, gets = number.get("fetched_bytes", 0), number.get("remote_requests", 0)
    put(f"  fetched   {format_size(fetched)} in {gets} requests to the remote")
    if device.get("volume"):
        _put_writes(device, number)
    put(f"  errors    {number.get('errors', 0)}")


def _put_writes(device: dict[str, Any], number: dict[str, int]) -> None:
    wrote, writes = number.get("write_bytes", 0), number.get("write_requests", 0)
    put(f"  written   {format_size(wrote)} in {writes} requests{_latency(device, 'write')}")
    flushes, commits = number.get("flush_requests", 0), number.get("flush_commits", 0)
    put(f"  flushes   {flushes}, {commits} waited for the index{_latency(device, 'flush')}")
    put(f"  discarded {format_size(number.get('discard_bytes', 0))}")


def _put_write_back(far: dict[str, Any]) -> None:
    """Where the volume in object storage stands, and what would be lost with this machine."""
    dirty = int(far.get("dirty_bytes") or 0)
    since = f", since {ago(far['dirty_since'])}" if dirty and far.get("dirty_since") else ""
    put(f"  store     {far.get('url')}, epoch {far.get('epoch')}")
    put(f"  dirty     {format_size(dirty)} are only here{since}")
    put(f"  uploaded  {format_size(int(far.get('put_bytes') or 0))} in {far.get('put_requests', 0)} requests")


def _put_trouble(device: dict[str, Any], number: dict[str, int]) -> None:
    """Why it is not well, since when, what waits for that, and when it is tried again."""
    if device.get("reason"):
        put(f"  because   {device['reason']}")
    if device.get("since"):
        put(f"  since     {ago(device['since'])}")
    if number.get("waiting"):
        oldest_s = number.get("oldest_wait_ms", 0) / 1000
        patience = f'on_outage = "{device.get("on_outage", "wait")}"'
        put(f"  waiting   {number['waiting']} requests, the oldest for {oldest_s:.1f} s ({patience})")
    if device.get("next_try_s") is not None:
        put(f"  next try  in {float(device['next_try_s']):.1f} s")


def ago(unix_s: float) -> str:
    """A time, and how long ago that was."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
    return f"{when}, {age(unix_s)}"


def age(unix_s: float) -> str:
    """How long ago a time was, in its largest unit: "30s ago", "8m ago", "3d ago"."""
    seconds = max(0, round(time.time() - unix_s))
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * unit:
            return f"{seconds // unit}{letter} ago"
    return f"{seconds}s ago"


def hit_ratio(hit_bytes: int, miss_bytes: int) -> str:
    """What share of the bytes that are no zeros came from the cache, for people. Never rounds up to 100 %."""
    total = hit_bytes + miss_bytes
    return f"{hit_bytes * 1000 // total / 10:.1f} % of what is not zero" if total else "nothing read yet"
