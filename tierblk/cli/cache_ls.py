"""Lists what a cache has of each image and volume, and who uses it: devices of the daemon that serves it,
and of a base also the volumes that lie over it.

With --json: {"layers": [{"layer_id", "kind", "name", "url", "validator", "size_bytes", "cached_bytes",
"zero_bytes", "dirty_bytes", "slots", "used", "devices", "volumes", "store", "damaged", "bad_rows"}],
"daemon_trouble"}. devices is null when a daemon serves the directory and does not say; volumes are the names
of those over a base. store, of a volume in object storage: {"url", "uuid", "epoch", "writer", "held",
"fenced", "attempts"}.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tierblk.cli import beside
from tierblk.cli.arguments import add_json
from tierblk.cli.output import put, put_json, put_table, say
from tierblk.cli.status import age
from tierblk.cli.target import add_target, resolve
from tierblk.extent import PAGE_BYTES
from tierblk.rundir import run_root
from tierblk.units import format_size

if TYPE_CHECKING:
    from tierblk.cache.layers import LayerRecord
    from tierblk.cache.view import View

NAME = "ls"
HELP = "list its images and volumes, and who uses them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TARGET."""
    add_target(parser, device=False)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a line a layer."""
    from tierblk.cache.view import look

    directory = resolve(args.target, args.timeout_s).directory
    with look(directory, run_root()) as view:
        said = beside.ask(view, run_root())
        layers = [_layer(view, record, said) for record in view.records]
    if args.json:
        put_json({"layers": layers, "daemon_trouble": said.trouble})
    else:
        _show(layers, said)
    return 0


def _layer(view: View, record: LayerRecord, said: beside.Beside) -> dict[str, Any]:
    from tierblk.cache.census import count

    layer = view.layer(record)
    census = count(layer)
    over = [other.name for other in view.records if other.base and record.has_identity(*other.base)]
    return {
        "layer_id": record.layer_id,
        "kind": record.kind,
        "name": record.name or None,
        "url": record.shown_base if record.url else None,
        "validator": record.validator or None,
        "size_bytes": record.size_bytes,
        "cached_bytes": census.cached_pages * PAGE_BYTES,
        "zero_bytes": census.zero_pages * PAGE_BYTES,
        "dirty_bytes": (census.dirty_pages + census.zero_dirty_pages) * PAGE_BYTES,
        "slots": census.slots,
        "used": record.used_unix_s,
        "devices": None if said.trouble else _devices(record, over, said),
        "volumes": over,
        "store": _store(view, record) if record.is_stored else None,
        "damaged": record.damaged or None,
        "bad_rows": layer.bad_rows,
    }


def _devices(record: LayerRecord, over: list[str], said: beside.Beside) -> list[str]:
    """Names of the attached ones that show it: a volume is its device's, a base that of who pins it or has a
    volume over it."""
    found = []
    for device in said.devices:
        name, pinned = str(device.get("name")), (device.get("url"), device.get("validator"))
        if record.is_volume:
            shows = name == record.name and device.get("volume") == record.kind
        else:
            shows = pinned == (record.shown_base, record.validator) or (device.get("volume") and name in over)
        if shows:
            found.append(name)
    return found


def _store(view: View, record: LayerRecord) -> dict[str, Any] | None:
    """Where it stands beside its store, as far as it is known here; None: nothing is, or it cannot be
    read."""
    from tierblk import address, standing

    state = view.volume_state(record)
    try:
        stands = standing.decode(state) if state else None
    except ValueError:
        stands = None
    if stands is None:
        return None
    return {
        "url": address.shown(stands.url),
        "uuid": str(stands.uuid),
        "epoch": _epoch(view, record, stands),
        "writer": standing.shown_writer(stands.writer),
        "held": stands.held,
        "fenced": stands.fenced or None,
        "attempts": len(stands.intents),
    }


def _epoch(view: View, record: LayerRecord, stands: Any) -> int | None:
    from tierblk.remote import kept
    from tierblk.remote.packed import Malformed

    head = view.volume_head(record)
    try:
        return kept.head_of(head, stands.uuid).epoch if head else None
    except Malformed:
        return None


def _show(layers: list[dict[str, Any]], said: beside.Beside) -> None:
    rows = [
        (
            str(each["layer_id"]),
            each["kind"],
            format_size(each["size_bytes"]),
            format_size(each["cached_bytes"]),
            format_size(each["dirty_bytes"]),
            age(each["used"]) if each["used"] else "never",
            _users(each),
            each["name"] or each["url"],
        )
        for each in layers
    ]
    if rows:
        put_table(("LAYER", "KIND", "SIZE", "HERE", "DIRTY", "ATTACHED", "USED BY", "WHAT"), rows)
    else:
        say("it has nothing of any image or volume")
    for each in layers:
        if store := each["store"]:
            put(f"{each['name']}: {_stands(store)}")
        if each["damaged"]:
            say(f"{each['name']} cannot be attached: {each['damaged']}")
        if each["bad_rows"]:
            what = each["name"] or each["url"]
            say(f"{what}: {len(each['bad_rows'])} rows of the index cannot be believed")
    if said.trouble:
        say(f"which devices are attached is not known: {said.trouble}")


def _users(each: dict[str, Any]) -> str:
    devices = each["devices"]
    parts = ["?"] if devices is None else list(devices)
    parts += [f"(under {name})" for name in each["volumes"] if name not in parts]
    return ", ".join(parts) or "-"


def _stands(store: dict[str, Any]) -> str:
    epoch = "no epoch is known" if store["epoch"] is None else f"epoch {store['epoch']}"
    held = "held" if store["held"] else "not held"
    fenced = f", fenced: {store['fenced']}" if store["fenced"] else ""
    return f"{store['url']}, {epoch}, {held} by this cache{fenced}"
