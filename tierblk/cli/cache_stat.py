"""Shows how full a cache is, of what, and what is nowhere else. A daemon that serves it is asked for what
only it knows, for two seconds at most; everything else is out of the files.

With --json: {"directory", "uuid", "format", "state", "clean", "pid", "session", "size_bytes", "slots",
"used_slots", "free_slots", "quarantined_slots", "bad_slots", "bad_superblocks", "kinds": {KIND: {"layers",
"slots", "cached_bytes", "zero_bytes", "dirty_bytes"}}, "files": {NAME: bytes}, "damaged": [{"layer_id",
"what", "why"}], "only_here": [{"layer_id", "kind", "name", "bytes", "since"}], "hit_ratio", "hit_bytes",
"miss_bytes", "oldest_dirty_since", "commit_failure", "daemon_trouble"}. What is not known is null; times
are seconds since 1970. Of a directory that nobody serves a slot counts as free when no block has it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierblk.cli import beside
from tierblk.cli.arguments import add_json
from tierblk.cli.output import put, put_json, put_table, say
from tierblk.cli.states import STATE_TEXTS
from tierblk.cli.status import ago, hit_ratio
from tierblk.cli.target import add_target, resolve
from tierblk.extent import BLOCK_BYTES, PAGE_BYTES
from tierblk.rundir import run_root
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cache.census import Census
    from tierblk.cache.layers import LayerRecord
    from tierblk.cache.view import View

NAME = "stat"
HELP = "show how full it is, and what would be lost"
FILES = ("slots", "sums", "journal", "index/data.mdb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET."""
    add_target(parser, device=False)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a few paragraphs."""
    from tierblk.cache.census import count
    from tierblk.cache.view import look

    directory = resolve(args.target, args.timeout_s).directory
    with look(directory, run_root()) as view:
        layers = [view.layer(record) for record in view.records]
        counted = [(layer.record, count(layer)) for layer in layers]
        bad_rows = {layer.record.layer_id: len(layer.row_faults) for layer in layers if layer.row_faults}
        document = _document(view, counted, bad_rows, beside.ask(view, run_root()))
    if args.json:
        put_json(document)
    else:
        _show(document)
    return 0


def _document(
    view: View,
    counted: list[tuple[LayerRecord, Census]],
    bad_rows: dict[int, int],
    said: beside.Beside,
) -> dict[str, Any]:
    from tierblk.cache.view import State

    slots = view.superblock.slot_count - 1
    used = sum(census.slots for _, census in counted)
    free = said.cache.get("free", None if view.state is State.SERVED else slots - used)
    hits, misses = (
        sum(device.get(key, 0) for device in said.devices) if said.info else None
        for key in ("hit_bytes", "miss_bytes")
    )
    since = _dirty_since(said)
    return {
        "directory": str(view.path),
        "uuid": str(view.superblock.uuid),
        "format": view.superblock.version,
        "state": view.state.value,
        "clean": view.meta.clean,
        "pid": said.pid,
        "session": view.superblock.session,
        "size_bytes": view.superblock.slot_count * BLOCK_BYTES,
        "slots": slots,
        "used_slots": used,
        "free_slots": free,
        "quarantined_slots": said.cache.get("quarantined"),
        "bad_slots": said.cache.get("bad"),
        "bad_superblocks": view.bad_superblocks,
        "kinds": _kinds(counted),
        "files": {name: size for name in FILES if (size := _size(view.path / name)) is not None},
        "damaged": list(_damaged(counted, bad_rows)),
        "only_here": [
            {
                "layer_id": record.layer_id,
                "kind": record.kind,
                "name": record.name,
                "bytes": (census.dirty_pages + census.zero_dirty_pages) * PAGE_BYTES,
                "since": since.get(record.name) if record.is_stored else None,
            }
            for record, census in counted
            if record.is_volume and census.dirty_pages + census.zero_dirty_pages
        ],
        "hit_ratio": hits / (hits + misses)
        if hits is not None and misses is not None and hits + misses
        else None,
        "hit_bytes": hits,
        "miss_bytes": misses,
        "oldest_dirty_since": min(since.values(), default=None),
        "commit_failure": said.cache.get("commit_failure"),
        "daemon_trouble": said.trouble,
    }


def _dirty_since(said: beside.Beside) -> dict[str, float]:
    """Since when a device has what was not uploaded, by its name."""
    found = {}
    for device in said.devices:
        far = device.get("write_back")
        if isinstance(far, dict) and far.get("dirty_bytes") and far.get("dirty_since"):
            found[str(device.get("name"))] = float(far["dirty_since"])
    return found


def _kinds(counted: list[tuple[LayerRecord, Census]]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for record, census in counted:
        kind = kinds.setdefault(record.kind, {})
        for key, value in (
            ("layers", 1),
            ("slots", census.slots),
            ("cached_bytes", census.cached_pages * PAGE_BYTES),
            ("zero_bytes", census.zero_pages * PAGE_BYTES),
            ("dirty_bytes", (census.dirty_pages + census.zero_dirty_pages) * PAGE_BYTES),
        ):
            kind[key] = kind.get(key, 0) + value
    return kinds


def _damaged(counted: list[tuple[LayerRecord, Census]], bad_rows: dict[int, int]) -> Iterator[dict[str, Any]]:
    for record, _ in counted:
        if record.damaged:
            yield {"layer_id": record.layer_id, "what": record.shown, "why": record.damaged}
        if rows := bad_rows.get(record.layer_id):
            why = f"{rows} rows of the index cannot be believed, {rows * 4} MiB of it at most"
            yield {"layer_id": record.layer_id, "what": record.shown, "why": why}


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _show(found: dict[str, Any]) -> None:
    put(f"cache {found['directory']}, {format_size(found['size_bytes'])}, session {found['session']}")
    served = f", pid {found['pid']}" if found["pid"] else ""
    put(f"  state          {found['state']}{served}: {STATE_TEXTS[found['state']]}")
    for name, size in found["files"].items():
        put(f"  {name:<14} {format_size(size)}")
    _show_slots(found)
    if found["hit_bytes"] is not None:
        ratio = hit_ratio(found["hit_bytes"], found["miss_bytes"])
        put(f"  hits           {ratio}, of the devices that are attached")
    if failure := found["commit_failure"]:
        put(f"  commits        fail since {ago(failure['since'])}: {failure['reason']}")
    if found["kinds"]:
        put("")
        put_table(
            ("KIND", "LAYERS", "HERE", "ZEROS", "DIRTY", "SLOTS"),
            [
                (
                    kind,
                    str(each["layers"]),
                    format_size(each["cached_bytes"]),
                    format_size(each["zero_bytes"]),
                    format_size(each["dirty_bytes"]),
                    str(each["slots"]),
                )
                for kind, each in found["kinds"].items()
            ],
        )
    if found["only_here"]:
        put("")
    for each in found["only_here"]:
        put(f"{format_size(each['bytes'])} of the volume {each['name']} are only here{_fate(found, each)}")
    for each in found["damaged"]:
        say(f"{each['what']}: {each['why']}")
    if found["bad_superblocks"]:
        say(f"{found['bad_superblocks']} of 2 superblocks cannot be read; the other one is good")
    if found["daemon_trouble"]:
        say(f"what only the daemon knows is missing: {found['daemon_trouble']}")


def _show_slots(found: dict[str, Any]) -> None:
    parts = [f"{found['used_slots']} of {found['slots']} used"]
    for key, word in (("free_slots", "free"), ("quarantined_slots", "in quarantine"), ("bad_slots", "bad")):
        if found[key] is not None:
            parts.append(f"{found[key]} {word}")
    put(f"  in slots       {', '.join(parts)}")


def _fate(found: dict[str, Any], each: dict[str, Any]) -> str:
    """What becomes of a volume's dirty pages, and since when they wait."""
    if each["kind"] == "scratch":
        return ": they go when it is detached, or the machine"
    if each["kind"] == "local":
        return ": they are lost with this disk"
    since = f" since {ago(each['since'])}" if each["since"] else ""
    served = found["state"] == "served"
    return f", not uploaded{since}: they are lost with this disk" + ("" if served else "; attach it to go on")
