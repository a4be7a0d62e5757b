"""The machine around a daemon: a disk whose unsynced writes a power cut may lose, a memory that a kill leaves
alone.

Crashes are composed, not provoked. A *kill* is a copy of everything, the maps on tmpfs first, taken before
the dying daemon's engine is closed: nothing that closing does is in it, and what was being written to a slot
may be there in part, as after SIGKILL. (The tests of the whole daemon send real SIGKILLs; a child for every
step here would cost a hundred times as much.) A *power cut* leaves the index as its last transaction left it,
and of every sector of `slots` and `sums` what was there at the last sync, or now, each by itself. Of the
journal's records, which are durable one after the other and each with the slots that were written before it,
it leaves some, and a part of the next.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.cache_rig import read_superblock
from tierblk.cache import journal
from tierblk.cache.directory import JOURNAL
from tierblk.cache.maps import ENTRY_BYTES
from tierblk.core import MAP_HEADER_BYTES, PAGE_BYTES

SECTOR_BYTES = 512
_SUMMED_AT = 26  # in an entry of a map, two bytes; of a base something else is there
VOLATILE = ("slots", "sums")
Rows = dict[int, dict[int, bytes]]


@dataclass(frozen=True, slots=True)
class Backup:
    """A part of the cache directory as it was in a session: what somebody may put back later."""

    what: str  # "index" or "slots" (with its sums)
    path: Path
    session: int


@dataclass
class Host:
    """disk and memory below two paths; a new pair of folders after every crash. durable: as of the last
    sync. rows: what the durable index says, layer id -> row -> packed."""

    disk: Path
    memory: Path
    boot: int = 0
    durable: dict[str, bytes] = field(default_factory=lambda: dict.fromkeys((*VOLATILE, JOURNAL), b""))
    rows: Rows = field(default_factory=dict)
    backups: list[Backup] = field(default_factory=list)
    _taken: int = 0

    @property
    def directory(self) -> Path:
        return self.disk / f"cache-{self.boot}"

    @property
    def run_dir(self) -> Path:
        return self.memory / f"run-{self.boot}"

    def content(self, name: str) -> bytes:
        """What a read of the file brings now."""
        return (self.directory / name).read_bytes()

    def crash(self, *, kill: bool, seed: int = 0) -> Path:
        """Copies what outlives the crash to a new pair of folders. Returns the old directory, which the dying
        daemon still has."""
        old_directory, old_run_dir = self.directory, self.run_dir
        self.boot += 1
        self.directory.mkdir()
        # First: it says less than the maps, never more.
        shutil.copy(old_directory / JOURNAL, self.directory / JOURNAL)
        if kill:
            shutil.copytree(old_run_dir, self.run_dir)
        for name in ("sums", "slots"):  # after the maps: what a map calls cached was in its slot before
            shutil.copy(old_directory / name, self.directory / name)
        shutil.copytree(old_directory / "index", self.directory / "index")
        if kill:
            _forget_sums(old_run_dir, self.run_dir)
        if not kill:
            dice = random.Random(seed)
            path = self.directory / JOURNAL
            left, more = _some_records(self.durable[JOURNAL], path.read_bytes(), dice)
            path.write_bytes(left)
            self.durable[JOURNAL] = left
            for name in VOLATILE:
                path = self.directory / name
                if not (more and name == "slots"):
                    path.write_bytes(_some_sectors(self.durable[name], path.read_bytes(), dice))
                self.durable[name] = path.read_bytes()
        return old_directory

    def take_backup(self, what: str) -> None:
        """Of the index or the slots of a directory that no daemon has open."""
        target = self.disk / f"backup-{self._taken}"
        self._taken += 1
        target.mkdir()
        for name in ("index",) if what == "index" else VOLATILE:
            source = self.directory / name
            if source.is_dir():
                shutil.copytree(source, target / name)
            else:
                shutil.copy(source, target / name)
        self.backups.append(Backup(what, target, read_superblock(self.directory).session))

    def restore(self, backup: Backup) -> None:
        """Puts it back, while no daemon has the directory open."""
        for source in backup.path.iterdir():
            target = self.directory / source.name
            if source.is_dir():
                shutil.rmtree(target)
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
                self.durable[source.name] = target.read_bytes()


def _some_sectors(synced: bytes, written: bytes, dice: random.Random) -> bytes:
    synced = synced.ljust(len(written), b"\0")
    if dice.random() < 0.3:  # a disk that loses all, or nothing
        return dice.choice((synced, written))
    landed = dice.getrandbits(len(written) // SECTOR_BYTES + 1)
    left = bytearray(synced[: len(written)])
    for at in range(0, len(written), SECTOR_BYTES):
        if landed >> (at // SECTOR_BYTES) & 1:
            left[at : at + SECTOR_BYTES] = written[at : at + SECTOR_BYTES]
    return bytes(left)


def _forget_sums(old: Path, new: Path) -> None:
    """A kill is an instant, and these copies are not: a page of which the map said before its slot was copied
    that it has a sum, and says behind it that it has none, was written to in between."""
    for path in old.glob("*/maps/*.map"):
        now, copy = path.read_bytes(), new / path.relative_to(old)
        then = bytearray(copy.read_bytes())
        for at in range(MAP_HEADER_BYTES + _SUMMED_AT, len(then), ENTRY_BYTES):
            then[at] &= now[at]
            then[at + 1] &= now[at + 1]
        copy.write_bytes(then)


def _some_records(synced: bytes, written: bytes, dice: random.Random) -> tuple[bytes, bool]:
    """A journal in which some of the records since the last sync are whole; whether there are any."""
    known = {(session, seq) for _, session, seq, _ in journal.records(synced)}
    fresh = sorted(
        (session, seq, at) for at, session, seq, _ in journal.records(written) if (session, seq) not in known
    )
    kept = dice.randint(0, len(fresh))
    left = bytearray(synced.ljust(len(written), b"\0"))
    left[:PAGE_BYTES] = written[:PAGE_BYTES]
    for i, (_, _, at) in enumerate(fresh[: kept + 1]):
        end = at + -(-journal.length_of(written, at) // PAGE_BYTES) * PAGE_BYTES
        part = written[at:end]
        left[at:end] = part if i < kept else _some_sectors(bytes(left[at:end]), part, dice)
    there = {(session, seq) for _, session, seq, _ in journal.records(bytes(left))}
    return bytes(left), bool(there - known)  # the last one may be whole by chance
