"""The machine for volumes: random traces of writes of every alignment, flushes, discards, fills, evictions,
commits, kills and power cuts, against a model of every sector (volume_world.py)."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.property.effort import effort
from tests.property.gate import FAILURES, POINTS
from tests.property.volume_world import SECTORS, Op, VolumeWorld

PER_PAGE, PER_BLOCK = 8, 128


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """(first sector, sectors): often near the same places, of whole pages or not, up to several blocks."""
    unit = draw(st.sampled_from([1, 1, PER_PAGE, PER_BLOCK]))
    count = draw(st.integers(1, 24 if unit == 1 else 40 if unit == PER_PAGE else 4)) * unit
    at = draw(
        st.one_of(
            st.integers(0, 2 * PER_BLOCK),
            st.integers(0, SECTORS - 1),
            st.integers(SECTORS - 300, SECTORS - 1),
        )
    )
    at = at // unit * unit
    return at, min(count, SECTORS - at)


@st.composite
def changes(draw: st.DrawFn) -> Op:
    kind = draw(st.sampled_from(["write", "write", "write", "discard", "zeroes"]))
    at, count = draw(spans())
    return Op(kind, at, count, draw(st.booleans()) if kind != "discard" else False)


class VolumeMachine(RuleBasedStateMachine):
    world: VolumeWorld

    @initialize(slots=st.sampled_from([6, 15, 15, 40]), has_base=st.booleans())
    def begin(self, slots: int, has_base: bool) -> None:
        self.world = VolumeWorld(slots, has_base=has_base)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    def do(self, *ops: Op) -> None:
        """A FLUSH waits for a commit that is held, and so would we."""
        if any(op.kind == "flush" or op.flag for op in ops):
            self.world.let_go()
        self.world.together(ops)

    @rule(op=changes())
    def change(self, op: Op) -> None:
        self.do(op)

    @rule(ops=st.lists(changes(), min_size=2, max_size=6), span=spans())
    def change_together(self, ops: list[Op], span: tuple[int, int]) -> None:
        self.do(*ops, Op("read", *span))

    @rule(at=st.integers(0, SECTORS - PER_PAGE), ops=st.integers(2, 8))
    def write_one_page_together(self, at: int, ops: int) -> None:
        """R4: neighbours in a page."""
        first = at // PER_PAGE * PER_PAGE
        self.do(*(Op("write", first + i % PER_PAGE, 1 if i % 3 else PER_PAGE) for i in range(ops)))
        self.world.verify()

    @rule(span=spans())
    def read(self, span: tuple[int, int]) -> None:
        self.do(Op("read", *span))

    @rule()
    def flush(self) -> None:
        self.do(Op("flush"))

    @rule(op=changes())
    def change_and_flush(self, op: Op) -> None:
        self.do(op)
        self.do(Op("flush"))

    @rule()
    def verify(self) -> None:
        self.world.verify()

    @rule(span=spans(), page=st.integers(0, SECTORS // PER_PAGE - 1), count=st.integers(1, 40))
    def write_while_a_fetch_runs(self, span: tuple[int, int], page: int, count: int) -> None:
        """A write never waits for the network, and no fill overwrites it (I7, R5)."""
        self.world.read_behind(Op("read", *span), Op("write", page * PER_PAGE, count * PER_PAGE))

    @rule()
    def seal(self) -> None:
        self.world.seal()

    @rule(ops=st.lists(changes(), min_size=1, max_size=6))
    def seal_change_and_end(self, ops: list[Op]) -> None:
        """R10, R11: nothing of what comes after a seal is in its epoch."""
        self.world.seal()
        self.do(*ops)
        self.world.end_epoch()

    @rule()
    def end_epoch(self) -> None:
        self.world.end_epoch()

    @rule(passes=st.integers(1, 2))
    def settle(self, passes: int) -> None:
        self.world.settle(passes)

    @rule()
    def evict(self) -> None:
        self.world.evict()

    @rule(failing=st.sampled_from([None, None, None, None, *FAILURES]))
    def commit(self, failing: str | None) -> None:
        self.world.commit(failing=failing)

    @rule(point=st.sampled_from(POINTS))
    def hold_a_commit(self, point: str) -> None:
        if self.world.held is None and not self.world.refused:
            self.world.commit(hold=point)

    @rule(point=st.sampled_from(POINTS), op=changes(), later=changes(), seed=st.integers(0, 2**32))
    def flush_while_a_commit_runs_and_cut(self, point: str, op: Op, later: Op, seed: int) -> None:
        """R7: its rows are taken and not yet durable; a FLUSH that comes now may not trust them."""
        if self.world.refused:
            return
        self.world.let_go()
        self.world.together([op])
        self.world.commit(hold=point)
        if not later.flag:
            self.world.together([later])
        self.world.flush_if_it_does_not_wait()
        self.world.crash(kill=False, seed=seed)

    @rule()
    def stop(self) -> None:
        self.world.stop()

    @rule(ops=st.lists(changes(), max_size=4))
    def kill(self, ops: list[Op]) -> None:
        self.world.crash(kill=True, ops=ops)

    @rule(ops=st.lists(changes(), max_size=4), seed=st.integers(0, 2**32))
    def cut_the_power(self, ops: list[Op], seed: int) -> None:
        self.world.crash(kill=False, ops=ops, seed=seed)

    @rule(op=changes(), again=changes(), seed=st.integers(0, 2**32))
    def flush_overwrite_and_cut(self, op: Op, again: Op, seed: int) -> None:
        """An overwrite in place of what the index names, and the old bytes or the new."""
        self.do(op)
        self.do(Op("flush"))
        self.do(again)
        self.world.crash(kill=False, seed=seed)

    @rule(op=changes(), reuse=changes(), seed=st.integers(0, 2**32), flush=st.booleans())
    def discard_reuse_and_cut(self, op: Op, reuse: Op, seed: int, flush: bool) -> None:
        """I4: a slot goes from one block to another."""
        self.do(op)
        self.do(Op("flush"))
        self.do(Op("discard", op.at // PER_BLOCK * PER_BLOCK, 4 * PER_BLOCK))
        if flush:
            self.do(Op("flush"))
        self.do(reuse)
        self.world.crash(kill=False, seed=seed)

    @invariant()
    def nothing_is_violated(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


@pytest.mark.timeout(600)
class TestVolumes(VolumeMachine.TestCase):  # type: ignore[misc, valid-type]  # made at run time
    settings = effort(examples=50, steps=40, shrink=False)
