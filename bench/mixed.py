"""Hits while misses stream: 99 % of one read at a time of what is cached, while another job reads the rest of
the same device, cold, as fast as it goes.

Beside the same hits with nothing else going on, and, for what sharing a processor and a disk costs by itself,
beside the same hits while curl fetches the same image to the same filesystem."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench import fio
from bench.context import Bench
from bench.fio import FioJob
from bench.process import running
from bench.targets import MIB, Target, Tierblk, attached, read_start

SECTION = "p99-mixed"
SIZE_BYTES = 4096


def measure(bench: Bench, medium: str, folder: Path, url: str, image: Path) -> None:
    """The first `hit_mib` of the image are cached, the rest is not: a new cache in every round. Raises
    BenchError."""
    for i in range(bench.plan.rounds):
        cache_dir = folder / "mixed"
        size_mib = image.stat().st_size // MIB
        tierblk = Tierblk(bench.home / f"tierblk-mixed-{medium}", cache_dir, url, size_mib * 5 // 4 + 64)
        try:
            with attached(tierblk) as target:
                _round(bench, medium, tierblk, target, folder / "mixed.out", url, i)
        finally:
            shutil.rmtree(cache_dir, ignore_errors=True)


def _round(bench: Bench, medium: str, tierblk: Tierblk, target: Target, file: Path, url: str, i: int) -> None:
    hit_bytes, miss_bytes = bench.plan.hit_mib * MIB, bench.plan.mixed_mib * MIB
    read_start(target.path, hit_bytes)
    tierblk.wait_cached(hit_bytes)
    found = {"idle": _hits(bench, target)}
    # The bracket makes curl fetch the image over and over; a server of files does not look behind the `?`.
    endless: list[str | Path] = ["curl", "-sSf", "-o", file, f"{url}?[1-1000000]"]
    try:
        with running(endless, bench.home / "mixed-curl.out"):
            found["beside curl"] = _hits(bench, target)
    finally:
        file.unlink(missing_ok=True)
    jobs = fio.run_jobs("mixed", file=target.path, hit_size=hit_bytes, miss_size=miss_bytes)
    found["tierblk"] = jobs["hits"]
    for name, read in found.items():
        bench.sample(SECTION, medium, name, SIZE_BYTES, 1, i, read.p99_us)
    bench.result.facts[f"{SECTION} {medium}"] = {
        "hits measured": jobs["hits"].requests,
        "MB/s of the misses": jobs["misses"].bytes_per_s / 1e6,
        **{f"mean us {name}": read.mean_us for name, read in found.items()},
    }
    said = ", ".join(f"{name} {read.p99_us:.0f} us" for name, read in found.items())
    bench.progress(f"hits while misses stream, {medium}, round {i + 1}/{bench.plan.rounds}: 99 %: {said}")


def _hits(bench: Bench, target: Target) -> FioJob:
    return fio.run(
        "latency",
        file=target.path,
        size=bench.plan.hit_mib * MIB,
        bs=SIZE_BYTES,
        runtime_ms=bench.plan.run_ms,
    )
