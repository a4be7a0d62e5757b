"""Where a volume's cache stands beside its store, as the index keeps it: whose it is, which records it may
have made, and whether it may still make any (R12, R16, R18, R19). Pure.

The epoch and its record's hash are not here: they are the extent map's, which is kept in the same
transaction.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

ID_BYTES = 16
_RANDOM_BYTES = 6

Intent = tuple[int, bytes]
"""An epoch, and the attempt at it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """url: of the volume's prefix. writer: who makes its records, see new_writer. intents: attempts whose
    record may exist although the extent map does not have it. held: the last record here is our claim or
    stands on it. fenced: why nothing may be written any more; "": nothing of the kind."""

    uuid: UUID
    url: str
    writer: bytes
    intents: tuple[Intent, ...] = ()
    held: bool = False
    fenced: str = ""

    def intend(self, epoch: int, attempt: bytes) -> Standing:
        """With one more attempt that may come to be a record."""
        return replace(self, intents=(*self.intents, (epoch, attempt)))

    def at(self, epoch: int) -> Standing:
        """The extent map is at that epoch: earlier attempts mean nothing any more."""
        return replace(self, intents=tuple(intent for intent in self.intents if intent[0] > epoch))

    def fence(self, reason: str) -> Standing:
        """Somebody else writes the volume now."""
        return replace(self, fenced=reason, held=False)

    def hold(self, held: bool) -> Standing:
        """With the claim, or without it."""
        return replace(self, held=held)

    def is_ours(self, epoch: int, attempt: bytes) -> bool:
        """Whether that record is one of our attempts."""
        return (epoch, attempt) in self.intents


def new_writer() -> bytes:
    """16 bytes for the records of a cache: random ones, then the begin of this host's name, for people."""
    name = socket.gethostname().encode()[: ID_BYTES - _RANDOM_BYTES]
    return os.urandom(_RANDOM_BYTES) + name.ljust(ID_BYTES - _RANDOM_BYTES, b"\0")


def shown_writer(writer: bytes) -> str:
    """A writer for messages: its host's name, if that can be read, and the rest in hex (I12)."""
    name = writer[_RANDOM_BYTES:].rstrip(b"\0").decode("ascii", "replace")
    known = name and name.isprintable() and "\ufffd" not in name
    return f"{name} ({writer[:_RANDOM_BYTES].hex()})" if known else writer.hex()


def encode(standing: Standing) -> bytes:
    """As the index keeps it."""
    return json.dumps(
        {
            "uuid": str(standing.uuid),
            "url": standing.url,
            "writer": standing.writer.hex(),
            "intents": [[epoch, attempt.hex()] for epoch, attempt in standing.intents],
            "held": standing.held,
            "fenced": standing.fenced,
        }
    ).encode()


def decode(data: bytes) -> Standing:
    """ValueError: these bytes are none."""
    try:
        fields = json.loads(data)
        standing = Standing(
            UUID(fields["uuid"]),
            _is(str, fields["url"]),
            _id(fields["writer"]),
            tuple((_is(int, epoch), _id(attempt)) for epoch, attempt in fields["intents"]),
            _is(bool, fields["held"]),
            _is(str, fields["fenced"]),
        )
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not where a volume stands: {error!r:.100}") from None
    return standing


def _is(kind: type[Any], value: object) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.60} is no {kind.__name__}")
    return value


def _id(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != ID_BYTES:
        raise ValueError(f"{text!r:.60} is no id")
    return value
