"""Replays the reads of a boot against the readahead's decisions, without a device: what would be fetched, in
how many requests, and how long would the boot wait?

    python3 -m bench.policy [TRACE] [--latency-ms 20] [--mbit 1000] [--think 0.1]

TRACE is what `make demo` keeps (build/vm/demo/cold.csv); without one, bench/boot.csv, a boot from before. A
read is issued when the one that it followed in the trace has been answered, and `think` times the pause there
was between the two: an emulator takes ten times as long for its own part as a real machine."""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.asked import PAGE_BYTES, pages_of
from bench.fio import BenchError
from bench.report import columns
from tierblk.readahead import PAGES_PER_BLOCK, Ahead, Streams
from tierblk.window import Need, Span, plan

REPO = Path(__file__).resolve().parents[1]
BOOT = Path(__file__).resolve().with_name("boot.csv")
IMAGE_MIB = 2048
WINDOW_MIB = 8.0
THINK = 0.1
BATCH_S = 0.0001
"""Misses this close together are planned together, as one turn of the daemon's loop takes them."""
MIB = 1 << 20
sys.path.insert(0, str(REPO / "packaging" / "demo"))

from tierdemo import trace  # noqa: E402  (found by the line above)


@dataclass(frozen=True)
class Link:
    """What every request costs; the bodies of all of them share the bandwidth."""

    latency_s: float = 0.020
    bytes_per_s: float = 125e6


class Fixed(Streams):
    """No readahead, and always the same granule: what to compare with."""

    def __init__(self, granule_pages: int) -> None:
        super().__init__(0, 0)
        self._fixed_pages = granule_pages

    def missed(self, first_page: int, stop_page: int) -> tuple[int, Ahead | None]:
        """The granule, and nothing else."""
        return self._fixed_pages, None


@dataclass
class Outcome:
    """What a replay showed."""

    first_read_bytes: int = 0
    fetched_bytes: int = 0
    gets: int = 0
    waits: int = 0
    took_s: float = 0.0
    thought_s: float = 0.0

    @property
    def ratio(self) -> float:
        return self.fetched_bytes / self.first_read_bytes if self.first_read_bytes else 0.0

    @property
    def stalled_s(self) -> float:
        return self.took_s - self.thought_s


@dataclass(frozen=True)
class Step:
    """One read of the replay: `after` which other it comes (None: the beginning), and how long after its
    end."""

    pages: range
    after: int | None
    pause_s: float


def steps(reads: Sequence[trace.Request], think: float) -> list[Step]:
    """Who waited for whom: a read follows the last one that was answered before it was issued."""
    answered = sorted((each.done_s, i) for i, each in enumerate(reads) if each.done_s is not None)
    found: list[Step] = []
    next_answer, last = 0, None
    for each in reads:
        while next_answer < len(answered) and answered[next_answer][0] <= each.issued_s:
            last = answered[next_answer]
            next_answer += 1
        pause_s = (each.issued_s - (last[0] if last else reads[0].issued_s)) * think
        found.append(Step(pages_of(each.offset_bytes, each.length_bytes), last[1] if last else None, pause_s))
    return found


@dataclass
class Replay:
    """A cache with room for everything, over a link, under a policy."""

    streams: Streams
    image_bytes: int
    max_window_blocks: int
    link: Link
    outcome: Outcome = field(default_factory=Outcome)
    arrives_s: dict[int, float] = field(default_factory=dict)  # by page; asked for, there from then on
    busy_s: dict[int, float] = field(default_factory=dict)  # by block; its fill ends then (I7)
    free_s: float = 0.0  # when the link is
    marks: set[int] = field(default_factory=set)

    def run(self, todo: Sequence[Step]) -> Outcome:
        """All reads, each in its time."""
        followers: dict[int | None, list[int]] = defaultdict(list)
        for i, step in enumerate(todo):
            followers[step.after].append(i)
        waiting = [(todo[i].pause_s, i) for i in followers[None]]
        heapq.heapify(waiting)
        asked_s: dict[int, float] = {}
        while waiting:
            batch = [heapq.heappop(waiting)]
            while waiting and waiting[0][0] <= batch[0][0] + BATCH_S:
                batch.append(heapq.heappop(waiting))
            now_s = batch[-1][0]
            for at_s, i in batch:
                asked_s.setdefault(i, at_s)
            for i, again_s in self._turn(now_s, [(i, todo[i].pages) for _, i in batch]):
                if again_s is not None:
                    heapq.heappush(waiting, (again_s, i))
                    continue
                done_s = max([now_s, *(self.arrives_s[page] for page in todo[i].pages)])
                self.outcome.waits += done_s > asked_s[i]
                self.outcome.took_s = max(self.outcome.took_s, done_s)
                for next_read in followers[i]:
                    heapq.heappush(waiting, (done_s + todo[next_read].pause_s, next_read))
        self.outcome.first_read_bytes = len({p for step in todo for p in step.pages}) * PAGE_BYTES
        return self.outcome

    def _turn(self, now_s: float, reads: Sequence[tuple[int, range]]) -> list[tuple[int, float | None]]:
        """What one turn of the loop does with these reads; for each when it has to look again, or None when
        all its pages are there or on their way. A GET is one run of pages: what a read lacks behind a page
        that is there already, it asks for when the first part has come."""
        wanted: dict[int, int] = {}
        for _, pages in reads:
            for page in pages:
                block = page // PAGES_PER_BLOCK
                if block in self.marks:
                    self.marks.discard(block)
                    self._ahead(now_s, self.streams.read_on(block))
                if page in self.arrives_s:
                    continue
                if self.busy_s.get(block, 0.0) <= now_s:
                    wanted[block] = wanted.get(block, 0) | 1 << page % PAGES_PER_BLOCK
        needs = [
            Need(block, block, want, self._missing(block), ahead=False) for block, want in wanted.items()
        ]
        spans, ahead = plan(needs, self.streams, self.max_window_blocks, self.image_bytes)
        self._fetch(now_s, spans)
        for more in ahead:
            self._ahead(now_s, more)
        return [(i, self._complete_s(pages)) for i, pages in reads]

    def _complete_s(self, pages: range) -> float | None:
        """When the fills end that a read has to wait for before it can ask for the rest; None: there is no
        rest."""
        lacking = {page // PAGES_PER_BLOCK for page in pages if page not in self.arrives_s}
        return max((self.busy_s[block] for block in lacking), default=None)

    def _missing(self, block: int) -> int:
        first = block * PAGES_PER_BLOCK
        inside = range(first, min(first + PAGES_PER_BLOCK, -(-self.image_bytes // PAGE_BYTES)))
        return sum(1 << page - first for page in inside if page not in self.arrives_s)

    def _ahead(self, now_s: float, more: Ahead | None) -> None:
        if more is None:
            return
        self.marks.add(more.first)
        needs = []
        for block in range(more.first, more.first + more.count):
            missing = self._missing(block)
            if missing and self.busy_s.get(block, 0.0) <= now_s:
                needs.append(Need(block, block, missing, missing, ahead=True))
        spans, _ = plan(needs, self.streams, self.max_window_blocks, self.image_bytes)
        self._fetch(now_s, spans)

    def _fetch(self, now_s: float, spans: Sequence[Span]) -> None:
        """A GET each; a page is there when its last byte is."""
        for span in spans:
            self.outcome.gets += 1
            at_s = max(now_s + self.link.latency_s, self.free_s)
            for page in range(span.first_page, span.stop_page):
                at_s += PAGE_BYTES / self.link.bytes_per_s
                if page not in self.arrives_s:
                    self.arrives_s[page] = at_s
                self.outcome.fetched_bytes += PAGE_BYTES
            self.free_s = at_s
            for block in span.tokens:
                self.busy_s[block] = at_s


def replay(
    reads: Sequence[trace.Request],
    streams: Streams,
    image_bytes: int,
    max_window_blocks: int,
    link: Link,
    think: float = 1.0,
) -> Outcome:
    """One boot under one policy. The reads are in the order of their issue."""
    todo = steps(reads, think)
    at_once = Replay(Fixed(PAGES_PER_BLOCK), image_bytes, 1, Link(0.0, math.inf))
    outcome = Replay(streams, image_bytes, max_window_blocks, link).run(todo)
    outcome.thought_s = at_once.run(todo).took_s
    return outcome


def policies(image_bytes: int, window_blocks: int) -> dict[str, Streams]:
    """What is compared, by name; a replay changes it."""
    blocks = -(-image_bytes // (PAGES_PER_BLOCK * PAGE_BYTES))
    return {
        "exactly the pages asked for": Fixed(1),
        "whole blocks, nothing ahead": Fixed(PAGES_PER_BLOCK),
        "tierblk without readahead": Streams(blocks, 0),
        "tierblk": Streams(blocks, window_blocks),
    }


def table(
    reads: Sequence[trace.Request], image_bytes: int, link: Link, think: float, window_blocks: int
) -> str:
    """The policy beside none."""
    rows = [["", "fetched MiB", "to first reads", "GETs", "reads that waited", "stalled s", "boot s"]]
    for name, streams in policies(image_bytes, window_blocks).items():
        got = replay(reads, streams, image_bytes, max(window_blocks, 1), link, think)
        rows.append(
            [
                name,
                f"{got.fetched_bytes / MIB:.1f}",
                f"{got.ratio:.2f}",
                str(got.gets),
                str(got.waits),
                f"{got.stalled_s:.2f}",
                f"{got.took_s:.2f}",
            ]
        )
    return columns(rows)


def blocks_of(mib: float) -> int:
    """How many whole blocks that is."""
    return int(mib * MIB) // (PAGES_PER_BLOCK * PAGE_BYTES)


def load(path: Path) -> list[trace.Request]:
    """A kept trace. Raises BenchError."""
    try:
        return trace.from_csv(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from None


def main() -> int:
    """The command line; a failure is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", nargs="?", type=Path, default=BOOT)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--think", type=float, default=THINK)
    parser.add_argument("--image-mib", type=int, default=IMAGE_MIB)
    parser.add_argument("--window-mib", type=float, default=WINDOW_MIB)
    options = parser.parse_args()
    link = Link(options.latency_ms / 1e3, options.mbit * 1e6 / 8)
    window_blocks = blocks_of(options.window_mib)
    try:
        reads = load(options.trace)
    except BenchError as failure:
        sys.stderr.write(f"bench: {failure}\n")
        return 1
    first = trace.first_read_bytes(reads) / MIB
    sys.stdout.write(f"{len(reads)} reads, {first:.1f} MiB read for the first time\n")
    sys.stdout.write(table(reads, options.image_mib * MIB, link, options.think, window_blocks) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
