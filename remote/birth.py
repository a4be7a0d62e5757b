"""volume.json: what a volume was born as, as JSON that is written once. Pure.

It never changes. What can change later (size, base, base_visible) is said again by every record (R15), and
the last one counts. What a store sends here is not trusted (I12): see decode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import UUID

from tierblk.errors import RemoteRefused
from tierblk.extent import SECTOR_BYTES
from tierblk.remote.names import BIRTH, EPOCH_MAX

FORMAT_VERSION = 1
BIRTH_BYTES_MAX = 65536
SIZE_BYTES_MAX = 1 << 60
URL_BYTES_MAX = 4096
VALIDATOR_BYTES_MAX = 2048
TIME_S_MAX = 253_402_300_799  # the last second of the year 9999: what later becomes a date has to be one


@dataclass(frozen=True, slots=True)
class Base:
    """The image below a volume: its address, its size, and the sign of the version that was pinned."""

    url: str
    size_bytes: int
    validator: str


@dataclass(frozen=True, slots=True)
class Parent:
    """What a clone begins as: the volume with that uuid, whose prefix is at url, as of an epoch.

    The clone's own epochs go on from there, so the epoch in an object's name says whose prefix it is in.
    """

    uuid: UUID
    url: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Birth:
    """A volume's beginning. size_bytes is a multiple of 512; base None: over nothing."""

    uuid: UUID
    size_bytes: int
    base: Base | None
    parent: Parent | None
    created_unix_s: int


def encode(birth: Birth) -> bytes:
    """The one JSON text of a birth, UTF-8. ValueError when it is none that decode would take."""
    document: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "uuid": str(birth.uuid),
        "size_bytes": birth.size_bytes,
        "base": None,
        "parent": None,
        "created_unix_s": birth.created_unix_s,
    }
    if (base := birth.base) is not None:
        document["base"] = {"url": base.url, "size_bytes": base.size_bytes, "validator": base.validator}
    if (parent := birth.parent) is not None:
        document["parent"] = {"uuid": str(parent.uuid), "url": parent.url, "epoch": parent.epoch}
    _birth(document)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def decode(data: bytes, name: str = BIRTH) -> Birth:
    """The birth that a volume.json tells of; name is the object's, for the messages.

    RemoteRefused: too long, no JSON, of a newer format, or anything in it is missing, unknown, of another
    type or out of bounds.
    """
    if len(data) > BIRTH_BYTES_MAX:
        raise RemoteRefused(
            f"{name} has {len(data)} bytes, and no volume.json has more than {BIRTH_BYTES_MAX}"
        )
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_keys_once, parse_constant=_no_constant, parse_float=_no_float
        )
    except UnicodeDecodeError:
        raise RemoteRefused(f"{name} is no volume.json: it is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # json's own errors are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RemoteRefused(f"{name} is no volume.json: {reason:.200}") from None
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise RemoteRefused(
            f"{name} was made by a newer tierblk: its format is {version!s:.20}, "
            f"this version knows {FORMAT_VERSION}",
            "use that version of tierblk",
        )
    try:
        return _birth(document)
    except ValueError as error:
        raise RemoteRefused(f"{name} is no volume.json: {error}") from None


def base_fault(base: Base) -> str | None:
    """What is wrong with a base's identity, as the end of a sentence; None: nothing."""
    try:
        _number("the base's size_bytes", base.size_bytes, 1, SIZE_BYTES_MAX)
        _text("the base's url", base.url, URL_BYTES_MAX)
        _text("the base's validator", base.validator, VALIDATOR_BYTES_MAX)
    except ValueError as error:
        return str(error)
    return None


def size_fault(size_bytes: int) -> str | None:
    """What is wrong with a volume's size, as the end of a sentence; None: nothing."""
    if not SECTOR_BYTES <= size_bytes <= SIZE_BYTES_MAX or size_bytes % SECTOR_BYTES:
        return f"size_bytes is no multiple of 512 from 512 to 2^60, but {size_bytes!s:.20}"
    return None


def _birth(document: object) -> Birth:
    """The birth of a document. ValueError: the end of a sentence that says what is wrong."""
    fields = _table("it", document, {"format", "uuid", "size_bytes", "base", "parent", "created_unix_s"})
    _number("format", fields["format"], FORMAT_VERSION, FORMAT_VERSION)
    size_bytes = _number("size_bytes", fields["size_bytes"], SECTOR_BYTES, SIZE_BYTES_MAX)
    if (fault := size_fault(size_bytes)) is not None:
        raise ValueError(fault)
    base = parent = None
    if fields["base"] is not None:
        inner = _table("base", fields["base"], {"url", "size_bytes", "validator"})
        base = Base(inner["url"], inner["size_bytes"], inner["validator"])
        if (fault := base_fault(base)) is not None:
            raise ValueError(fault)
    if fields["parent"] is not None:
        inner = _table("parent", fields["parent"], {"uuid", "url", "epoch"})
        parent = Parent(
            _uuid("the parent's uuid", inner["uuid"]),
            _text("the parent's url", inner["url"], URL_BYTES_MAX),
            _number("the parent's epoch", inner["epoch"], 1, EPOCH_MAX),
        )
    created_unix_s = _number("created_unix_s", fields["created_unix_s"], 0, TIME_S_MAX)
    return Birth(_uuid("uuid", fields["uuid"]), size_bytes, base, parent, created_unix_s)


def _table(what: str, value: object, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    if missing := sorted(keys - value.keys()):
        raise ValueError(f"{what} has no {missing[0]}")
    if unknown := sorted(value.keys() - keys):
        raise ValueError(f"{what} has an unknown key {unknown[0]!r:.60}")
    return value


def _number(what: str, value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:  # a bool is no number here
        raise ValueError(f"{what} is no whole number from {least} to {most}")
    return value


def _text(what: str, value: object, bytes_max: int) -> str:
    """Text that can be shown on one line, and can be UTF-8 (which half of a surrogate pair cannot)."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"{what} is no printable text")
    if len(value.encode()) > bytes_max:
        raise ValueError(f"{what} is longer than {bytes_max} bytes")
    return value


def _uuid(what: str, value: object) -> UUID:
    if isinstance(value, str) and len(value) == 36:
        try:
            uuid = UUID(value)
        except ValueError:
            pass
        else:
            if str(uuid) == value:
                return uuid
    raise ValueError(f"{what} is no UUID in its usual spelling")


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is there twice")
    return document


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text:.20} is no whole number")
