"""How much `make bench` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Times in ms, sizes in MiB."""

    rounds: int = 5
    run_ms: int = 1000
    sizes_kib: tuple[int, ...] = (4, 16, 64)
    hit_mib: int = 64
    miss_mib: int = 256
    miss_depths: tuple[int, ...] = (1, 4)

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that everything runs; its figures mean little."""
        return cls(rounds=1, run_ms=300, sizes_kib=(4, 64), miss_mib=64, miss_depths=(4,))
