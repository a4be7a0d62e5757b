"""How much `make bench` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Times in ms, sizes in MiB."""

    rounds: int = 5
    run_ms: int = 700
    hits: tuple[tuple[int, int], ...] = ((4, 32), (16, 32), (64, 32), (4, 128))
    """Size of a request in KiB, and how many at once."""
    queues_kib: tuple[int, ...] = (4, 64)
    hit_mib: int = 64
    miss_mib: int = 256
    miss_depths: tuple[int, ...] = (1, 4)

    mixed_mib: int = 512
    """What misses stream through while hits are timed."""
    write_ms: int = 1500
    """Of a run of writes: what a flush takes on a disk varies more than a hit."""
    write_mib: int = 256
    """Of the volume that is written to: more than `hit_mib`. In a run that changes rows each of its blocks is
    written once."""
    memory_warm_mib: int = 4608
    memory_mib: int = 3072
    """Read before, so that the core's rings of 65,536 records have been round; and cached while growth is
    measured, twice 24,576 blocks: what an interpreter takes now and then is little beside 40 bytes each."""
    blocks_mib: int = 256
    """Of single blocks read in random order."""

    @classmethod
    def quick(cls) -> Plan:
        """Enough to see that everything runs; its figures mean little."""
        return cls(
            rounds=1,
            run_ms=300,
            hits=((4, 32), (64, 32), (4, 128)),
            miss_mib=64,
            miss_depths=(4,),
            mixed_mib=64,
            write_ms=300,
            write_mib=128,
            memory_warm_mib=64,
            memory_mib=256,
            blocks_mib=32,
        )
