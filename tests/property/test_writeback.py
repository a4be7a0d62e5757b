"""The machine for write-back: two hosts share a store and hop, take over, crash, lose answers and caches,
against a model of what each of them may read and of what each epoch has (far_world.py).

Steps are macros (a whole epoch, evict and miss, detach and hop): single ones at random would seldom meet.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.property.effort import effort
from tests.property.far_front import POINTS
from tests.property.far_host import FarHost
from tests.property.far_model import SECTORS, Op
from tests.property.far_world import FarWorld
from tests.property.gate import POINTS as CYCLE_POINTS
from tierblk.claim import Wishes

PER_PAGE, PER_BLOCK = 8, 128
TAKE_OVER = Wishes(take_over=True)

seeds = st.integers(0, 2**32)
which = st.integers(0, 1)


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """(first sector, sectors): often near the same places, of whole pages or not, up to several blocks."""
    unit = draw(st.sampled_from([1, PER_PAGE, PER_PAGE, PER_BLOCK]))
    count = draw(st.integers(1, 24 if unit == 1 else 20 if unit == PER_PAGE else 4)) * unit
    at = draw(st.one_of(st.integers(0, 2 * PER_BLOCK), st.integers(0, SECTORS - 1), st.just(SECTORS - 40)))
    at = at // unit * unit
    return at, min(count, SECTORS - at)


@st.composite
def changes(draw: st.DrawFn) -> Op:
    kind = draw(st.sampled_from(["write", "write", "write", "discard", "zeroes"]))
    at, count = draw(spans())
    return Op(kind, at, count, kind != "discard" and draw(st.integers(0, 5)) == 0)


batches = st.lists(changes(), min_size=1, max_size=5)


class WriteBackMachine(RuleBasedStateMachine):
    world: FarWorld

    @initialize(
        slots=st.sampled_from([20, 32, 48]),
        has_base=st.booleans(),
        durability=st.sampled_from(["local", "local", "remote"]),
        compression=st.sampled_from(["none", "none", "zstd"]),
    )
    def begin(self, slots: int, has_base: bool, durability: str, compression: str) -> None:
        self.world = FarWorld(slots, has_base=has_base, durability=durability, compression=compression)
        self.world.run(self.world.attach(self.world.hosts[0]))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    # -- who ---

    async def user(self, which: int) -> FarHost:
        """A host that has the volume: this one, or the other, or this one attaches."""
        first, second = self.world.hosts[which], self.world.hosts[1 - which]
        for host in (first, second):
            if host.is_attached:
                return host
        for wishes in (Wishes(), TAKE_OVER, Wishes(take_over=True, discard_local=True)):
            if await self.world.attach(first, wishes):
                return first
        raise AssertionError("an attach that allows everything is refused")

    def holder(self) -> int:
        """Of the newest epoch, if there is one."""
        return next((i for i, host in enumerate(self.world.hosts) if self.world.is_head_of(host)), 0)

    async def change_all(self, host: FarHost, ops: list[Op]) -> None:
        for op in ops:
            await self.world.do(host, op)

    # -- users ---

    @rule(which=which, ops=batches)
    def change(self, which: int, ops: list[Op]) -> None:
        async def do() -> None:
            await self.change_all(await self.user(which), ops)

        self.world.run(do())

    @rule(which=which, ops=batches)
    def change_and_flush(self, which: int, ops: list[Op]) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.change_all(host, [*ops, Op("flush")])

        self.world.run(do())

    @rule(which=which, ops=st.lists(changes(), min_size=2, max_size=6), is_synced=st.booleans())
    def change_together_and_seal(self, which: int, ops: list[Op], is_synced: bool) -> None:
        """R10, R11: writes are under way at the seal."""

        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops[:1])
            changing = asyncio.create_task(self.world.together(host, ops))
            if is_synced:
                await asyncio.sleep(0)
                await self.world.sync(host)
            await changing
            await self.world.verify(host)

        self.world.run(do())

    @rule(which=which, span=spans())
    def read(self, which: int, span: tuple[int, int]) -> None:
        async def do() -> None:
            await self.world.do(await self.user(which), Op("read", *span))

        self.world.run(do())

    # -- epochs ---

    @rule(which=which, ops=batches)
    def change_and_sync(self, which: int, ops: list[Op]) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops)
            await self.world.sync(host)

        self.world.run(do())

    @rule(which=which, ops=batches, point=st.sampled_from(POINTS))
    def begin_an_epoch(self, which: int, ops: list[Op], point: str) -> None:
        """It stays where it is while other things happen."""

        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops)
            await self.world.begin_sync(host, point)

        self.world.run(do())

    @rule()
    def end_epochs(self) -> None:
        async def do() -> None:
            for host in self.world.hosts:
                await self.world.end_sync(host)

        self.world.run(do())

    @rule(which=which, ops=batches, later=batches, point=st.sampled_from(POINTS))
    def change_in_an_epoch(self, which: int, ops: list[Op], later: list[Op], point: str) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops)
            await self.world.begin_sync(host, point)
            await self.change_all(host, later)
            await self.world.end_sync(host)
            await self.world.evict(host)
            await self.world.verify(host)

        self.world.run(do())

    @rule(which=which, ops=batches, lost=st.integers(1, 3))
    def sync_and_lose_answers(self, which: int, ops: list[Op], lost: int) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops)
            host.front.lose = lost
            await self.world.sync(host)
            host.front.lose = 0

        self.world.run(do())

    @rule(which=which, ops=batches, later=batches)
    def lose_the_store_for_a_while(self, which: int, ops: list[Op], later: list[Op]) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops)
            host.front.down = True
            await self.world.begin_sync(host, None)
            await self.change_all(
                host, [op for op in later if not op.at % PER_PAGE and not op.count % PER_PAGE]
            )
            await self.world.end_sync(host)

        self.world.run(do())

    @rule(which=which, passes=st.integers(1, 2))
    def settle(self, which: int, passes: int) -> None:
        async def do() -> None:
            await (await self.user(which)).settle(passes)

        self.world.run(do())

    @rule(which=which)
    def evict_and_read_all(self, which: int) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.world.evict(host)
            await self.world.verify(host)

        self.world.run(do())

    # -- sessions ---

    @rule(
        which=which,
        take_over=st.booleans(),
        discard=st.sampled_from([False, False, True]),
        lost=st.integers(0, 1),
    )
    def attach(self, which: int, take_over: bool, discard: bool, lost: int) -> None:
        host = self.world.hosts[which]
        if not host.is_attached:
            self.world.run(self.world.attach(host, Wishes(take_over, discard), lose=lost))

    @rule(which=which)
    def attach_late(self, which: int) -> None:
        """The claim is sent, and nobody knows what becomes of it."""
        host = self.world.hosts[which]
        if not host.is_attached:
            self.world.run(self.world.attach(host, TAKE_OVER, late=True))

    @rule()
    def arrive(self) -> None:
        self.world.run(self.world.arrive())

    @rule(ops=batches, and_back=st.booleans())
    def hop(self, ops: list[Op], and_back: bool) -> None:
        """Detached here, attached there."""

        async def do() -> None:
            old = self.world.hosts[self.holder()]
            if old.is_attached:
                await self.world.detach(old)
            new = self.world.hosts[1 - self.holder()]
            for host in (new, old) if and_back else (new,):
                if not host.is_attached:
                    await self.world.attach(host)
                if host.is_attached:
                    await self.change_all(host, ops)
                    await self.world.detach(host)

        self.world.run(do())

    @rule(which=which)
    def detach(self, which: int) -> None:
        host = self.world.hosts[which]
        if host.is_attached:
            self.world.run(self.world.detach(host))

    @rule(which=which)
    def stop(self, which: int) -> None:
        self.world.run(self.world.stop(self.world.hosts[which]))

    @rule(ops=batches, later=batches)
    def take_over_from_one_who_goes_on(self, ops: list[Op], later: list[Op]) -> None:
        """R19: the old holder writes until it learns."""

        async def do() -> None:
            old = await self.user(self.holder())
            new = self.world.hosts[1 - self.world.hosts.index(old)]
            await self.world.end_sync(old)
            await self.change_all(old, ops)
            if new.is_attached or not await self.world.attach(new, TAKE_OVER):
                return
            await self.change_all(new, later)
            await self.change_all(old, later)
            await self.world.sync(old)
            await self.change_all(old, [*later, Op("flush")])
            await self.world.sync(new)

        self.world.run(do())

    # -- disasters ---

    @rule(which=which, ops=batches)
    def kill_and_go_on(self, which: int, ops: list[Op]) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.change_all(host, ops)
            await self.world.crash(host, kill=True)
            await self.world.go_on(host)

        self.world.run(do())

    @rule(which=which, kill=st.booleans(), seed=seeds)
    def crash(self, which: int, kill: bool, seed: int) -> None:
        self.world.run(self.world.crash(self.world.hosts[which], kill=kill, seed=seed))

    @rule(which=which, ops=batches, later=batches, seed=seeds)
    def flush_change_and_cut(self, which: int, ops: list[Op], later: list[Op], seed: int) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.change_all(host, [*ops, Op("flush"), *later])
            await self.world.crash(host, kill=False, seed=seed)
            await self.user(which)

        self.world.run(do())

    @rule(
        which=which,
        ops=batches,
        later=batches,
        point=st.sampled_from([*POINTS, *CYCLE_POINTS]),
        kill=st.booleans(),
        seed=seeds,
        flush=st.booleans(),
    )
    def crash_in_an_epoch(
        self, which: int, ops: list[Op], later: list[Op], point: str, kill: bool, seed: int, flush: bool
    ) -> None:
        """R12, R13: whatever is done of it."""

        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, [*ops, *([Op("flush")] if flush else [])])
            await self.change_all(host, [Op(op.kind, op.at, op.count) for op in later[:1]])
            if point in POINTS:
                await self.world.begin_sync(host, point)
            else:
                await self.world.begin_sync(host, None, commit=point)
            await self.change_all(host, [Op(op.kind, op.at, op.count) for op in later[1:]])
            await self.world.crash(host, kill=kill, seed=seed)
            await self.user(which)

        self.world.run(do())

    @rule(
        which=which,
        ops=batches,
        later=batches,
        kill=st.booleans(),
        seed=seeds,
        when=st.sampled_from([0, 1, 1, 2, 3]),
    )
    def crash_with_a_record_on_its_way(
        self, which: int, ops: list[Op], later: list[Op], kill: bool, seed: int, when: int
    ) -> None:
        """R16: it arrives before the next attach, behind it, behind that of another host, or never."""

        async def do() -> None:
            host = await self.user(which)
            await self.world.end_sync(host)
            await self.change_all(host, ops)
            host.front.late = True
            await self.world.begin_sync(host, None)
            await self.change_all(host, [Op(op.kind, op.at, op.count) for op in later])
            await self.world.crash(host, kill=kill, seed=seed, leaves_late=True)
            if when == 0:
                await self.world.arrive()
            if when == 2:
                await self.user(1 - self.world.hosts.index(host))
            elif kill and when == 1:
                await self.world.go_on(host)
            else:
                await self.user(self.world.hosts.index(host))
            if when < 3:
                await self.world.arrive()
            host = await self.user(which)
            await self.change_all(host, later)
            await self.world.sync(host)

        self.world.run(do())

    @rule(which=which, ops=batches)
    def lose_the_cache(self, which: int, ops: list[Op]) -> None:
        async def do() -> None:
            host = await self.user(which)
            await self.change_all(host, ops)
            await host.lose()
            self.world.read_log()
            await self.user(1 - self.world.hosts.index(host))

        self.world.run(do())

    @invariant()
    def nothing_is_violated(self) -> None:
        if hasattr(self, "world"):
            self.world.run(self.world.check())


@pytest.mark.timeout(600)
class TestWriteBack(WriteBackMachine.TestCase):  # type: ignore[misc, valid-type]  # made at run time
    settings = effort(examples=50, steps=40, shrink=False)
