"""Which request gets which fault: pure functions of (plan, seed, n)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

REQUEST_FAULTS = (
    "truncate",
    "whole",
    "other-range",
    "other-etag",
    "no-etag",
    "wrong-length",
    "encoding",
    "error",
    "busy",
    "reset-head",
    "reset",
    "stall-head",
    "stall",
    "drip",
    "redirect",
    "redirect-always",
    "redirect-loop",
    "no-http",
    "hangup",
)
CONNECTION_FAULTS = ("drop", "mute", "plain-http", "stranger")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a plan. probability: in [0, 1]. value: what NAME=PROBABILITY:VALUE gave, if anything."""

    name: str
    probability: float
    value: float | None = None


@dataclass(slots=True)
class Decision:
    """What one request, or one connection, gets. rng: for whatever else is left to chance about it, such as
    where a body is cut; it too depends on (seed, n) only."""

    name: str | None
    value: float | None
    rng: random.Random = field(repr=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """Faults and their probabilities. Requests and connections are decided apart from each other.

    healthy_requests: so many requests in the beginning get no fault.
    """

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    healthy_requests: int = 0

    @classmethod
    def parse(cls, text: str, seed: int = 0, healthy_requests: int = 0) -> Plan:
        """A plan out of "truncate=0.05,stall=0.01:5"; a bare name means always. ValueError: what is wrong."""
        faults = tuple(_parse_fault(part.strip()) for part in text.split(",") if part.strip())
        names = [fault.name for fault in faults]
        if len(names) != len(set(names)):
            raise ValueError(f"a fault is named twice in {text!r}")
        for kind in (REQUEST_FAULTS, CONNECTION_FAULTS):
            total = sum(fault.probability for fault in faults if fault.name in kind)
            if total > 1 + 1e-9:
                raise ValueError(f"the probabilities in {text!r} add up to {total:g}, which is more than 1")
        return cls(faults, seed, healthy_requests)

    def names(self) -> frozenset[str]:
        """The faults that can happen."""
        return frozenset(fault.name for fault in self.faults if fault.probability > 0)

    def request(self, n: int) -> Decision:
        """What the n-th request gets; n counts from 0."""
        rng = random.Random(f"{self.seed} request {n}")
        chance = rng.random()  # drawn in any case: the draws that follow are the same whatever the plan says
        return self._pick(REQUEST_FAULTS, chance if n >= self.healthy_requests else 1.0, rng)

    def connection(self, n: int) -> Decision:
        """What the n-th connection gets; n counts from 0."""
        rng = random.Random(f"{self.seed} connection {n}")
        return self._pick(CONNECTION_FAULTS, rng.random(), rng)

    def forced(self, name: str, n: int) -> Decision:
        """The decision for request n if it is to get this fault."""
        rng = random.Random(f"{self.seed} request {n}")
        rng.random()
        fault = _parse_fault(name)
        return Decision(fault.name, fault.value, rng)

    def _pick(self, kind: tuple[str, ...], chance: float, rng: random.Random) -> Decision:
        for fault in self.faults:
            if fault.name in kind:
                if chance < fault.probability:
                    return Decision(fault.name, fault.value, rng)
                chance -= fault.probability
        return Decision(None, None, rng)


def _parse_fault(text: str) -> Fault:
    name, given, numbers = text.partition("=")
    name = name.strip()
    if name not in REQUEST_FAULTS and name not in CONNECTION_FAULTS:
        known = ", ".join((*REQUEST_FAULTS, *CONNECTION_FAULTS))
        raise ValueError(f"{name!r} is no fault; there are {known}")
    probability, valued, value = numbers.partition(":")
    try:
        fault = Fault(name, float(probability) if given else 1.0, float(value) if valued else None)
    except ValueError:
        raise ValueError(f"{text!r} is not NAME, NAME=PROBABILITY or NAME=PROBABILITY:VALUE") from None
    if not 0 <= fault.probability <= 1:
        raise ValueError(f"the probability in {text!r} is not between 0 and 1")
    if fault.value is not None and not 0 < fault.value < 1e9:
        raise ValueError(f"the value in {text!r} is not above 0")
    return fault
