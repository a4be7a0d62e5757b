"""Misses: a cold sequential read beside curl, to the same filesystem; CPU of the daemon and of curl a GB."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench import fio
from bench.context import Bench
from bench.curl import Spent, curl
from bench.process import cpu_s
from bench.targets import MIB, Target, Tierblk, attached


def measure(bench: Bench, medium: str, folder: Path, url: str, image: Path) -> None:
    """The cache and curl's file lie in `folder`, new for every run. Raises BenchError."""
    file, size = folder / "curl.out", image.stat().st_size
    for i in range(bench.plan.rounds):
        curled = curl(url, file)
        file.unlink()
        # curl has no depth: it stands beside each of ours, so that every series has its peer.
        for depth in bench.plan.miss_depths:
            _keep(bench, medium, "curl", depth, i, size, curled)
        for depth in bench.plan.miss_depths:
            cache_dir = folder / "cold"
            tierblk = Tierblk(bench.home / "tierblk-cold", cache_dir, url, size // MIB * 5 // 4 + 64)
            try:
                with attached(tierblk) as target:
                    _run(bench, medium, tierblk, target, depth, i, size)
            finally:
                shutil.rmtree(cache_dir, ignore_errors=True)


def _run(bench: Bench, medium: str, tierblk: Tierblk, target: Target, depth: int, i: int, size: int) -> None:
    assert target.pid is not None
    before_s = cpu_s(target.pid)
    read = fio.run("misses", file=target.path, size=size, depth=depth)
    tierblk.wait_cached(size)
    spent = Spent(size / read.bytes_per_s, cpu_s(target.pid) - before_s)
    _keep(bench, medium, "tierblk", depth, i, size, spent)
    status = tierblk.status()
    bench.result.facts[f"miss {medium} x{depth}"] = {
        "remote_requests": float(status["remote_requests"]),
        "fetched_share": float(status["fetched_bytes"]) / size,
    }


def _keep(bench: Bench, medium: str, name: str, depth: int, i: int, size: int, spent: Spent) -> None:
    mb_per_s, s_per_gb = size / spent.took_s / 1e6, spent.cpu_s / (size / 1e9)
    bench.sample("miss", medium, name, MIB, depth, i, mb_per_s)
    bench.sample("cpu", medium, name, MIB, depth, i, s_per_gb)
    bench.progress(
        f"misses, {medium}, round {i + 1}/{bench.plan.rounds}: {name} x{depth} "
        f"{mb_per_s:.0f} MB/s, {s_per_gb:.2f} CPU-s/GB"
    )
