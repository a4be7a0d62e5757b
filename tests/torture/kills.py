"""The daemon dies under load, in every way: no error, no wrong byte, nothing fetched twice."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM
from typing import Any

from tests.torture.fetches import Memory
from tests.torture.frontier import Frontier
from tests.torture.leftovers import check_directory
from tests.torture.memory import Squeeze
from tests.torture.processes import StuckWatch, Victim, daemons, tasks
from tests.torture.reader import Readers
from tests.torture.rig import MIB, Rig, rig, say
from tests.vm.guest.device_rig import devices
from tests.vm.guest.helpers import left_behind, wait_until

KINDS = {
    "kill": "rounds of SIGKILL",
    "term": "rounds of SIGTERM, and the next daemon is started",
    "freeze": "rounds of SIGSTOP, and after a while SIGKILL",
    "memory": "rounds of running out of memory",
}
DEATH_LIMIT_S = 60.0
RETURN_LIMIT_S = 90.0
# Slow enough that fetches are under way at most moments.
SERVER = ("--latency", "10ms", "--bandwidth", "15MB")
DELAY_MAX_S = 0.5
FREEZE_MAX_S = 0.5
STARVE_EACH_S = 0.3
# So often the next blow comes before the daemon that came back has served anything.
EARLY_SHARE = 0.15
EARLY_MAX_S = 1.0


@dataclass(frozen=True)
class Kills:
    """A run: how many rounds of each kind, in an order that follows from the seed."""

    seed: int
    rounds: dict[str, int]
    image_mib: int = 256
    threads: int = 8
    # Who starts the next daemon: the keeper, or (False) an `attach`, as after SIGTERM always.
    keeper: bool = True
    folder: Path = Path("/cache/torture")
    images: Path = Path("/srv")


@dataclass
class Tally:
    """What the rounds came to."""

    rounds: Counter[str] = field(default_factory=Counter)
    with_fetches: int = 0
    early: int = 0
    births_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(plan: Kills) -> dict[str, Any]:
    """Does it; a summary for JSON, of which `wrong` is a list of sentences, empty when all was right."""
    chance = random.Random(plan.seed)
    order = [kind for kind, count in plan.rounds.items() for _ in range(count)]
    chance.shuffle(order)
    size_bytes = plan.image_mib * MIB
    squeeze = Squeeze() if "memory" in order else None
    watch = StuckWatch()
    try:
        with rig(plan.folder, plan.images, size_bytes, plan.seed, *SERVER) as stage:
            # Nothing is evicted, and no second request is sent on purpose: what is fetched twice was lost.
            device = stage.attach(size_bytes + 64 * MIB, remote__hedge_percent=0, cache__commit_interval="1s")
            frontier = Frontier(size_bytes, len(order), plan.seed)
            readers = Readers(
                device, stage.image, frontier.choose, seed=plan.seed, threads=plan.threads, mixed=False
            )
            field_ = _Field(stage, device, readers, frontier, chance, squeeze, keeper=plan.keeper)
            summary = field_.run(order)
            summary |= {
                "run": "kills",
                "seed": plan.seed,
                "image_bytes": size_bytes,
                "watch": _watched(watch),
            }
            summary["wrong"] += [*watch.stuck.values()]
    finally:
        watch.close()
        if squeeze:
            squeeze.close()
    with suppress(AssertionError):
        wait_until(lambda: not left_behind(), 20, "")
    summary["wrong"] += [f"left behind: {sentence}" for sentence in left_behind()]
    return summary


def _watched(watch: StuckWatch) -> dict[str, Any]:
    return {"looks": watch.looks, "longest_s": round(watch.longest_s, 2), "stuck": len(watch.stuck)}


class _Field:
    """The rounds of one run."""

    def __init__(
        self,
        stage: Rig,
        device: Path,
        readers: Readers,
        frontier: Frontier,
        chance: random.Random,
        squeeze: Squeeze | None,
        *,
        keeper: bool,
    ) -> None:
        self._stage = stage
        self._device = device
        self._readers = readers
        self._frontier = frontier
        self._chance = chance
        self._squeeze = squeeze
        self._keeper = keeper
        self._tally = Tally()
        self._memory = Memory(stage.server.control, stage.maps_dir)
        self._clock = threading.Event()
        self._blows: dict[str, Callable[[Victim], None]] = {
            "kill": lambda daemon: daemon.signal(SIGKILL),
            "term": lambda daemon: daemon.signal(SIGTERM),
            "freeze": self._freeze,
            "memory": self._starve,
        }

    def run(self, order: list[str]) -> dict[str, Any]:
        """All rounds, then the whole device once, then what is left of everything."""
        self._readers.start()
        began_s = time.monotonic()
        try:
            for number, kind in enumerate(order):
                self._round(number, kind)
                if self._readers.failures:
                    break
                if number % 5 == 4 or number == len(order) - 1:
                    self._say(number + 1, len(order))
        except (AssertionError, OSError) as error:
            self._tally.wrong.append(f"round {sum(self._tally.rounds.values())}: {error}")
        return self._end(time.monotonic() - began_s)

    def _say(self, number: int, count: int) -> None:
        say(
            f"{number}/{count} rounds, {self._readers.done} reads, slowest read "
            f"{self._readers.slowest_s:.2f} s, {self._tally.with_fetches} with fetches under way, "
            f"{len(self._readers.failures)} wrong reads"
        )

    def _round(self, number: int, kind: str) -> None:
        early = number > 0 and self._chance.random() < EARLY_SHARE
        if early:
            # The next daemon may be anywhere between its birth and its first request.
            self._tally.early += 1
        else:
            self._all_read_on(f"before round {number}")
        self._frontier.advance()
        self._clock.wait(self._chance.random() ** 2 * (EARLY_MAX_S if early else DELAY_MAX_S))
        self._tally.with_fetches += self._memory.remember()
        daemon = self._serving()
        began_s = time.monotonic()
        self._blows[kind](daemon)
        daemon.ended(DEATH_LIMIT_S)
        self._tally.rounds[kind] += 1
        if kind == "term" or not self._keeper:
            # It ended in order, so nobody starts the next one but who wants it.
            self._same_device(self._stage.attach_again())
        self._next(daemon.pid)
        self._tally.births_s.append(time.monotonic() - began_s)
        if devices() != sorted([self._device.name, self._device.name.replace("ublkb", "ublkc")]):
            self._tally.wrong.append(f"after round {number} ({kind}) there are the devices {devices()}")

    def _freeze(self, daemon: Victim) -> None:
        daemon.signal(SIGSTOP)
        self._clock.wait(self._chance.random() * FREEZE_MAX_S)
        daemon.signal(SIGKILL)

    def _starve(self, daemon: Victim) -> None:
        assert self._squeeze is not None
        kills = self._squeeze.kills
        self._squeeze.put(daemon.pid)
        # A daemon that only serves hits takes no memory: something new to fetch, and somebody who asks.
        deadline_s = time.monotonic() + DEATH_LIMIT_S
        while self._squeeze.kills == kills and time.monotonic() < deadline_s:
            self._frontier.advance()
            if self._clock.wait(STARVE_EACH_S) or self._squeeze.kills > kills:
                break
            self._stage.tierblk.run("status", check=False)
        assert self._squeeze.kills > kills, f"no process was killed for memory: {self._squeeze}"

    def _serving(self) -> Victim:
        """The process that serves now, or is about to."""
        found: dict[int, Victim] = {}

        def there() -> bool:
            with suppress(ProcessLookupError):  # of one that ended while it was looked at
                for pid in daemons():
                    found[pid] = Victim(pid)
            return bool(found)

        wait_until(there, RETURN_LIMIT_S, self._nobody)
        # /proc is not read at one instant: one may have ended, and the next have begun, meanwhile.
        living = [each for each in found.values() if each.lives]
        if len(living) > 1:
            words = {task.pid: task.words for task in tasks()}
            several = {each.pid: words.get(each.pid) for each in living}
            self._tally.wrong.append(f"several daemons at once: {several}")
        return living[0] if living else self._serving()

    def _next(self, dead: int) -> None:
        """Returns when another process than the dead one serves, or is about to."""
        wait_until(lambda: daemons() - {dead}, RETURN_LIMIT_S, self._nobody)

    def _nobody(self) -> str:
        return f"no daemon took over; the log:\n{self._stage.log()[-3000:]}"

    def _all_read_on(self, when: str) -> None:
        """Returns when every reader has read something since."""
        before = self._readers.each_done
        wait_until(
            lambda: (
                self._readers.failures
                or all(now > then for now, then in zip(self._readers.each_done, before, strict=True))
            ),
            RETURN_LIMIT_S,
            lambda: f"{when} some readers wait, the longest {self._readers.longest_wait_s:.1f} s",
        )

    def _same_device(self, device: Path) -> None:
        if device != self._device:
            self._tally.wrong.append(f"the device was {self._device} and is {device}")

    def _end(self, seconds: float) -> dict[str, Any]:
        wrong = self._tally.wrong
        with suppress(AssertionError):
            self._all_read_on("after the last round")
        self._readers.stop()
        if not self._readers.wait(RETURN_LIMIT_S):
            wrong.append(f"a read does not end for {self._readers.longest_wait_s:.0f} s")
        wrong += [str(failure) for failure in self._readers.failures]
        wrong += self._memory.verdict()
        status = self._stage.status() if not wrong else {}
        log = self._stage.log()
        self._stage.tierblk.run("stop", check=False)
        left = check_directory(self._stage.cache_dir, self._stage.image)
        births = sorted(self._tally.births_s) or [0.0]
        return {
            "rounds": dict(self._tally.rounds),
            "early": self._tally.early,
            "with_fetches_under_way": self._tally.with_fetches,
            "seconds": round(seconds, 1),
            "reads": self._readers.done,
            "bytes": self._readers.done_bytes,
            "slowest_read_s": round(self._readers.slowest_s, 3),
            "next_daemon_after_s": {
                "median": round(births[len(births) // 2], 3),
                "longest": round(births[-1], 3),
            },
            "fetches": self._memory.summary(),
            "left": {**asdict(left), "wrong": len(left.wrong)},
            **status,
            "log_tail": log[-4000:] if wrong else "",
            "wrong": wrong + left.wrong,
            "cpu_s": round(sum(os.times()[:2]), 1),
        }
