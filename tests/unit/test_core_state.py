"""Property test: random traces of reads, fills in pieces, failures, evictions, commits, kills and power cuts,
on the real engine, against the image it stands for. After every step the invariants that hold for base layers
are checked."""

from __future__ import annotations

import random
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from tests.engine_rig import Rig, unpack_row
from tierblk.core import BLOCK_BYTES, ENTRIES_PER_ROW, PAGE_BYTES

BLOCKS = 12
SLOTS = 8
IMAGE = random.Random(11).randbytes(BLOCKS * BLOCK_BYTES - 5 * 512)
IMAGE = IMAGE[: 3 * BLOCK_BYTES] + bytes(BLOCK_BYTES) + IMAGE[4 * BLOCK_BYTES :]
SECTORS = len(IMAGE) // 512


class EngineMachine(RuleBasedStateMachine):
    """Steps on one engine; a read is right if it brings the image's bytes, or fails after a fill was
    failed."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tierblk-state-"))
        self.rig = Rig(self.directory, IMAGE, SLOTS)
        self.reads: list[tuple[Future[bytes], int, int]] = []
        self.may_fail = False

    def teardown(self) -> None:
        self.finish()
        self.rig.close()
        shutil.rmtree(self.directory)

    def collect(self) -> None:
        """Judges the reads that are done (I1, and I11: each exactly once)."""
        for read, offset, length in [r for r in self.reads if r[0].done()]:
            if read.exception() is None:
                assert read.result() == self.rig.expect(offset, length), (offset, length)
            else:
                assert self.may_fail, read.exception()
        self.reads = [r for r in self.reads if not r[0].done()]
        if not self.reads:
            self.may_fail = False

    def finish(self) -> None:
        self.rig.finish(*[read for read, _, _ in self.reads])
        self.collect()
        assert not self.reads

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, 400))
    def read(self, sector: int, count: int) -> None:
        if len(self.reads) > 12:
            return
        offset, length = sector * 512, min(count, SECTORS - sector) * 512
        self.reads.append((self.rig.read(offset, length), offset, length))
        self.rig.settle()
        self.collect()

    @precondition(lambda self: self.rig.asked)
    @rule(choice=st.integers(0, 1000), pages=st.integers(0, 16), final=st.booleans())
    def fill_some(self, choice: int, pages: int, final: bool) -> None:
        block = sorted(self.rig.asked)[choice % len(self.rig.asked)]
        if pages < self.rig.staged[block] or (pages == 0 and final):
            return
        self.rig.fill(block, pages, final=final)
        self.rig.until(lambda: not self.rig.finals)
        self.rig.settle()
        self.collect()

    @precondition(lambda self: self.rig.asked)
    @rule(choice=st.integers(0, 1000))
    def fail_one(self, choice: int) -> None:
        self.may_fail = True
        self.rig.fail(sorted(self.rig.asked)[choice % len(self.rig.asked)])
        self.rig.until(lambda: not self.rig.finals)
        self.rig.settle()
        self.collect()

    @rule(count=st.integers(1, SLOTS))
    def evict(self, count: int) -> None:
        self.rig.evict(count)

    @rule(ok=st.booleans())
    def commit(self, ok: bool) -> None:
        self.rig.commit(ok)

    @rule()
    def evict_commit_and_read_again(self) -> None:
        """Macro step: short random walks seldom bring a slot from one block to another."""
        self.finish()
        self.rig.evict(SLOTS)
        self.rig.commit()
        self.read(0, SECTORS)
        self.finish()

    @rule(hand_back=st.booleans())
    def kill_and_warm_start(self, hand_back: bool) -> None:
        """Nothing of the daemon survives but its files; requests of the dead door are gone with it."""
        if hand_back:
            self.finish()
        self.may_fail = True
        held = {} if self.rig.asked else self.rig.entries()
        self.rig.stop()
        self.rig.start("warm")
        assert not held or self.rig.entries() == held  # R1: nothing is lost
        for read, _, _ in self.reads:
            read.exception(10)
        self.collect()

    @rule()
    def power_cut(self) -> None:
        """The map is gone; the index is what the last commit left."""
        self.may_fail = True
        self.rig.stop()
        self.rig.start("index")
        for read, _, _ in self.reads:
            read.exception(10)
        self.collect()

    def slot_page(self, slot: int, page: int) -> bytes:
        with self.rig.slots_path.open("rb") as slots:
            slots.seek(slot * BLOCK_BYTES + page * PAGE_BYTES)
            return slots.read(PAGE_BYTES)

    def check_rows(self, rows: dict[int, bytes], what: str) -> set[int]:
        """I4: no slot twice; R2: zero and cached disjoint; I5 and I6: the slots hold the bytes that the rows
        promise."""
        owners: set[int] = set()
        for row, packed in rows.items():
            for i, (slot, present, cached, zero, dirty) in enumerate(unpack_row(packed)):
                block = row * ENTRIES_PER_ROW + i
                assert not cached & zero, what
                assert not present, what
                assert not dirty, what
                if slot:
                    assert slot not in owners, (what, slot)
                    owners.add(slot)
                for page in range(16):
                    at = block * BLOCK_BYTES + page * PAGE_BYTES
                    expected = IMAGE[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
                    if cached >> page & 1:
                        assert self.slot_page(slot, page) == expected, (what, block, page)
                    if zero >> page & 1:
                        assert not any(expected), (what, block, page)
        return owners

    @invariant()
    def rows_are_true(self) -> None:
        live = {row: packed for row in range(self.rig.layer.rows) if (packed := self.rig.layer.peek_row(row))}
        used = self.check_rows(live, "map")
        # A power cut may come now: what the index names must still be in its slots (I4's quarantine, I5).
        self.check_rows(self.rig.index, "index")
        stats = self.rig.engine.stats()
        assert stats["free"] + stats["quarantined"] + len(used) == SLOTS - 1, stats


EngineMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEngine = EngineMachine.TestCase
