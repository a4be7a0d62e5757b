"""A flipped bit in a page that nobody else has is found: of what has rested, in every state that a directory
can be in; and of what was written since nothing is said that is not so."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache_rig import run_directory
from tests.integration.test_cache_verify import flip
from tests.property.host import Host
from tests.property.volume_daemon import VolumeDaemon
from tierblk.cache import summed
from tierblk.cache.rows import entries_of
from tierblk.cache.verify import Found, verify
from tierblk.cache.view import State, look
from tierblk.core import BLOCK_BYTES, PAGE_BYTES, crc32c

IMAGE = random.Random(91).randbytes(20 * BLOCK_BYTES)
SIZE_BYTES = 40 * BLOCK_BYTES
SLOTS = 100


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with run_directory(tmp_path) as memory:
        yield Host(tmp_path, memory)


def begin(host: Host) -> VolumeDaemon:
    return VolumeDaemon(host, SLOTS, IMAGE, SIZE_BYTES)


def written(host: Host) -> VolumeDaemon:
    """Blocks 30 to 33 in whole, and a page of block 3."""
    daemon = begin(host)
    daemon.door.write(30 * BLOCK_BYTES, random.Random(92).randbytes(4 * BLOCK_BYTES))
    daemon.door.write(3 * BLOCK_BYTES + 2 * PAGE_BYTES, b"w" * PAGE_BYTES)
    return daemon


def settle(daemon: VolumeDaemon) -> None:
    for _ in range(2):
        daemon.run(daemon.cache.settler.turn(1000))
    assert not daemon.cache.settler.lacking


def place(host: Host, block: int, page: int) -> int:
    """Of a page of the volume, in the slots file."""
    with look(host.directory, host.run_dir) as view:
        record = next(record for record in view.records if record.kind == "local")
        return view.layer(record).entry(block).slot * BLOCK_BYTES + page * PAGE_BYTES


def beside(host: Host) -> tuple[list[tuple[int, str]], int]:
    """As another process sees it, which may look beside a daemon: ((block, what is wrong), ...), and how many
    blocks cannot be checked."""
    words = [sys.executable, "-m", "tierblk", "cache", "verify", str(host.directory), "--json"]
    env = os.environ | {"TIERBLK_RUN_DIR": str(host.run_dir)}
    done = subprocess.run(words, capture_output=True, check=False, timeout=60, env=env)
    said = json.loads(done.stdout)
    assert done.returncode == (0 if said["ok"] else 6), done.stderr
    assert said["state"] == "served"
    wrong = [(each["block"], each["text"]) for each in said["violations"]]
    return wrong, sum(layer["unchecked_blocks"] for layer in said["layers"])


def state(host: Host) -> State:
    with look(host.directory, host.run_dir) as view:
        return view.state


def found(host: Host) -> Found:
    return verify(host.directory, host.run_dir)


def bad(found: Found) -> list[tuple[int, int, int]]:
    """(block, pages, those of them that nobody else has)."""
    return sorted((bad.block, bad.pages, bad.dirty) for layer in found.layers for bad in layer.bad)


def unchecked(found: Found) -> int:
    return sum(layer.unchecked_blocks for layer in found.layers)


def end(host: Host, daemon: VolumeDaemon, how: str) -> None:
    if how == "killed":
        host.crash(kill=True)
    daemon.stop(clean=how == "ended")


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_it_is_named_when_nobody_serves(host: Host, how: str) -> None:
    daemon = written(host)
    settle(daemon)
    end(host, daemon, how)
    assert state(host).value == how
    assert (found(host).ok, unchecked(found(host))) == (True, 0)
    for block, page in ((31, 7), (31, 8), (3, 2)):
        flip(host.directory / "slots", place(host, block, page) + 100)
    after = found(host)
    assert bad(after) == [(3, 1 << 2, 1 << 2), (31, 3 << 7, 3 << 7)]
    assert all("and nobody else has it" in violation.text for violation in after.violations)
    flip(host.directory / "slots", place(host, 3, 2) + 100)
    assert bad(found(host)) == [(31, 3 << 7, 3 << 7)], "right again"


def test_it_is_named_beside_a_daemon(host: Host) -> None:
    daemon = written(host)
    assert beside(host) == ([], 5)
    settle(daemon)
    assert beside(host) == ([], 0)
    (row,) = {daemon.volume.peek_row(0)}
    slot = entries_of(row)[32].slot
    flip(host.directory / "slots", slot * BLOCK_BYTES)
    assert beside(host) == (
        [(32, f"page 0 in slot {slot} is not what was written there, and nobody else has it")],
        0,
    )
    daemon.door.write(32 * BLOCK_BYTES, b"n" * PAGE_BYTES)
    assert beside(host) == ([], 1), "it is another page now, of which nobody has a sum yet"
    settle(daemon)
    assert beside(host) == ([], 0)
    daemon.stop(clean=True)
    assert (found(host).ok, unchecked(found(host))) == (True, 0)


def test_they_live_through_ends_and_kills(host: Host) -> None:
    daemon = written(host)
    settle(daemon)
    for how in ("ended", "ended", "killed", "killed", "ended"):
        end(host, daemon, how)
        assert unchecked(found(host)) == 0
        daemon = begin(host)
        assert not daemon.cache.settler.lacking
    daemon.stop(clean=True)
    flip(host.directory / "slots", place(host, 33, 15))
    assert bad(found(host)) == [(33, 1 << 15, 1 << 15)]
    begin(host).stop(clean=True)
    assert bad(found(host)) == [(33, 1 << 15, 1 << 15)]


def test_a_power_cut_takes_them(host: Host) -> None:
    """What is in a slot may be older than its sum then."""
    daemon = written(host)
    settle(daemon)
    daemon.run(daemon.cache.commit())
    daemon.door.write(30 * BLOCK_BYTES, b"n" * PAGE_BYTES)
    host.crash(kill=False, seed=3)
    daemon.stop(clean=False)
    assert state(host) is State.CUT
    assert (found(host).ok, unchecked(found(host))) == (True, 5)
    daemon = begin(host)
    assert daemon.volume.unsummed_blocks() == 5
    settle(daemon)
    daemon.stop(clean=True)
    assert unchecked(found(host)) == 0


def test_the_file_counts_only_behind_its_own_session(host: Host) -> None:
    """An older version does not know it, and leaves it where it is while it writes."""
    daemon = written(host)
    settle(daemon)
    daemon.stop(clean=True)
    path = host.directory / summed.SUMMED
    kept = path.read_bytes()
    daemon = begin(host)
    assert not path.exists()
    daemon.door.write(30 * BLOCK_BYTES, b"n" * (4 * BLOCK_BYTES))
    daemon.stop(clean=True)
    now = path.read_bytes()
    assert now != kept
    assert (found(host).ok, unchecked(found(host))) == (True, 4)
    path.write_bytes(kept)
    assert (found(host).ok, unchecked(found(host))) == (True, 5)
    daemon = begin(host)
    assert daemon.volume.unsummed_blocks() == 5
    daemon.stop(clean=True)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "version", "unreadable"])
def test_without_the_file_nothing_is_lost_but_sums(host: Host, damage: str) -> None:
    daemon = written(host)
    settle(daemon)
    daemon.stop(clean=True)
    path = host.directory / summed.SUMMED
    packed = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(packed[:-1])
    elif damage == "flipped":
        path.write_bytes(packed)
        flip(path, 50)
    elif damage == "version":
        body = packed[:8] + struct.pack("<I", summed.VERSION + 1) + packed[12:-4]
        path.write_bytes(body + struct.pack("<I", crc32c(body)))
    elif damage == "unreadable":
        path.mkdir()
    assert (found(host).ok, unchecked(found(host))) == (True, 5)
    daemon = begin(host)
    assert daemon.volume.unsummed_blocks() == 5
    assert daemon.door.read(3 * BLOCK_BYTES + 2 * PAGE_BYTES, PAGE_BYTES) == b"w" * PAGE_BYTES
    settle(daemon)
    daemon.stop(clean=True)  # which cannot write it where a folder is, and ends in order nevertheless
    assert state(host) is State.ENDED
    assert unchecked(found(host)) == (5 if damage == "unreadable" else 0)


def test_every_one_of_many_flipped_bits(host: Host) -> None:
    """One in each of so many pages that nobody else has."""
    daemon = VolumeDaemon(host, 200, IMAGE, 130 * BLOCK_BYTES)
    chance = random.Random(93)
    daemon.door.write(0, chance.randbytes(120 * BLOCK_BYTES))
    settle(daemon)
    daemon.stop(clean=True)
    pages = [(block, page) for block in range(120) for page in range(16)]
    chosen = chance.sample(pages, 1000)
    with look(host.directory, host.run_dir) as view:
        record = next(record for record in view.records if record.kind == "local")
        slots = {block: entry.slot for block, entry in view.layer(record).entries()}
    with open(host.directory / "slots", "r+b") as file:
        for block, page in chosen:
            at, bit = chance.randrange(PAGE_BYTES), chance.randrange(8)
            file.seek(slots[block] * BLOCK_BYTES + page * PAGE_BYTES + at)
            (byte,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1 << bit]))
    wanted = {block: 0 for block, _ in chosen}
    for block, page in chosen:
        wanted[block] |= 1 << page
    assert bad(found(host)) == sorted((block, mask, mask) for block, mask in wanted.items())
