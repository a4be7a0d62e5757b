"""Power cuts: a cache directory on a disk whose writes are logged, brought back as it was at each FLUSH that
was acknowledged and at points between, and served again: nothing that was flushed is lost, and no page is
another's."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from tests.torture.logwrites import Log
from tests.torture.rig import MIB, SAY_EACH_S, say
from tests.vm.guest.helpers import COMMAND_LIMIT_S, Tierblk, mounted, run
from tierblk.rundir import RUN_DIR_VARIABLE

PAGE = 4096
DISK_BYTES = 96 * MIB
LOG_BYTES = 6 * 1024 * MIB
CACHE = "20MiB"
VOLUME_BYTES = 12 * MIB
FLUSH_EACH = 12
_STAMP = struct.Struct("<QQ")


class _Progress:
    """A line now and then."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._said_s >= SAY_EACH_S:
            self._said_s = time.monotonic()
            say(text)


def page_of(number: int, version: int) -> bytes:
    """A page that says whose it is; version 0 is zeros."""
    if not version:
        return bytes(PAGE)
    stamp = _STAMP.pack(number, version)
    return (stamp + struct.pack("<I", crc32(stamp))).ljust(32, b"\0") * (PAGE // 32)


def version_of(number: int, page: bytes) -> int | None:
    """None: it is not a page that was ever written there, as a whole."""
    version = _STAMP.unpack_from(page)[1]
    return version if page == page_of(number, version) else None


@dataclass
class History:
    """What was done. pages: of each page the versions that were written, by when; a discard is one that reads
    as zeros. flushed: for each FLUSH that was acknowledged how many operations it covers, and how many had
    begun by then."""

    operations: int = 0
    pages: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    flushed: list[tuple[int, int]] = field(default_factory=list)

    def write(self, number: int, version: int) -> None:
        self.pages.setdefault(number, [(0, 0)]).append((self.operations, version))

    def allowed(self, number: int, covered: int, begun: int) -> set[int]:
        """The newest version that is covered, and all that came later and had begun."""
        history = self.pages.get(number, [(0, 0)])
        newest = max(at for at, _ in history if at <= covered)
        return {version for at, version in history if newest <= at <= begun}


@dataclass(frozen=True)
class Cuts:
    """count: how many cuts; a third of them between two marks."""

    seed: int
    count: int
    folder: Path


@contextmanager
def _loop(file: Path, size_bytes: int) -> Iterator[Path]:
    with open(file, "ab") as sparse:
        sparse.truncate(size_bytes)
    device = Path(run("losetup", "--find", "--show", file))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def _logged(data: Path, log: Path, name: str) -> Iterator[Path]:
    sectors = run("blockdev", "--getsz", data)
    run("dmsetup", "create", "--noudevsync", name, "--table", f"0 {sectors} log-writes {data} {log}")
    try:  # by the kernel's name for it: there may be no udev that makes others
        yield Path("/dev") / run("dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", name)
    finally:
        run("dmsetup", "remove", "--noudevsync", "--retry", name)


def _work(device: Path, plan: Cuts, mark: str, progress: _Progress) -> History:
    """Writes, discards and flushes; each FLUSH is marked in the log when it was acknowledged."""
    chance, history = random.Random(plan.seed), History()
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    buffer = mmap.mmap(-1, 64 * PAGE)
    pages = VOLUME_BYTES // PAGE
    try:
        for flush in range(plan.count):
            # Every other one overwrites pages that are there: no row changes, and C alone makes it durable.
            again = flush % 2 == 1
            for _ in range(2 if again else FLUSH_EACH):
                history.operations += 1
                count = chance.choice([1, 1, 2, 16, 40])
                first = chance.randrange(0, pages - count)
                if again:
                    there = [number for number, versions in history.pages.items() if versions[-1][1]]
                    first, count = chance.choice(sorted(there)), 1
                elif chance.random() < 0.15:
                    run(
                        "blkdiscard",
                        "--offset",
                        str(first * PAGE),
                        "--length",
                        str(count * PAGE),
                        "--force",
                        device,
                    )
                    for number in range(first, first + count):
                        history.write(number, 0)
                    continue
                version = history.operations
                view = memoryview(buffer)[: count * PAGE]
                view[:] = b"".join(page_of(first + i, version) for i in range(count))
                for number in range(first, first + count):
                    history.write(number, version)
                os.pwritev(fd, [view], first * PAGE)
            covered = history.operations
            os.fdatasync(fd)
            history.flushed.append((covered, history.operations))
            run("dmsetup", "message", mark, "0", "mark", f"flush-{flush}")
            progress(f"{flush + 1} of {plan.count} flushes")
    finally:
        os.close(fd)
    return history


def _cut_points(log: Log, plan: Cuts) -> list[tuple[int, int]]:
    """(entries that are kept, flushes that were acknowledged by then), ascending."""
    marks = [at for at, entry in enumerate(log.entries) if entry.mark.startswith("flush-")]
    chance = random.Random(plan.seed + 1)
    points = [(at + 1, number + 1) for number, at in enumerate(marks)]
    between = []
    for number in range(len(marks) - 1):
        if marks[number + 1] - marks[number] > 2:
            between.append((chance.randrange(marks[number] + 2, marks[number + 1]), number + 1))
    chance.shuffle(between)
    extra = between[: plan.count // 3]
    return sorted(points[len(extra) :] + extra)


def _look(tierblk: Tierblk, config: Path, history: History, flushes: int, where: str) -> list[str]:
    """What is wrong with the volume as it came back."""
    covered = history.flushed[flushes - 1][0]
    begun = history.flushed[flushes][1] if flushes < len(history.flushed) else history.operations
    wrong = []
    device = tierblk.attach(config)
    try:
        with open(device, "rb", buffering=0) as file:
            for number in range(VOLUME_BYTES // PAGE):
                page = file.read(PAGE)
                allowed = history.allowed(number, covered, begun)
                found = version_of(number, page)
                torn = {page[at : at + 512] for at in range(0, PAGE, 512)} <= {
                    page_of(number, version)[:512] for version in allowed
                }
                if found not in allowed and not torn:
                    wrong.append(
                        f"{where}: page {number} has version {found}, allowed are {sorted(allowed)[:5]}"
                    )
    finally:
        tierblk.run("stop")
    return wrong[:5]


def go(plan: Cuts) -> dict[str, Any]:
    """The summary: how many cuts, and what was wrong."""
    progress = _Progress()
    for module in ("loop", "dm-log-writes"):  # where they are not built in
        subprocess.run(["modprobe", module], capture_output=True, timeout=COMMAND_LIMIT_S)
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    name = f"tierblk-cuts-{os.getpid()}"
    disk = plan.folder / "disk"
    tierblk = Tierblk(plan.folder / "configs")
    keys: dict[str, Any] = {
        "volume__mode": "local",
        "volume__size": f"{VOLUME_BYTES}B",
        "cache__commit_interval": "300ms",
    }
    config = tierblk.config("cuts", None, disk / "cache", CACHE, **keys)
    with (
        _loop(plan.folder / "data.img", DISK_BYTES) as data,
        _loop(plan.folder / "log.img", LOG_BYTES) as log,
        _logged(data, log, name) as logged,
    ):
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", logged)
        with mounted(logged, disk):
            device = tierblk.attach(config)
            history = _work(device, plan, name, progress)
            status = tierblk.status("cuts")
            tierblk.run("stop")
    kept = Log(plan.folder / "log.img")
    points = _cut_points(kept, plan)
    wrong: list[str] = []
    image, applied = plan.folder / "replayed.img", 0
    with open(image, "w+b") as replayed:
        replayed.truncate(DISK_BYTES)
        for number, (upto, flushes) in enumerate(points):
            for entry in kept.entries[applied:upto]:
                kept.apply(entry, replayed.fileno())
            applied = upto
            copy = plan.folder / "cut.img"
            run("cp", "--sparse=always", image, copy)
            wrong += _after(tierblk, config, copy, disk, history, flushes, f"cut {number} at entry {upto}")
            copy.unlink()
            progress(f"{number + 1} of {len(points)} cuts, {len(wrong)} wrong")
    kept.close()
    shutil.rmtree(plan.folder)
    return {
        "cuts": len(points),
        "between_marks": sum(1 for upto, _ in points if not kept.entries[upto - 1].mark),
        "log_entries": len(kept.entries),
        "operations": history.operations,
        "flushes": status["flush_requests"],
        "flushes_by_commit": status["flush_commits"],
        "wrong": wrong,
    }


def _after(
    tierblk: Tierblk, config: Path, copy: Path, disk: Path, history: History, flushes: int, where: str
) -> Sequence[str]:
    """The machine comes back: a fresh /run, the filesystem's journal, the daemon."""
    before = os.environ.get(RUN_DIR_VARIABLE)
    fresh = Path(f"/run/tierblk-cut-{os.getpid()}")
    os.environ[RUN_DIR_VARIABLE] = str(fresh)
    try:
        with _loop(copy, DISK_BYTES) as device, mounted(device, disk):
            return _look(tierblk, config, history, flushes, where)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if before is None:
            del os.environ[RUN_DIR_VARIABLE]
        else:
            os.environ[RUN_DIR_VARIABLE] = before
