"""What may be on a volume after its host died: stamped pages, the history of what was written, and the
verdict. Pure.

A page is all one stamp: which write it is of, where it is, a checksum; a discard leaves zeros. The history is
what the host said over a pipe, in order: a line before each write and one after it, so a write that is told
to have ended before another one is told to have begun did end before it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from zlib import crc32

PAGE_BYTES = 4096
_ZEROS = bytes(PAGE_BYTES)
_HEAD = struct.Struct("<QQ")


def stamp(seq: int, page: int) -> bytes:
    """A page of write `seq`, which is above 0."""
    text = _HEAD.pack(seq, page) * 255 + bytes(12)
    return text + struct.pack("<I", crc32(text))


def seq_of(data: bytes, page: int) -> int:
    """The write that a page is of; 0 when it is zeros. ValueError: it is neither, or another page."""
    if data == _ZEROS:
        return 0
    seq, _ = _HEAD.unpack_from(data)
    if data != stamp(seq, page):
        raise ValueError(f"page {page} is no whole stamp of its own: {data[:32].hex()}...{data[-16:].hex()}")
    return int(seq)


@dataclass(slots=True, eq=False)
class Entry:
    """A write of one page. shows: its seq, or 0 for a discard. issued, ended: when, as the history counts."""

    seq: int
    shows: int
    issued: int
    ended: int | None = None


@dataclass(slots=True)
class Seal:
    """The cut of an epoch: it was made between these two moments."""

    begun: int
    ended: int


@dataclass(slots=True)
class History:
    """Of a volume of `pages` pages, zeros at first. What happened to it since is told line by line:

    I SEQ FIRST COUNT w|z   begun: a write, or a discard     C SEQ   ended
    F N, f N                a FLUSH, or a sync, of that number begun, ended (S N, s N: a sync)
    E, L, N EPOCH ATTEMPT   a seal is about to be made, is made, what it is for
    """

    pages: list[list[Entry]]
    clock: int = 0
    seals: dict[tuple[int, str], Seal] = field(default_factory=dict)
    flushed: int = -1
    synced: int = -1
    writes: int = 0
    _died: int = 0
    _survives: int | None = None
    _open: dict[int, list[Entry]] = field(default_factory=dict)
    _begun: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pages: int) -> History:
        return cls([[Entry(0, 0, -1, -1)] for _ in range(pages)])

    def tell(self, line: str) -> None:
        """The next line."""
        self.clock += 1
        kind, *words = line.split()
        match kind:
            case "I":
                seq, first, count = map(int, words[:3])
                entries = [Entry(seq, seq if words[3] == "w" else 0, self.clock) for _ in range(count)]
                for page, entry in enumerate(entries, first):
                    self.pages[page].append(entry)
                self._open[seq] = entries
                self.writes += 1
            case "C":
                for entry in self._open.pop(int(words[0])):
                    entry.ended = self.clock
            case "F" | "S":
                self._begun[kind + words[0]] = self.clock
            case "f":
                self.flushed = max(self.flushed, self._begun.pop("F" + words[0]))
            case "s":
                self.synced = max(self.synced, self._begun.pop("S" + words[0]))
            case "E" | "L":
                self._begun[kind] = self.clock
            case "N":
                if "L" in self._begun:  # else it is of a claim
                    begun, ended = self._begun.pop("E"), self._begun.pop("L")
                    begun = begun if self._survives is None else min(begun, self._survives)
                    self.seals[int(words[0]), words[1]] = Seal(begun, ended)
            case _:
                raise ValueError(line)

    def died(self) -> None:
        """Whoever told it says nothing more; what had not ended never will."""
        self._open.clear()
        self._begun.clear()
        self._died = self.clock

    def lost_memory(self) -> None:
        """What was not flushed may be gone, and nobody has looked: a cut that is made now may not have it."""
        kept = max(self.flushed, self.synced)
        self._survives = kept if self._survives is None else min(kept, self._survives)

    def stored(self, records: Mapping[int, str]) -> Seal | None:
        """The newest cut of who died whose record exists. records: attempts by epoch."""
        found = [
            key
            for key, seal in self.seals.items()
            if records.get(key[0]) == key[1] and seal.ended <= self._died
        ]
        return self.seals[max(found)] if found else None

    def verdict(self, content: bytes, kept: str, records: Mapping[int, str]) -> list[str]:
        """What is wrong with what is there now, a few sentences at most. kept: "all" when only the process
        died, "disk" when its memory went too, "none" when nothing of it is left but the store. Afterwards
        what is there is what the history goes on from."""
        wrong: list[str] = []
        seal = self.stored(records)
        needed = max(self.synced, seal.begun if seal else -1, self.flushed if kept == "disk" else -1)
        limit = self.clock + 1
        if kept == "all":
            needed = limit
        elif kept == "none":
            limit = seal.ended if seal else -1
        shown = [self._shown(content, page, wrong) for page in range(len(self.pages))]
        # A prefix: what ended before anything began that is there. Not so when memory was lost before the cut
        # that is looked at, and nobody looked then: of what was not flushed any part may have been left.
        if kept == "none" and self._survives is None:
            needed = max(
                [needed, *(max(each.issued for each in found) for found in shown if len(found) == 1)]
            )
        for page, found in enumerate(shown):
            self._judge(page, found, needed, limit, wrong)
        self.clock += 1
        self._survives = None
        self._go_on(shown, kept, seal)
        return wrong[:8]

    def _shown(self, content: bytes, page: int, wrong: list[str]) -> list[Entry]:
        """Which writes the page may be of: several only where it is zeros."""
        try:
            seq = seq_of(content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES], page)
        except ValueError as error:
            wrong.append(str(error))
            return []
        found = [entry for entry in self.pages[page] if entry.shows == seq and (seq == 0 or entry.seq == seq)]
        if not found:
            wrong.append(f"page {page} is of write {seq}, which is older than what was known to be stored")
        return found

    def _judge(self, page: int, found: list[Entry], needed: int, limit: int, wrong: list[str]) -> None:
        why = ""
        for entry in found:
            later = [
                each
                for each in self.pages[page]
                if each.ended is not None and each.ended < needed and _is_before(entry, each)
            ]
            if entry.issued > limit:
                why = f"page {page} is of write {entry.seq}, which began after the cut"
            elif later:
                newer = later[-1].seq
                why = f"page {page} is of write {entry.seq}, and write {newer} came later and has to be there"
            else:
                return
        if why:
            wrong.append(why)

    def _go_on(self, shown: list[list[Entry]], kept: str, seal: Seal | None) -> None:
        stored = max(self.synced, seal.begun if seal else -1)
        for page, found in enumerate(shown):
            if not found:
                continue
            now = found[-1]
            now.ended = self.clock if now.ended is None else now.ended
            if kept == "none":
                self.pages[page] = [Entry(now.seq, now.shows, -1, -1)]
                continue
            # What should be above what is there is lost, and what is below what is stored can never be again.
            left = [each for each in self.pages[page] if each is now or not _is_before(now, each)]
            floor = [each for each in left if each.ended is not None and each.ended < stored]
            self.pages[page] = [
                each for each in left if each is now or not any(_is_before(each, other) for other in floor)
            ]
        if kept == "none":
            self.seals = {key: seal for key, seal in self.seals.items() if seal.begun > self._died}
            self.flushed = self.synced = -1


def _is_before(one: Entry, other: Entry) -> bool:
    return one.ended is not None and one.ended < other.issued
