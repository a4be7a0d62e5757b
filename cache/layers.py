"""What the index keeps of layers, as values, and the JSON of their records. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from tierblk import address

LAYER_ID_MAX = 4095
KINDS = ("base", "local", "scratch", "write-back")


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer as the index knows it.

    A base's identity is url, size and validator: another image is another layer. A volume, kind "local",
    "scratch" or "write-back", goes by its name; url, base_size_bytes and validator are those of the base that
    it lies over, empty without one. damaged: why a write-back volume must not be shown, although object
    storage has older bytes of it; empty: it may be. pins: (first block, block behind the last) of what is
    never evicted, ascending, none touching another.
    """

    layer_id: int
    kind: str
    url: str
    size_bytes: int
    validator: str
    used_unix_s: int
    name: str = ""
    base_size_bytes: int = 0
    damaged: str = ""
    pins: tuple[tuple[int, int], ...] = ()

    @property
    def is_volume(self) -> bool:
        return self.kind != "base"

    @property
    def is_stored(self) -> bool:
        """Whether object storage has what is not dirty in a volume."""
        return self.kind == "write-back"

    @property
    def outlives_machine(self) -> bool:
        """Whether a FLUSH of it promises anything: what it keeps here may be nowhere else."""
        return self.kind in ("local", "write-back")

    @property
    def shown(self) -> str:
        """For people, without what is secret in an address."""
        return f"the volume {self.name}" if self.is_volume else address.shown(self.url)

    @property
    def shown_base(self) -> str:
        """What a volume lies over, for people."""
        return address.shown(self.url) if self.url else "no base"

    @property
    def base(self) -> tuple[str, int, str] | None:
        """(url, size_bytes, validator) of the base under a volume."""
        return (self.url, self.base_size_bytes, self.validator) if self.is_volume and self.url else None

    def has_identity(self, url: str, size_bytes: int, validator: str) -> bool:
        """Whether it is the base layer of that image."""
        return self.kind == "base" and (self.url, self.size_bytes, self.validator) == (
            url,
            size_bytes,
            validator,
        )


@dataclass(frozen=True, slots=True)
class VolumeChange:
    """What becomes durable of a volume together with rows (R6, R13); the cache does not look into it.

    state: where it stands. extents: (key of 1 to 64 bytes, value of at most 32 KiB), b"" deletes; of a key
    that is there twice the last one counts. anew: all extents that it had go first.
    """

    state: bytes
    extents: tuple[tuple[bytes, bytes], ...] = ()
    anew: bool = False


def encode_layer(record: LayerRecord) -> bytes:
    """Its JSON. Fields that older versions do not know are only there when they say something."""
    fields = asdict(record)
    del fields["layer_id"]
    for name in ("damaged", "pins"):
        if not fields[name]:
            del fields[name]
    return json.dumps(fields).encode()


def decode_layer(layer_id: int, encoded: bytes) -> LayerRecord:
    """The record of a layer. ValueError or TypeError: it is none."""
    fields = json.loads(encoded)
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    fields["pins"] = _pins(fields.get("pins", ()))
    record = LayerRecord(layer_id, **fields)
    for name, kind in (
        ("kind", str),
        ("url", str),
        ("validator", str),
        ("size_bytes", int),
        ("used_unix_s", int),
        ("name", str),
        ("base_size_bytes", int),
        ("damaged", str),
    ):
        if not isinstance(getattr(record, name), kind):
            raise ValueError(f"{name} has the wrong type")
    if not 0 < layer_id <= LAYER_ID_MAX or record.size_bytes <= 0:
        raise ValueError("a number is out of range")
    return record


def _pins(value: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    found, behind = [], -1
    for first, end in value:
        if type(first) is not int or type(end) is not int or not behind < first < end:
            raise ValueError("its pins are no ranges of blocks")
        found.append((first, end))
        behind = end
    return tuple(found)
