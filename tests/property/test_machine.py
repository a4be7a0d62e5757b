"""The machine: random traces of whatever can happen to an engine and its cache."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.property.daemon import DOORS, Place
from tests.property.effort import effort
from tests.property.gate import FAILURES, POINTS
from tests.property.images import HOT, IMAGES
from tests.property.world import World
from tierblk.core import BLOCK_BYTES, FAIL, FILL, Record

_SECTOR = 512
_READS_MAX = 16
_FILLS_MAX = 8192  # TB_MAX_FILLS
ERRNOS = (5, 110, 61)


def spans() -> st.SearchStrategy[tuple[str, int, int]]:
    """(door, first sector of the hot part, sectors)."""
    lengths = st.one_of(st.integers(1, 16), st.integers(1, 128), st.integers(1, 700))
    return st.tuples(st.sampled_from(sorted(DOORS)), st.integers(0, 12 * 128), lengths)


choices = st.integers(0, 255)
masks = st.one_of(st.integers(0, 0xFFFF), st.sampled_from([0xFFFF, 1, 0x8000, 0x00FF]))


class EngineMachine(RuleBasedStateMachine):
    """Steps that choose among what is there by a number modulo its count, so that no step depends on who was
    faster."""

    world: World

    @initialize(slots=st.sampled_from([3, 8, 12, 24]), dio_align_bytes=st.sampled_from([None, 4096]))
    def begin(self, slots: int, dio_align_bytes: int | None) -> None:
        self.world = World(slots, dio_align_bytes)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    def chosen(self, choice: int) -> Place | None:
        """One of the blocks that are asked for."""
        asked = sorted(self.world.daemon.asked)
        return asked[choice % len(asked)] if asked else None

    def start_read(self, door: str, at: int, count: int) -> None:
        daemon, image = self.world.daemon, IMAGES[door[0]]
        if len(daemon.readings) >= _READS_MAX:
            return
        offset = HOT[door[0]].start * BLOCK_BYTES + at * _SECTOR
        offset %= len(image)
        daemon.read(door, offset, min(count * _SECTOR, len(image) - offset))

    # -- reads and their answers ---

    @rule(span=spans())
    def read(self, span: tuple[str, int, int]) -> None:
        self.start_read(*span)
        self.world.settle()

    @rule(choice=choices, pages=masks, final=st.booleans())
    def fill(self, choice: int, pages: int, final: bool) -> None:
        if place := self.chosen(choice):
            self.world.daemon.fill(place, pages, final=final and pages != 0)
            self.world.settle()

    @rule()
    def fill_all(self) -> None:
        self.world.daemon.fill_all()
        self.world.settle()

    @rule(name=st.sampled_from(sorted(IMAGES)))
    def fill_a_window(self, name: str) -> None:
        self.world.daemon.fill_window(name)
        self.world.settle()

    @rule(
        name=st.sampled_from(sorted(IMAGES)),
        at=st.integers(0, 11),
        count=st.integers(1, 12),
        mark=st.integers(-1, 11),
    )
    def read_ahead(self, name: str, at: int, count: int, mark: int) -> None:
        block = HOT[name].start + at % len(HOT[name])
        if len(self.world.daemon.free_places) > 16:
            self.world.daemon.prefetch(name, block, count, mark if mark >= 0 else None)
            self.world.settle()
            for place, ask in self.world.daemon.asked.items():
                cached, zero = self.world.known.get(place, (0, 0))
                assert not ask.record.value & (cached | zero), f"asked for what is here: {ask}"

    @rule(door=st.sampled_from(sorted(DOORS)), hasty=st.booleans())
    def change_the_policy(self, door: str, hasty: bool) -> None:
        self.world.daemon.be_hasty(door, hasty)

    @rule(choice=choices, errno=st.sampled_from(ERRNOS))
    def give_up(self, choice: int, errno: int) -> None:
        """Fail-fast doors only, and their requests at once."""
        if place := self.chosen(choice):
            daemon = self.world.daemon
            waited = [r for r in daemon.readings if r.door in daemon.hasty and {place[1]} == set(r.blocks)]
            waited = [reading for reading in waited if reading.door[0] == place[0]]
            free = [r for r in waited if daemon.doors[r.door].stats()["active"] < daemon.doors[r.door].depth]
            daemon.give_up(place, errno)
            self.world.settle()
            assert all(reading.future.done() for reading in free)

    @rule(choice=choices, errno=st.sampled_from(ERRNOS))
    def fail(self, choice: int, errno: int) -> None:
        if place := self.chosen(choice):
            self.world.daemon.fail(place, errno)
            self.world.settle()

    @rule(choice=choices, kind=st.sampled_from([FILL, FAIL]))
    def answer_with_an_old_token(self, choice: int, kind: int) -> None:
        """R5: a late answer is refused, said so, and changes nothing."""
        daemon = self.world.daemon
        # If there is one, of a fill whose place in the engine's table another one has now.
        taken = {ask.record.token % _FILLS_MAX for ask in daemon.asked.values()}
        tokens = [token for token in daemon.old_tokens if token % _FILLS_MAX in taken] or daemon.old_tokens
        if tokens:
            token = tokens[choice % len(tokens)]
            daemon.engine.push(
                [Record(kind, token=token, value=0, result=1 if kind == FILL else -5, pages=0xFFFF)]
            )
            assert [event.token for event in daemon.refused_by_now(0xFFFFFFFF)] == [token]

    @rule(
        choice=choices,
        offset=st.sampled_from([512, 32 * BLOCK_BYTES, 31 * BLOCK_BYTES + 4096, 1 << 62, (1 << 64) - 4096]),
    )
    def fill_from_outside_the_staging_memory(self, choice: int, offset: int) -> None:
        """I12."""
        if place := self.chosen(choice):
            ask = self.world.daemon.asked[place].record
            self.world.daemon.engine.push([Record(FILL, ask.layer, ask.token, ask.block, offset, 1, 0xFFFF)])
            assert [event.token for event in self.world.daemon.refused_by_now(0xFFFFFFFF)] == [ask.token]

    @rule(choice=choices, errno=st.sampled_from(ERRNOS))
    def fail_after_the_last_fill(self, choice: int, errno: int) -> None:
        """The slot is being written, or was: the late failure changes nothing."""
        if place := self.chosen(choice):
            daemon = self.world.daemon
            last = daemon.fill_record(place, 0xFFFF, final=True)
            daemon.engine.push([last, Record(FAIL, token=last.token, result=-errno)])
            assert [event.token for event in daemon.refused_by_now(0xFFFFFFFF)] == [last.token]
            self.world.settle()

    @rule(reads=st.lists(spans(), min_size=2, max_size=8), count=st.integers(0, 24), commit=st.booleans())
    def rush(self, reads: list[tuple[str, int, int]], count: int, commit: bool) -> None:
        """Answers, reads, an eviction and a commit at once."""
        world, daemon = self.world, self.world.daemon
        for span in reads[::2]:
            self.start_read(*span)
        daemon.fill_all()
        daemon.evictions.clear()
        daemon.engine.push([Record(kind=3, value=count)] if count else [])
        for span in reads[1::2]:
            self.start_read(*span)
        if commit and not daemon.committing and not world.refused:
            world.commit()
        daemon.until(lambda: not count or bool(daemon.evictions))
        daemon.settle()
        world.learn_rushed()
        world.judge()

    # -- eviction, commits ---

    @rule(count=st.integers(1, 24))
    def evict(self, count: int) -> None:
        self.world.evict(count)

    @rule(failing=st.sampled_from([None, None, None, *FAILURES]))
    def commit(self, failing: str | None) -> None:
        if not self.world.daemon.committing:
            self.world.commit(failing=failing)
        else:
            self.world.let_go(failing)

    @rule(point=st.sampled_from(POINTS))
    def hold_a_commit(self, point: str) -> None:
        if not self.world.daemon.committing:
            self.world.commit(hold=point)

    # -- doors ---

    @rule(door=st.sampled_from(sorted(DOORS)))
    def drain(self, door: str) -> None:
        self.world.daemon.drain(door)
        self.world.settle()
        assert self.world.daemon.doors[door].stats()["waiting"] == 0

    @rule()
    def reopen(self) -> None:
        self.world.reopen_doors()
        self.world.settle()

    # -- sessions ---

    @rule()
    def stop(self) -> None:
        self.world.stop()

    @rule()
    def kill(self) -> None:
        self.world.crash(kill=True)

    @rule(seed=st.integers(0, 2**32))
    def cut_the_power(self, seed: int) -> None:
        self.world.crash(kill=False, seed=seed)

    @rule(kill=st.booleans(), backup=st.integers(0, 5))
    def restore_a_backup(self, kill: bool, backup: int) -> None:
        self.world.crash(kill=kill, backup=backup)

    # -- macro steps: what short random walks seldom put together ---

    @rule(door=st.sampled_from(sorted(DOORS)), seed=st.integers(0, 2**32))
    def evict_commit_reuse_and_cut(self, door: str, seed: int) -> None:
        """A slot goes from one block to another, and the power with it."""
        self.world.finish()
        self.world.evict(24)
        if not self.world.daemon.committing:
            self.world.commit()
        self.start_read(door, 0, 700)
        self.world.settle()
        self.world.finish()
        self.world.check()
        self.world.crash(kill=False, seed=seed)

    @rule(span=spans(), count=st.integers(1, 8))
    def read_ahead_then_read(self, span: tuple[str, int, int], count: int) -> None:
        """A reader of what is fetched ahead waits for that fill and asks for nothing again."""
        self.read_ahead(span[0][0], span[1] // 128, count, 0)
        for _ in range(2):  # the first one is told of
            self.start_read(*span)
            self.world.settle()
        self.read_ahead(span[0][0], span[1] // 128, count + 1, 0)  # over what runs already (I7)
        self.fill_a_window(span[0][0])

    @rule(span=spans())
    def drain_what_waits(self, span: tuple[str, int, int]) -> None:
        self.start_read(*span)
        self.drain(span[0])
        self.reopen()

    @rule(span=spans())
    def evict_then_miss(self, span: tuple[str, int, int]) -> None:
        self.world.finish()
        self.world.evict(24)
        self.start_read(*span)
        self.world.settle()

    @rule(span=spans())
    def kill_then_hit(self, span: tuple[str, int, int]) -> None:
        """What was cached is not fetched again (R1)."""
        self.start_read(*span)
        self.world.settle()
        self.world.finish()
        self.world.crash(kill=True)
        self.start_read(*span)
        self.world.settle()

    @rule(span=spans(), pages=masks, count=st.integers(1, 24), more=masks)
    def evict_while_filling(self, span: tuple[str, int, int], pages: int, count: int, more: int) -> None:
        """Blocks of which a part is cached, and the rest on its way (R2)."""
        self.start_read(*span)
        self.world.settle()
        for place in sorted(self.world.daemon.asked):
            self.world.daemon.fill(place, pages | 1, final=True)
        self.world.settle()
        chosen = self.chosen(count)
        if chosen is not None:
            self.world.daemon.fill(chosen, more, final=False)
            self.world.settle()
        self.world.evict(count)

    @rule(span=spans(), pages=masks)
    def end_early_and_refill(self, span: tuple[str, int, int], pages: int) -> None:
        """A fill that ends with a part of its block; the next one brings that part again, and it is not taken
        again (I7)."""
        self.start_read(*span)
        self.world.settle()
        daemon, places = self.world.daemon, sorted(self.world.daemon.asked)
        for place in places:
            daemon.fill(place, pages | 1, final=True)
        self.world.settle()
        daemon.fill_all()
        self.world.settle()

    @rule(choice=choices, pages=masks, errno=st.sampled_from(ERRNOS))
    def fail_half_way_and_refill(self, choice: int, pages: int, errno: int) -> None:
        if (place := self.chosen(choice)) and pages != 0xFFFF:
            daemon = self.world.daemon
            daemon.fill(place, pages, final=False)
            if daemon.asked[place].sent is None:
                daemon.fail(place, errno)
            self.world.settle()
            self.start_read(place[0], (place[1] - HOT[place[0]].start) * 128, 100)
            self.world.settle()

    @invariant()
    def nothing_is_violated(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


@pytest.mark.timeout(600)
class TestEngine(EngineMachine.TestCase):  # type: ignore[misc, valid-type]  # made at run time
    settings = effort(examples=40, steps=40)
