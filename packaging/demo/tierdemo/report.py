"""The demo's table: what went over the link first, seconds last (an emulator's seconds say little)."""

from __future__ import annotations

from pathlib import Path

from tierdemo import trace
from tierdemo.boots import Numbers

ACCELERATORS = {"kvm": "with KVM", "tcg": "emulated (10 to 20 times slower than KVM)"}
MIB = 1 << 20
WIDTHS = (34, 14, 14)


def table(cold: Numbers, warm: Numbers, image_bytes: int, allocated_bytes: int, link: dict[str, str]) -> str:
    """The whole answer as text."""
    both = (cold, warm)
    shape = ", ".join(f"{name}={value}" for name, value in link.items()) or "loopback, not shaped"
    lines = [
        "",
        f"image     {image_bytes / MIB:.0f} MiB, of which {allocated_bytes / MIB:.0f} MiB are not holes",
        f"device    {cold.device['path']}, plane {cold.device['plane']}",
        f"link      {shape}",
        "",
        _row("", "cold", "warm"),
        _row("fetched", *(f"{_fetched(one) / MIB:.1f} MiB" for one in both)),
        _row("  share of the image", *(_percent(_fetched(one), image_bytes) for one in both)),
        _row("  share of what is not a hole", *(_percent(_fetched(one), allocated_bytes) for one in both)),
        _row("read for the first time", *(_first_read(one) for one in both)),
        _row("  sent by the server for each byte", *(_amplification(one) for one in both)),
        _row("requests to the server", *(str(one.device["remote_requests"]) for one in both)),
        _row("read by Debian", *(f"{_read(one) / MIB:.1f} MiB" for one in both)),
        _row(
            "  answered by the cache",
            *(_percent(_read(one) - one.device["miss_bytes"], _read(one)) for one in both),
        ),
        _row("errors", *(str(one.device["errors"]) for one in both)),
        _row("seconds to attach", *(f"{one.attach_s:.1f}" for one in both)),
        _row("seconds from there to multi-user", *(f"{one.boot_s:.1f}" for one in both)),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, *values: str) -> str:
    cells = [
        name.ljust(WIDTHS[0]),
        *(value.rjust(width) for value, width in zip(values, WIDTHS[1:], strict=True)),
    ]
    return "".join(cells).rstrip()


def _fetched(numbers: Numbers) -> int:
    return int(numbers.device["fetched_bytes"])


def _read(numbers: Numbers) -> int:
    """Everything that the device was asked for, in bytes."""
    return sum(int(numbers.device[name]) for name in ("hit_bytes", "miss_bytes", "zero_bytes"))


def _first_read(numbers: Numbers) -> str:
    """What the booting system asked the device for at least once; the least that any cache has to fetch."""
    if numbers.reads is None:
        return "?"
    return f"{trace.first_read_bytes(numbers.reads) / MIB:.1f} MiB"


def _amplification(numbers: Numbers) -> str:
    """By the server's own log, so that nothing is forgotten that was fetched and thrown away."""
    if numbers.reads is None or not (read := trace.first_read_bytes(numbers.reads)):
        return "?"
    return f"{numbers.served_bytes / read:.2f}"


def keep(folder: Path, **boots: Numbers) -> list[Path]:
    """Writes the order of reads of each boot as a file, `bench/policy.py` replays them. Returns what there
    is.
    """
    kept = []
    for name, numbers in boots.items():
        if numbers.reads is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kept.append(folder / f"{name}.csv")
            kept[-1].write_text(trace.to_csv(numbers.reads))
    return kept


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
