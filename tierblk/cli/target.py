"""What the verbs of `tierblk cache` look at: TARGET is a config file, a cache directory, or the name of a
device that a daemon of this machine has, or had.

What could be a name is one, unless it ends in .toml or a file or a cache directory of that name is there:
./NAME is always a path. Daemons are asked about names only.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierblk import address
from tierblk.cli import client, orphans
from tierblk.cli.arguments import add_timeout
from tierblk.errors import DeviceError
from tierblk.rundir import run_root

if TYPE_CHECKING:
    from tierblk.cache.layers import LayerRecord
    from tierblk.cache.view import View

LISTED_MAX = 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """A device as its config or its daemon describes it. url: of its base, whole or as people see it; "": it
    has none. validator: of the base, None when it is not known."""

    name: str
    has_volume: bool
    url: str
    validator: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """directory: the cache's, which need not be there. wanted: the device, if TARGET is of one."""

    directory: Path
    wanted: Wanted | None = None


@dataclass(frozen=True, slots=True)
class CachedDevice:
    """The layers that a cache directory has of a device, a volume over a base; at least one is there.

    A volume with a url and no base lies over an image of which nothing is here."""

    name: str
    volume: LayerRecord | None
    base: LayerRecord | None

    @property
    def top(self) -> LayerRecord:
        """The one that says how large it is."""
        record = self.volume or self.base
        assert record is not None
        return record

    @property
    def size_bytes(self) -> int:
        return self.top.size_bytes

    @property
    def layers(self) -> list[LayerRecord]:
        """From the top down."""
        return [record for record in (self.volume, self.base) if record is not None]


def add_target(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """TARGET, --timeout and, for verbs that show one device, --device."""
    parser.add_argument(
        "target", metavar="TARGET", help="a config file, a cache directory, or the name of an attached device"
    )
    if device:
        parser.add_argument(
            "--device",
            metavar="NAME",
            help="which of the directory's: a volume's name, or a base's URL or number of its layer",
        )
    add_timeout(parser)


def resolve(text: str, timeout_s: float = client.ANSWER_TIMEOUT_S) -> Target:
    """What a TARGET means. ConfigError, DeviceError, DaemonError; whether the directory can be looked into is
    not asked."""
    is_config = text.endswith(".toml") or os.path.isfile(text)
    if not is_config and _may_be_name(text):
        return _named(text, timeout_s)
    if not is_config:
        return Target(Path(text))
    from tierblk.config import load

    config = load(text)
    return Target(config.cache.dir, Wanted(config.device.name, config.volume is not None, config.url))


def _may_be_name(text: str) -> bool:
    if "/" in text or os.path.exists(os.path.join(text, "slots")):
        return False
    from tierblk.values import NAME_PATTERN

    return re.fullmatch(NAME_PATTERN, text) is not None


def _named(name: str, timeout_s: float) -> Target:
    try:
        daemon, device = client.find_device(name, None, timeout_s)
    except DeviceError as error:
        waiting = orphans.find(name, None, timeout_s)
        if waiting is None:
            hint = "TARGET may also be a config file or a cache directory"
            raise DeviceError(error.message, f"{error.hint}; {hint}" if error.hint else hint) from None
        run_dir, record = waiting
        directory = orphans.cache_of(run_dir, record)
        if directory is None:
            raise DeviceError(
                f"the cache directory of {name}, which waits for a daemon, is not known",
                "say its path in place of the name",
            ) from None
        wanted = Wanted(name, bool(record.volume_size_bytes), record.url, record.validator)
        return Target(Path(directory), wanted)
    url, validator = str(device.get("url") or ""), device.get("validator")
    known = None if validator is None else str(validator)
    return Target(Path(daemon.cache_dir), Wanted(name, device.get("volume") is not None, url, known))


def choose(records: Sequence[LayerRecord], target: Target, name: str | None = None) -> CachedDevice:
    """The device that is meant, out of a directory's layers. name: of --device; then the target's does not
    count. DeviceError: there is none, or there are several."""
    if name is not None:
        found = _by_name(records, name)
        if found is None:
            raise DeviceError(f'nothing in {target.directory} is called "{name}"', _listed(records))
        return found
    if target.wanted is not None:
        return _wanted(records, target.directory, target.wanted)
    under = {record.base for record in records}
    tops = [r for r in records if r.is_volume or (r.url, r.size_bytes, r.validator) not in under]
    if len(tops) == 1:
        return _over(records, tops[0])
    if not tops:
        raise DeviceError(f"{target.directory} has nothing of any device yet")
    raise DeviceError(
        f"{target.directory} has {len(tops)} devices: say which one with --device", _listed(records)
    )


def _by_name(records: Sequence[LayerRecord], name: str) -> CachedDevice | None:
    """Volumes come before bases, and of several versions of an image the one that was used last."""
    tests = (
        lambda r: r.is_volume and r.name == name,
        lambda r: not r.is_volume and name in (r.url, address.shown(r.url)),
        lambda r: name == str(r.layer_id),
    )
    for fits in tests:
        found = [record for record in records if fits(record)]
        if found:
            return _over(records, max(found, key=lambda record: record.used_unix_s))
    return None


def _wanted(records: Sequence[LayerRecord], directory: Path, wanted: Wanted) -> CachedDevice:
    found = [
        record
        for record in records
        if (
            record.is_volume and record.name == wanted.name
            if wanted.has_volume
            else record.kind == "base"
            and wanted.url in (record.url, address.shown(record.url))
            and wanted.validator in (None, record.validator)
        )
    ]
    if not found:
        raise DeviceError(
            f"{directory} has nothing of the device {wanted.name} yet", _listed(records) or None
        )
    return _over(records, max(found, key=lambda record: record.used_unix_s), wanted.name)


def _over(records: Sequence[LayerRecord], top: LayerRecord, name: str | None = None) -> CachedDevice:
    if not top.is_volume:
        return CachedDevice(name or address.shown(top.url), None, top)
    below = top.base
    base = next((r for r in records if below is not None and r.has_identity(*below)), None)
    return CachedDevice(name or top.name, top, base)


def _listed(records: Sequence[LayerRecord]) -> str:
    lines = [f"{record.name} ({record.kind} volume)" for record in records if record.is_volume]
    lines += [
        f"{record.shown_base} (base, layer {record.layer_id})" for record in records if not record.is_volume
    ]
    if not lines:
        return "it has no layers"
    more = f", and {len(lines) - LISTED_MAX} more" if len(lines) > LISTED_MAX else ""
    return f"there are: {', '.join(lines[:LISTED_MAX])}{more}"


@contextmanager
def looking(args: argparse.Namespace) -> Iterator[tuple[View, CachedDevice]]:
    """The directory that the arguments of add_target say, looked into, and its device. TierblkError."""
    from tierblk.cache.view import look

    target = resolve(args.target, args.timeout_s)
    with look(target.directory, run_root()) as view:
        yield view, choose(view.records, target, args.device)
