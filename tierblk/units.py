"""Sizes and durations as people write them. Sizes are bytes (int), durations seconds (float)."""

from __future__ import annotations

import re
from decimal import Decimal

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4
PIB = 1024**5

SIZE_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": TIB,
    "PiB": PIB,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "PB": 1000**5,
}
DURATION_UNITS: dict[str, Decimal] = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
}
SIZE_RULE = 'a size is a number of bytes, or a number with a unit, such as "64KiB", "4GiB" or "10GB"'
DURATION_RULE = 'a duration is a number with a unit: "100ms", "5s", "2m" or "1h"'

# ASCII digits only (not \d), and few enough that nobody makes us compute with a million of them.
_QUANTITY = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)")


def _split(text: str) -> tuple[Decimal, str] | None:
    match = _QUANTITY.fullmatch(text.strip())
    return (Decimal(match[1]), match[2]) if match else None


def parse_size(value: str | int) -> int:
    """Bytes of "64KiB", "1.5 GiB", "10GB", "4096" or 4096. ValueError says the rule and the value."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{SIZE_RULE}; this is {value!r:.60}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"a size is not negative; this is {value}")
        return value
    parts = _split(value)
    if parts is None or parts[1] not in SIZE_UNITS:
        raise ValueError(f"{SIZE_RULE}; this is {value!r:.60}")
    size_bytes = parts[0] * SIZE_UNITS[parts[1]]
    if size_bytes != int(size_bytes):
        raise ValueError(f"a size is a whole number of bytes; {value!r:.60} is not")
    return int(size_bytes)


def format_size(size_bytes: int) -> str:
    """For people: "0 B", "512 B", "64 KiB", "1.5 GiB". At most four digits, rounded half up, binary units."""
    sign, size_bytes = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    names = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power, tenths = 0, size_bytes * 10
    while tenths >= 10 * KIB and power < len(names) - 1:  # also when rounding made it 1024.0
        power += 1
        tenths = (size_bytes * 20 // KIB**power + 1) // 2
    whole, tenth = divmod(tenths, 10)
    return f"{sign}{whole}.{tenth} {names[power]}" if tenth else f"{sign}{whole} {names[power]}"


def format_exact_size(size_bytes: int) -> str:
    """The shortest text that parse_size turns back into exactly this: "16MiB", "65537"."""
    for name in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % SIZE_UNITS[name] == 0:
            return f"{size_bytes // SIZE_UNITS[name]}{name}"
    return str(size_bytes)


def parse_duration(text: str) -> float:
    """Seconds of "100ms", "5s", "1.5m". A bare number has no unit and is refused. ValueError: the rule."""
    parts = _split(text) if isinstance(text, str) else None
    if parts is None or parts[1] not in DURATION_UNITS:
        raise ValueError(f"{DURATION_RULE}; this is {text!r:.60}")
    return float(parts[0] * DURATION_UNITS[parts[1]])


def format_duration(seconds: float) -> str:
    """The shortest text in the units of parse_duration: "200ms", "5s", "2m"."""
    if seconds and seconds % 3600 == 0:
        return f"{seconds / 3600:.0f}h"
    if seconds and seconds % 60 == 0:
        return f"{seconds / 60:.0f}m"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:g}s"
    return f"{seconds * 1000:g}ms"
