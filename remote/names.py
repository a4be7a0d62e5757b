"""Names of a volume's objects below its prefix: made by str(), understood by parse(). Pure.

    volume.json                      what the volume was born as
    data/<epoch>.<attempt>.<n>       bytes of pages
    epoch/<epoch>                    the record of an epoch
    checkpoint/<epoch>.<hash>        the extent map as of the record with that hash (R15)
    snapshot/<name>                  a name for an epoch
    gc/<n>                           what a collection is about to delete

Numbers are lower-case hex digits of fixed width, so that a listing, which stores give in the order of
bytes, is in the order of numbers: 16 for epochs and collections, 4 for the n of data. An attempt (128
random bits) has 32, a hash (sha256) 64. A name has one spelling, and is never used twice (I15).
"""

from __future__ import annotations

import re
from typing import NamedTuple

BIRTH = "volume.json"
ATTEMPT_BYTES = 16
HASH_BYTES = 32
EPOCH_MAX = (1 << 64) - 1
N_MAX = 0xFFFF

_SNAPSHOT = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,63}")
_FORMS = (
    ("data", re.compile(r"data/([0-9a-f]{16})\.([0-9a-f]{32})\.([0-9a-f]{4})")),
    ("epoch", re.compile(r"epoch/([0-9a-f]{16})")),
    ("checkpoint", re.compile(r"checkpoint/([0-9a-f]{16})\.([0-9a-f]{64})")),
    ("snapshot", re.compile(rf"snapshot/({_SNAPSHOT.pattern})")),
    ("gc", re.compile(r"gc/([0-9a-f]{16})")),
)


class BirthName(NamedTuple):
    """volume.json"""

    def __str__(self) -> str:
        return BIRTH


class DataName(NamedTuple):
    """Data object n (0 to N_MAX) that an attempt (16 bytes) at an epoch (from 1) uploaded."""

    epoch: int
    attempt: bytes
    n: int

    def __str__(self) -> str:
        """The name. ValueError, here and below, when a part cannot be."""
        attempt = _hex(self.attempt, ATTEMPT_BYTES, "an attempt")
        return f"data/{_number(self.epoch, 1)}.{attempt}.{_number(self.n, 0, N_MAX, digits=4)}"


class EpochName(NamedTuple):
    """The record of an epoch (from 1)."""

    epoch: int

    def __str__(self) -> str:
        return f"epoch/{_number(self.epoch, 1)}"


class CheckpointName(NamedTuple):
    """The extent map at an epoch (from 1), by the hash (32 bytes) of that epoch's record."""

    epoch: int
    hash: bytes

    def __str__(self) -> str:
        return f"checkpoint/{_number(self.epoch, 1)}.{_hex(self.hash, HASH_BYTES, 'a hash')}"


class SnapshotName(NamedTuple):
    """A snapshot: 1 to 64 of a-z, 0-9, dot, underscore and dash, and no dot first."""

    name: str

    def __str__(self) -> str:
        if _SNAPSHOT.fullmatch(self.name) is None:
            raise ValueError(
                "a snapshot's name is 1 to 64 of [a-z0-9._-] and does not begin with a dot; "
                f"this is {self.name!r:.80}"
            )
        return f"snapshot/{self.name}"


class GcName(NamedTuple):
    """The list of what collection n (from 0) will delete."""

    n: int

    def __str__(self) -> str:
        return f"gc/{_number(self.n, 0)}"


Name = BirthName | DataName | EpochName | CheckpointName | SnapshotName | GcName


def parse(name: str) -> Name | None:
    """What the object of this name (without the prefix) is; None: none of the volume's."""
    if name == BIRTH:
        return BirthName()
    for kind, form in _FORMS:
        match = form.fullmatch(name)
        if match is not None:
            return _made(kind, match.groups())
    return None


def _made(kind: str, parts: tuple[str, ...]) -> Name | None:
    if kind == "snapshot":
        return SnapshotName(parts[0])
    number = int(parts[0], 16)
    if kind == "gc":
        return GcName(number)
    if number == 0:  # epochs begin with 1
        return None
    if kind == "data":
        return DataName(number, bytes.fromhex(parts[1]), int(parts[2], 16))
    if kind == "checkpoint":
        return CheckpointName(number, bytes.fromhex(parts[1]))
    return EpochName(number)


def _number(number: int, least: int, most: int = EPOCH_MAX, digits: int = 16) -> str:
    if not least <= number <= most:
        raise ValueError(f"a number in an object's name is {least} to {most}, not {number}")
    return f"{number:0{digits}x}"


def _hex(value: bytes, size_bytes: int, what: str) -> str:
    if len(value) != size_bytes:
        raise ValueError(f"{what} has {size_bytes} bytes, not {len(value)}")
    return value.hex()
