"""What a device was asked for while a system boots: the kernel's own record of its requests (tracefs), exact
and cheap. Used on the host and inside the VM, so it knows the standard library only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

PAGE_BYTES = 4096
SECTOR_BYTES = 512
BUFFER_KIB = 8192
EVENTS = ("block_rq_issue", "block_rq_complete")
COLUMNS = "issued_s,done_s,offset_bytes,length_bytes,ahead,process"
# systemd-1  [000] .....  12.345678: block_rq_issue: 259,0 RA 131072 () 2048 + 256 none,0,0 [systemd]
LINE = re.compile(
    r"\s*(?P<process>.+?)-\d+\s+\[\d+\]\s+\S+\s+(?P<time>\d+\.\d+): block_rq_(?P<what>issue|complete): "
    r"(?P<device>\d+,\d+) (?P<kind>[A-Z]+) (?:\d+ )?\(.*?\) (?P<sector>\d+) \+ (?P<sectors>\d+) "
)


@dataclass(frozen=True)
class Request:
    """One read of the device. Times in seconds of CLOCK_MONOTONIC; `done_s` is None when the trace ended
    before. `ahead`: the guest's kernel read ahead, nobody had asked. `process`: in whose name it was issued.
    """

    issued_s: float
    done_s: float | None
    offset_bytes: int
    length_bytes: int
    ahead: bool
    process: str


class Recorder:
    """Records every request of every block device, in a trace buffer of its own that nothing else uses."""

    def __init__(self, tracefs: Path) -> None:
        """tracefs: where it is mounted. Raises OSError when this kernel has no block events."""
        self._folder = tracefs / "instances/tierblk-demo"
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()  # of one that was killed
        self._folder.mkdir()
        self._write("trace_clock", "mono")
        self._write("buffer_size_kb", str(BUFFER_KIB))
        for event in EVENTS:
            self._write(f"events/block/{event}/enable", "1")

    def only(self, device: str) -> None:
        """From now on requests of this device only ("259:0"): others may be many."""
        major, minor = device.split(":")
        for event in EVENTS:
            self._write(f"events/block/{event}/filter", f"dev == {int(major) << 20 | int(minor)}")

    def stop(self) -> tuple[list[str], bool]:
        """(the lines since the start, whether that is all of them)."""
        self._write("tracing_on", "0")
        lines = (self._folder / "trace").read_text(errors="replace").splitlines()
        lost = [(each / "stats").read_text() for each in (self._folder / "per_cpu").glob("cpu*")]
        whole = all(re.search(r"^overrun: 0$", text, re.MULTILINE) for text in lost)
        self.close()
        return lines, whole

    def close(self) -> None:
        """Gives the buffer back; once is enough, twice does no harm."""
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)


def requests(lines: Iterable[str], device: str) -> list[Request]:
    """The reads of a device ("259:0") in the order of their issue."""
    wanted = device.replace(":", ",")
    found: list[Request] = []
    open_at: dict[int, int] = {}
    for line in lines:
        event = LINE.match(line)
        if event is None or event["device"] != wanted or not event["kind"].startswith("R"):
            continue
        sector, time_s = int(event["sector"]), float(event["time"])
        if event["what"] == "issue":
            open_at[sector] = len(found)
            length = int(event["sectors"]) * SECTOR_BYTES
            ahead = "A" in event["kind"]
            found.append(
                Request(time_s, None, sector * SECTOR_BYTES, length, ahead, event["process"].strip())
            )
        elif (place := open_at.pop(sector, None)) is not None:
            found[place] = replace(found[place], done_s=time_s)
    return found


def first_read_bytes(reads: Iterable[Request]) -> int:
    """How much was read at least once, in whole pages."""
    pages: set[int] = set()
    for each in reads:
        end = each.offset_bytes + each.length_bytes
        pages.update(range(each.offset_bytes // PAGE_BYTES, -(-end // PAGE_BYTES)))
    return len(pages) * PAGE_BYTES


def to_csv(reads: Iterable[Request]) -> str:
    """A line a request, times since the first."""
    lines, began_s = [COLUMNS], None
    for each in reads:
        began_s = each.issued_s if began_s is None else began_s
        done = "" if each.done_s is None else f"{each.done_s - began_s:.6f}"
        process = each.process.replace(",", " ")
        lines.append(
            f"{each.issued_s - began_s:.6f},{done},{each.offset_bytes},{each.length_bytes},"
            f"{int(each.ahead)},{process}"
        )
    return "\n".join(lines) + "\n"


def from_csv(text: str) -> list[Request]:
    """What `to_csv` wrote. ValueError when it is something else."""
    head, *lines = text.splitlines() or [""]
    if head != COLUMNS:
        raise ValueError("this is no trace of a boot: its first line is not the list of columns")
    found = []
    for line in lines:
        issued, done, offset, length, ahead, process = line.split(",")
        found.append(
            Request(
                float(issued), float(done) if done else None, int(offset), int(length), ahead == "1", process
            )
        )
    return found
