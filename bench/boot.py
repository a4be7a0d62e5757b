"""What a boot reads, replayed (bench/policy.py), as figures of a result: what `make demo` finds with a VM,
within a second. No device, no network."""

from __future__ import annotations

from bench import policy
from bench.results import Result, Sample


def measure(result: Result) -> None:
    """Adds the samples of the kept boot, over a link of 20 ms and 1 Gbit/s; other policies stand beside.
    Raises BenchError."""
    reads = policy.load(policy.BOOT)
    image_bytes, window_blocks = policy.IMAGE_MIB * policy.MIB, policy.blocks_of(policy.WINDOW_MIB)
    for name, streams in policy.policies(image_bytes, window_blocks).items():
        got = policy.replay(reads, streams, image_bytes, window_blocks, policy.Link(), policy.THINK)
        figures = {"boot-bytes": got.ratio, "boot-gets": float(got.gets), "boot-wait": got.stalled_s}
        for section, value in figures.items():
            result.samples.append(Sample(section, "replay", name, 0, 0, 0, value))
