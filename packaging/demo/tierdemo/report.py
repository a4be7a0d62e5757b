"""The demo's table: what went over the link first, seconds last (an emulator's seconds say little)."""

from __future__ import annotations

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


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
