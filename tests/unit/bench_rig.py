"""Results of benchmarks, made up."""

from __future__ import annotations

from bench.results import Result, Sample

HIT_4K = ("hit", "tmpfs", 4096, 32)
MEMORY = ("memory-block", "contiguous", 0, 0)


def hits(**values: list[float]) -> Result:
    """4 KiB hits of targets; an underscore for a space."""
    result = Result(date="2026-01-01", commit="c0ffee", kernel={"release": "7.3"}, settings={"rounds": 1})
    for target, each in values.items():
        name = target.replace("_", " ")
        result.samples += [Sample(*HIT_4K[:2], name, *HIT_4K[2:], i, value) for i, value in enumerate(each)]
    return result
