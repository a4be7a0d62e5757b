"""The machine around a daemon: a disk whose unsynced writes a power cut may lose, a memory that a kill leaves
alone.

Crashes are composed, not provoked. A *kill* is a copy of everything, the maps on tmpfs first, taken before
the dying daemon's engine is closed: nothing that closing does is in it, and what was being written to a slot
may be there in part, as after SIGKILL. (The tests of the whole daemon send real SIGKILLs; a child for every
step here would cost a hundred times as much.) A *power cut* leaves the index as its last transaction left it,
and of every sector of `slots` and `sums` what was there at the last sync, or now, each by itself.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.cache_rig import read_superblock

SECTOR_BYTES = 512
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
    durable: dict[str, bytes] = field(default_factory=lambda: dict.fromkeys(VOLATILE, b""))
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
        if kill:
            shutil.copytree(old_run_dir, self.run_dir)
        for name in ("sums", "slots"):  # after the maps: what a map calls cached was in its slot before
            self.directory.mkdir(exist_ok=True)
            shutil.copy(old_directory / name, self.directory / name)
        shutil.copytree(old_directory / "index", self.directory / "index")
        if not kill:
            dice = random.Random(seed)
            for name in VOLATILE:
                path = self.directory / name
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
    sectors = (slice(at, at + SECTOR_BYTES) for at in range(0, len(written), SECTOR_BYTES))
    return b"".join(dice.choice((synced, written))[sector] for sector in sectors)
