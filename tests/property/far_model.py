"""What a host may read of a volume, and what each epoch has: the model of test_writeback.py, in sectors."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from tierblk.core import BLOCK_BYTES, PAGE_BYTES

SECTOR = 512
VOLUME_BYTES = 20 * BLOCK_BYTES + 3 * PAGE_BYTES + 5 * SECTOR
SECTORS = VOLUME_BYTES // SECTOR
PAGE_SECTORS = PAGE_BYTES // SECTOR
ZEROS = bytes(SECTOR)


@dataclass(frozen=True)
class Op:
    """kind: write, discard, zeroes, flush or read; at, count: sectors; flag: FUA."""

    kind: str
    at: int = 0
    count: int = 0
    flag: bool = False

    @property
    def sectors(self) -> range:
        return range(self.at, min(self.at + self.count, SECTORS))

    @property
    def changed(self) -> range:
        """A DISCARD is of whole pages."""
        if self.kind not in ("write", "discard", "zeroes"):
            return range(0)
        if self.kind != "discard":
            return self.sectors
        stop = self.sectors.stop
        stop = stop if stop == SECTORS else stop // PAGE_SECTORS * PAGE_SECTORS
        return range(-(-self.at // PAGE_SECTORS) * PAGE_SECTORS, stop)


def sector_bytes(value: int, sector: int) -> bytes:
    return struct.pack("<QQ", value, sector) * (SECTOR // 16)


def differing(found: bytes | memoryview, expected: bytes | bytearray) -> list[int]:
    """Numbers of sectors that differ."""
    if found == expected:
        return []
    assert len(found) == len(expected)
    return [
        at // SECTOR
        for page in range(0, len(expected), PAGE_BYTES)
        if found[page : page + PAGE_BYTES] != expected[page : page + PAGE_BYTES]
        for at in range(page, min(page + PAGE_BYTES, len(expected)), SECTOR)
        if found[at : at + SECTOR] != expected[at : at + SECTOR]
    ]


class Cut(NamedTuple):
    """What an epoch has; maybe: sector -> what it may have instead, of writes that were under way."""

    content: bytes
    maybe: dict[int, set[bytes]]

    def check(self, content: bytes, epoch: int) -> None:
        for sector in differing(content, self.content):
            found = content[sector * SECTOR :][:SECTOR]
            assert found in self.maybe.get(sector, ()), (
                f"I9: epoch {epoch} has {shown(found)} in sector {sector} (page {sector // PAGE_SECTORS}), "
                f"and its cut {shown(self.content[sector * SECTOR :][:SECTOR])}"
            )


def shown(data: bytes) -> str:
    value, sector = struct.unpack_from("<QQ", data)
    return "zeros" if data == ZEROS else f"value {value} of sector {sector}"


@dataclass
class Line:
    """One history of the volume, as the users of one host see it. now: what a read brings; sure: what the
    last FLUSH made durable; since: what was written since; refused: what may be there, or not, since it was
    not acknowledged. is_cut: the power was cut since the last read."""

    now: bytearray
    sure: bytearray
    since: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    refused: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    is_cut: bool = False

    @classmethod
    def of(cls, content: bytes) -> Line:
        return cls(bytearray(content), bytearray(content))

    def cut(self, inflight: dict[int, bytes]) -> Cut:
        """For an epoch that is sealed at this instant."""
        known, maybe = (self.sure, self.since) if self.is_cut else (self.now, self.refused)
        left = {sector: set(values) for sector, values in maybe.items()}
        for sector, data in inflight.items():
            left.setdefault(sector, set()).add(data)
        return Cut(bytes(known), left)

    def begin(self, op: Op, data: bytes) -> None:
        """From here on a power cut may leave some of it."""
        for sector in op.changed:
            self.since[sector].add(data[(sector - op.changed.start) * SECTOR :][:SECTOR])

    def end(self, op: Op, data: bytes) -> None:
        changed = op.changed
        self.now[changed.start * SECTOR : changed.start * SECTOR + len(data)] = data
        if op.flag:
            self.sure[changed.start * SECTOR : changed.start * SECTOR + len(data)] = data
            for sector in changed:
                self.since.pop(sector, None)

    def refuse(self, op: Op, data: bytes) -> None:
        for sector in op.changed:
            self.refused[sector].add(data[(sector - op.changed.start) * SECTOR :][:SECTOR])

    def flushed(self) -> None:
        """A FLUSH that began when nothing was under way has ended."""
        self.sure[:] = self.now
        self.since.clear()

    def power_cut(self) -> None:
        self.is_cut = True

    def promises_more_than(self, content: bytes) -> bool:
        """Whether it has surely something that this content has not."""
        known, maybe = (self.sure, self.since) if self.is_cut else (self.now, self.refused)
        return any(sector not in maybe for sector in differing(content, known))

    def judge(self, found: bytes, at: int = 0) -> None:
        """I1, I2: a read has brought that, from a sector on."""
        known = self.sure if self.is_cut else self.now
        begin = at * SECTOR
        for index in differing(found, known[begin : begin + len(found)]):
            sector, data = at + index, found[index * SECTOR :][:SECTOR]
            allowed = (self.since if self.is_cut else self.refused).get(sector, ())
            assert data in allowed, (
                f"{'I2' if self.is_cut else 'I1'}: sector {sector} (block {sector // 128}, page "
                f"{sector // PAGE_SECTORS}) has {shown(data)}, not "
                f"{shown(bytes(known[sector * SECTOR :][:SECTOR]))} or {sorted(map(shown, allowed))}"
            )

    def settle(self, found: bytes) -> None:
        """All of it has been read: what the power cut has left stays."""
        self.judge(found)
        if self.is_cut:
            self.now[:], self.is_cut = found, False
            self.flushed()
