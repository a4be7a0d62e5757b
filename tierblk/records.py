"""Device records: what the next daemon needs to take a device over. RUN/<uuid of the cache>/devices/<id>.json

A record is written before a device can be opened and removed when it is deleted, so a device that outlives
its daemon has one. It lies on tmpfs like the block maps: it never outlives the machine's uptime. The config
in it may hold secrets ([remote.headers], a signed address): mode 0600.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tierblk import address

FOLDER = "devices"
VERSION = 1


@dataclass(frozen=True)
class DeviceRecord:
    """One device. url, size_bytes, validator: the pinned version of its image; empty, and the volume's size,
    without one. volume_size_bytes: 0 for a device that nobody writes to. config: the document of its
    config. stamp and flags: as ADD_DEV has them. attached: seconds since 1970."""

    dev_id: int
    name: str
    config_path: str
    config: dict[str, Any]
    url: str
    size_bytes: int
    validator: str
    stamp: int
    flags: int
    attached: float
    volume_size_bytes: int = 0

    @property
    def path(self) -> str:
        """The block device."""
        return f"/dev/ublkb{self.dev_id}"


def _file(run_dir: Path, dev_id: int) -> Path:
    return run_dir / FOLDER / f"{dev_id}.json"


def write(run_dir: Path, record: DeviceRecord) -> None:
    """There whole or not at all, whenever the daemon is killed. OSError."""
    path = _file(run_dir, record.dev_id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({"version": VERSION, **asdict(record)}, file)
    new.replace(path)


def remove(run_dir: Path, dev_id: int) -> None:
    """Gone; also when it was not there."""
    with suppress(FileNotFoundError):
        _file(run_dir, dev_id).unlink()


def read_all(run_dir: Path) -> tuple[list[DeviceRecord], dict[int, str]]:
    """The records of a cache, by attachment; and why those that cannot be used cannot, by device number."""
    found: list[DeviceRecord] = []
    bad: dict[int, str] = {}
    for path in (run_dir / FOLDER).glob("*.json"):
        if path.stem.isdecimal():
            try:
                found.append(_parse(path, int(path.stem)))
            except (OSError, ValueError, TypeError) as error:
                bad[int(path.stem)] = f"its record {path} cannot be used: {error}"
    return sorted(found, key=lambda record: (record.attached, record.dev_id)), bad


def _parse(path: Path, dev_id: int) -> DeviceRecord:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.pop("version", None) != VERSION:
        raise ValueError("another version of tierblk wrote it")
    document.setdefault("volume_size_bytes", 0)  # an earlier version had none
    kinds: dict[str, Any] = {"int": int, "str": str, "float": (int, float), "dict[str, Any]": dict}
    for field in fields(DeviceRecord):
        if not isinstance(document.get(field.name), kinds[str(field.type)]):
            raise ValueError(f"{field.name} is missing or wrong")
    record = DeviceRecord(**document)
    if record.dev_id != dev_id:
        raise ValueError(f"it is of device {record.dev_id}")
    return record


def waiting_device(record: DeviceRecord, state: str, reason: str | None) -> dict[str, Any]:
    """How `status` and `list` show a device that nobody serves at the moment."""
    return {
        "name": record.name,
        "path": record.path,
        "size_bytes": record.volume_size_bytes or record.size_bytes,
        "state": state,
        "reason": reason,
        "url": address.shown(record.url) if record.url else None,
        "validator": record.validator or None,
        "config_path": record.config_path,
        "recovery": True,
        "read_only": not record.volume_size_bytes,
        "attached": record.attached,
        "recovered": None,
        "warnings": [],
    }
