"""Cold reads over a slow link, through the in-process door, beside curl: random ones, streams, and what
should not be taken for either.

The server is a process of its own that adds a delay to every request and lets all bodies out at one rate; its
log says what was fetched, so that nothing is counted twice or forgotten."""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import fio
from bench.asked import PAGE_BYTES, Asked, since, summary
from bench.curl import curl
from bench.fio import BenchError
from bench.native import CONFIG, tier
from bench.process import Progress, output
from bench.readers import Done, Piece, Readers, compiled
from bench.results import Result, Sample
from bench.shaped import Shaped, shaped
from bench.targets import MIB, make_image, nbd_over_http
from tierblk import config
from tierblk.core import local_door
from tierblk.errors import TierblkError

KIB = 1024
PEERS = {"nbdkit": "nbdkit", "nbdkit+cache": "nbdkit", "qemu": "qemu-nbd"}
"""The program that each needs; one that is missing is left out."""
LEARNT_S = 2.0
"""After this a random pattern is clear to everybody."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. `image_mib` is also what the long stream reads."""

    latency_s: float = 0.020
    bytes_per_s: float = 125e6
    image_mib: int = 1024
    stream_mib: int = 512
    short_mib: int = 128
    random_s: float = 10.0
    random_depth: int = 16
    peer_s: float = 4.0
    stream_limit_s: float = 20.0
    other_limit_s: float = 5.0
    rounds: int = 3

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that everything runs."""
        return cls(image_mib=64, stream_mib=32, short_mib=8, random_s=1.5, peer_s=1.0, rounds=1)


@dataclass(frozen=True)
class Pattern:
    """Streams of reads that run side by side, each `depth` deep; `limit_s` ends it early."""

    name: str
    streams: Sequence[Sequence[Piece]]
    depth: int
    limit_s: float | None = None


@dataclass(frozen=True)
class Run:
    """What one pattern showed. `cpu_s`: the daemon's part, all of this process but the reading threads, until
    everything was in the cache as well."""

    done: list[Done]
    cpu_s: float

    @property
    def began_s(self) -> float:
        return min(each.asked_s for each in self.done)

    @property
    def took_s(self) -> float:
        """From the first question to the last answer."""
        return max(each.asked_s + each.wait_s for each in self.done) - self.began_s

    @property
    def read_bytes(self) -> int:
        return sum(each.piece.length_bytes for each in self.done)

    def bytes_after(self, seconds: float) -> int:
        """What was asked for later than that."""
        since_s = self.began_s + seconds
        return sum(each.piece.length_bytes for each in self.done if each.asked_s > since_s)


def forward(size_bytes: int, piece_bytes: int, start_bytes: int = 0) -> list[Piece]:
    """Front to back."""
    return [Piece(start_bytes + at, piece_bytes) for at in range(0, size_bytes, piece_bytes)]


def side_by_side(count: int, size_bytes: int, image_bytes: int, piece_bytes: int) -> list[list[Piece]]:
    """So many streams, `size_bytes` together, spread over the image."""
    apart = image_bytes // count
    return [forward(size_bytes // count, piece_bytes, i * apart) for i in range(count)]


def strided(size_bytes: int, piece_bytes: int, stride_bytes: int) -> list[Piece]:
    """A piece of every stride."""
    return [Piece(at, piece_bytes) for at in range(0, size_bytes, stride_bytes)]


def scattered(image_bytes: int, seed: int) -> list[Piece]:
    """Every page of the image once, in random order."""
    places = list(range(0, image_bytes, PAGE_BYTES))
    random.Random(seed).shuffle(places)
    return [Piece(place, PAGE_BYTES) for place in places]


async def _measure(settings: config.Config, run_dir: Path, pattern: Pattern, library: Path) -> Run:
    readers = Readers(library, pattern.streams)
    async with tier(settings, run_dir) as parts:
        fills = parts.fills
        with local_door(parts.engine, parts.layer, queue_depth=64) as door:
            cpu_began_s = time.process_time()
            reading_s = await readers.read(door, pattern.depth, pattern.limit_s, refuse=parts.refuse)
            await fills.idle()
            used_s = time.process_time() - cpu_began_s - reading_s
    return Run(readers.done(), used_s)


class Cold:
    """All of it over one image. `home` is on a tmpfs, `disk` where caches and curl's file lie."""

    def __init__(self, plan: Plan, result: Result, home: Path, disk: Path, progress: Progress) -> None:
        self.plan = plan
        self.result = result
        self.home = home
        self.disk = disk
        self.progress = progress
        self.image = home / "image.raw"
        self.library = compiled(disk.parent)

    def run(self, parts: Iterable[str]) -> None:
        """The named parts. Raises BenchError."""
        make_image(self.image, self.plan.image_mib * MIB)
        for part in parts:
            {"random": self._random, "stream": self._streams, "other": self._others}[part]()

    def _random(self) -> None:
        plan = self.plan
        with shaped(self.home, self.image, latency_s=plan.latency_s) as server:
            for i in range(min(plan.rounds, 3)):
                pieces = scattered(plan.image_mib * MIB, i)
                pattern = Pattern("random", [pieces], plan.random_depth, plan.random_s)
                run, asked = self._tierblk(server, pattern)
                late = summary(since(server.log(), run.began_s + LEARNT_S))
                self._keep("cold-random", pattern, PAGE_BYTES, i, len(run.done) / run.took_s)
                self._keep("cold-cpu", pattern, PAGE_BYTES, i, run.cpu_s / len(run.done) * 1e6)
                self._facts(pattern, PAGE_BYTES, run, asked, late)
                self._keep("cold-random", pattern, PAGE_BYTES, i, self._bare(server), "bare")
                for peer, program in PEERS.items():
                    if shutil.which(program):
                        self._peer(server, pattern, peer, i)

    def _bare(self, server: Shaped) -> float:
        """IOPS of a client that does nothing but ask."""
        plan = self.plan
        words = [sys.executable, "-m", "bench.bare", str(server.port), "--depth", str(plan.random_depth)]
        words += ["--pages", str(self.image.stat().st_size // PAGE_BYTES), "--seconds", str(plan.peer_s)]
        return float(output(words))

    def _peer(self, server: Shaped, pattern: Pattern, peer: str, i: int) -> None:
        """The same reads through another program."""
        server.forget()
        size, runtime_ms = self.image.stat().st_size, int(self.plan.peer_s * 1000)
        with nbd_over_http(peer, self.home, server.url) as uri:
            read = fio.run("nbd", uri=uri, size=size, depth=pattern.depth, runtime_ms=runtime_ms, seed=i)
        asked = summary(server.log())
        self._keep("cold-random", pattern, PAGE_BYTES, i, read.iops, peer)
        self.result.facts[f"cold {pattern.name} {PAGE_BYTES // KIB} KiB x{pattern.depth}, {peer}"] = {
            "reads": read.requests,
            "GETs": asked.gets,
            "bytes sent to bytes read": asked.sent_bytes / (read.requests * PAGE_BYTES),
            "pages sent twice": asked.repeated_pages,
        }

    def _streams(self) -> None:
        """Front to back, beside curl, in turn within each round."""
        plan, size = self.plan, self.plan.stream_mib * MIB
        patterns = [
            (Pattern("forward", [forward(size, piece)], depth, plan.stream_limit_s), piece)
            for piece, depth in ((128 * KIB, 1), (128 * KIB, 2), (MIB, 1), (MIB, 2))
        ]
        small = self.home / "stream.raw"
        make_image(small, size)
        with shaped(self.home, small, latency_s=plan.latency_s, bytes_per_s=plan.bytes_per_s) as server:
            for i in range(plan.rounds):
                mb_per_s = self._curl(server)
                for pattern, piece in patterns if i % 2 == 0 else reversed(patterns):
                    run, asked = self._tierblk(server, pattern)
                    self._keep("cold-stream", pattern, piece, i, mb_per_s, "curl")
                    self._keep("cold-stream", pattern, piece, i, run.read_bytes / run.took_s / 1e6)
                    self._facts(pattern, piece, run, asked)
                    self.progress(
                        f"cold stream {piece // KIB} KiB x{pattern.depth}, round {i + 1}: "
                        f"{run.read_bytes / run.took_s / 1e6:.0f} MB/s, curl {mb_per_s:.0f}"
                    )
        small.unlink()

    def _others(self) -> None:
        """Patterns that are no single stream: for information."""
        plan, size = self.plan, self.plan.short_mib * MIB
        image = plan.image_mib * MIB
        patterns = [
            (Pattern("4 streams", side_by_side(4, size, image, 128 * KIB), 1, plan.other_limit_s), 128 * KIB),
            (
                Pattern("16 streams", side_by_side(16, size, image, 128 * KIB), 1, plan.other_limit_s),
                128 * KIB,
            ),
            (Pattern("backwards", [forward(size, 64 * KIB)[::-1]], 1, plan.other_limit_s), 64 * KIB),
            (Pattern("every 4th", [strided(size, 64 * KIB, 256 * KIB)], 1, plan.other_limit_s), 64 * KIB),
        ]
        with shaped(self.home, self.image, latency_s=plan.latency_s, bytes_per_s=plan.bytes_per_s) as server:
            for pattern, piece in patterns:
                run, asked = self._tierblk(server, pattern)
                self._keep("cold-stream", pattern, piece, 0, run.read_bytes / run.took_s / 1e6)
                self._facts(pattern, piece, run, asked)

    # -- one run ---

    def _tierblk(self, server: Shaped, pattern: Pattern) -> tuple[Run, Asked]:
        cache_dir, run_dir, file = self.disk / "cache", self.home / "run", self.home / "tierblk.toml"
        cache_mib = self.plan.image_mib * 5 // 4 + 64
        file.write_text(CONFIG.format(url=server.url, cache_dir=cache_dir, cache_mib=cache_mib))
        server.forget()
        try:
            run = asyncio.run(_measure(config.load(file), run_dir, pattern, self.library))
        except (TierblkError, OSError) as error:
            raise BenchError(f"{pattern.name} through the in-process door: {error}") from None
        finally:
            shutil.rmtree(cache_dir, ignore_errors=True)
            shutil.rmtree(run_dir, ignore_errors=True)
        return run, summary(server.log())

    def _curl(self, server: Shaped) -> float:
        """MB/s of the whole image."""
        file = self.disk / "curl.out"
        took_s = curl(server.url, file).took_s
        size = file.stat().st_size
        file.unlink()
        return size / took_s / 1e6

    def _keep(
        self, section: str, pattern: Pattern, size: int, i: int, value: float, target: str = "tierblk"
    ) -> None:
        self.result.samples.append(Sample(section, pattern.name, target, size, pattern.depth, i, value))

    def _facts(self, pattern: Pattern, size: int, run: Run, asked: Asked, late: Asked | None = None) -> None:
        """Of the last round; what is wanted of each is in docs/benchmarks.md."""
        waits = sorted(each.wait_s for each in run.done)
        facts = {
            "reads": len(run.done),
            "seconds": run.took_s,
            "GETs": asked.gets,
            "GETs a read": asked.gets / len(run.done),
            "bytes sent to bytes read": asked.sent_bytes / run.read_bytes,
            "pages sent twice": asked.repeated_pages,
            "CPU-us a read": run.cpu_s / len(run.done) * 1e6,
            "CPU-s a GB": run.cpu_s / (run.read_bytes / 1e9),
            "median wait ms": waits[len(waits) // 2] * 1e3,
            "p99 wait ms": waits[len(waits) * 99 // 100] * 1e3,
            "longest wait ms": waits[-1] * 1e3,
        }
        if late is not None and (learnt_bytes := run.bytes_after(LEARNT_S)):
            facts[f"bytes sent to bytes read after {LEARNT_S:g} s"] = late.sent_bytes / learnt_bytes
        name = f"cold {pattern.name} {size // KIB} KiB x{pattern.depth}"
        self.result.facts[name] = facts
        self.progress(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in facts.items()))


PARTS = ("random", "stream", "other")


def measure(plan: Plan, result: Result, disk: Path, progress: Progress, parts: Sequence[str] = PARTS) -> None:
    """Adds the samples of cold reads; `disk`: a folder on the disk that is measured. Raises BenchError."""
    with (
        tempfile.TemporaryDirectory(prefix="tierblk-cold-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="cold-", dir=disk) as folder,
    ):
        Cold(plan, result, Path(memory), Path(folder), progress).run(parts)
