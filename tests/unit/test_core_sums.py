"""Checksums behind the writes: a block whose flag says so has the sums of what is in its slot, whatever came
in between (core/sums.c)."""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_far_rig import BLOCKS, FarRig
from tierblk.cache.summed import mask_of, room_for
from tierblk.core import BLOCK_BYTES, MAP_HEADER_BYTES, PAGE_BYTES, crc32c

A, B, NEW = (bytes([byte]) * PAGE_BYTES for byte in b"abn")
STILL = 64
MAP_ENTRY = struct.Struct("<I6H10xH4x")
RACE_S = 1.5


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FarRig]:
    made = FarRig(tmp_path)
    yield made
    made.counted()
    assert made.volume.unsummed_blocks() == len(lacking(made))
    made.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[FarRig]:
    made = FarRig(tmp_path, fifo=True)
    yield made
    made.close()


def heads(rig: FarRig) -> list[tuple[int, ...]]:
    """(slot, present, cached, zero, dirty, fresh, flags, summed) of every block of the volume."""
    packed = os.pread(rig._files[1].fileno(), BLOCKS * MAP_ENTRY.size, MAP_HEADER_BYTES)
    return list(MAP_ENTRY.iter_unpack(packed))


def lacking(rig: FarRig) -> list[int]:
    """Blocks that have dirty pages, and not their sums."""
    return [n for n, head in enumerate(heads(rig)) if head[2] & head[4] & ~head[7]]


def find(rig: FarRig) -> list[int]:
    """A whole pass."""
    found, block = list[int](), 0
    while True:
        blocks, left = rig.volume.find_unsummed(block, 1, 3)
        found += blocks
        if left is None:
            return found
        block = left


def make(rig: FarRig, block: int) -> bool:
    return rig.volume.make_sums(block, memoryview(mmap.mmap(-1, BLOCK_BYTES)))


def settle(rig: FarRig) -> None:
    find(rig)
    for block in find(rig):
        assert make(rig, block)
    assert lacking(rig) == []


def flip(rig: FarRig, block: int, page: int) -> None:
    """A bit of it."""
    at = heads(rig)[block][0] * BLOCK_BYTES + page * PAGE_BYTES + 77
    with open(rig.slots_path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 8]))
        file.flush()
        os.fsync(file.fileno())


def fits(rig: FarRig, head: tuple[int, ...]) -> int:
    """The mask of a slot's pages that are what its sums say."""
    slot = head[0]
    with mmap.mmap(-1, BLOCK_BYTES) as memory:
        os.preadv(rig.slots_fd, [memory], slot * BLOCK_BYTES)
        data = memory[:]
    kept = memoryview(os.pread(rig._files[0].fileno(), 64, slot * 64)).cast("I")
    return sum(
        (crc32c(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) == kept[page]) << page
        for page in range(16)
    )


def test_what_rested_between_two_passes_gets_sums(rig: FarRig) -> None:
    for page, data in ((5, A), (6, B), (40, NEW)):
        rig.write(page, data).result()
    assert find(rig) == [], "met"
    assert lacking(rig) == [0, 2]
    assert find(rig) == [0, 2]
    assert [make(rig, block) for block in (0, 2)] == [True, True]
    assert lacking(rig) == []
    mask, sums = rig.volume.page_sums(0)
    assert (mask, sums[5], sums[6]) == (0b1100000, crc32c(A), crc32c(B))
    assert find(rig) == find(rig) == [], "there is nothing left to do"
    assert make(rig, 0) is False


def test_a_write_takes_them_away(rig: FarRig) -> None:
    rig.write(5, A).result()
    settle(rig)
    rig.write(5, B).result()
    assert lacking(rig) == [0]
    assert find(rig) == []
    rig.write(6, B).result()
    assert find(rig) == [], "it was written to since it was met"
    assert find(rig) == [0]
    rig.write(7, B, skew=512 - PAGE_BYTES).result()  # a part of page 6
    assert make(rig, 0) is False, "written to since it was found"
    settle(rig)
    assert fits(rig, heads(rig)[0]) & 0b11100000 == 0b11100000


def test_a_discard_leaves_the_others_theirs(rig: FarRig) -> None:
    for page in (5, 6):
        rig.write(page, A).result()
    settle(rig)
    rig.discard(5).result()
    assert lacking(rig) == []
    assert heads(rig)[0][2] == 1 << 6
    assert fits(rig, heads(rig)[0]) >> 6 & 1
    rig.write(20, A).result()
    find(rig)
    rig.discard(21).result()
    assert make(rig, 1) is False


def test_while_a_write_is_under_way_a_block_does_not_rest(fifo: FarRig) -> None:
    rig = fifo
    first = rig.write(5, A)
    rig.land(first)
    rig.stuff()
    second = rig.write(6, B)
    rig.looked_up()
    assert find(rig) == find(rig) == []
    assert not heads(rig)[0][6] & STILL
    rig.land(second)
    assert (find(rig), find(rig)) == ([], [0])


def test_a_disk_that_cannot_be_read_is_told(fifo: FarRig) -> None:
    """From a FIFO nothing is read at an offset."""
    rig = fifo
    rig.land(rig.write(5, A))
    find(rig)
    assert find(rig) == [0]
    with pytest.raises(OSError, match="block 0"):
        make(rig, 0)
    assert lacking(rig) == [0]
    assert (find(rig), find(rig)) == ([], [0]), "and tried again"


def test_what_is_sealed_waits_for_its_upload_which_makes_them(rig: FarRig) -> None:
    rig.write(5, A).result()
    find(rig)
    rig.volume.seal()
    blocks = rig.collect()
    assert find(rig) == []
    rig.volume.clean(blocks, rig.upload(blocks))
    rig.volume.end_epoch()
    rig.commit()
    assert lacking(rig) == []
    assert fits(rig, heads(rig)[0]) >> 5 & 1
    rig.write(6, B).result()
    settle(rig)
    assert fits(rig, heads(rig)[0]) & 0b1100000 == 0b1100000


def test_a_block_that_moves_takes_them_along(rig: FarRig) -> None:
    for page in (5, 6):
        rig.write(page, A).result()
    settle(rig)
    slot = heads(rig)[0][0]
    rig.volume.seal()
    blocks = rig.collect()
    rig.write(5, B).result()
    assert heads(rig)[0][0] != slot
    assert lacking(rig) == [0]
    assert heads(rig)[0][7] & 0b1100000 == 1 << 6
    assert fits(rig, heads(rig)[0]) & 1 << 6
    rig.volume.clean(blocks, rig.upload(blocks))
    rig.volume.end_epoch()
    rig.commit()
    settle(rig)
    assert fits(rig, heads(rig)[0]) & 0b1100000 == 0b1100000


def test_what_flipped_before_its_upload_is_told(rig: FarRig) -> None:
    for page in (5, 6, 7, 40, 41):
        rig.write(page, A).result()
    settle(rig)
    rig.write(7, B).result()
    rig.discard(41).result()
    flip(rig, 0, 5)
    flip(rig, 0, 7)  # which has no sum
    flip(rig, 2, 8)
    rig.volume.seal()
    blocks = rig.collect()
    with mmap.mmap(-1, len(blocks) * BLOCK_BYTES) as memory, memoryview(memory) as buffer:
        count, sums = rig.volume.read_sealed(blocks, buffer)
    assert count == 4
    assert sorted(rig.volume.unfit(blocks, sums)) == [(0, 1 << 5), (2, 1 << 8)]
    rig.write(5, B).result()  # moves it
    assert rig.volume.unfit(blocks, sums) == [(2, 1 << 8)]
    rig.volume.clean(blocks, sums)
    rig.volume.end_epoch()


def test_no_sum_is_made_of_bytes_that_have_one(rig: FarRig) -> None:
    """Or what has flipped since would be right from then on."""
    for page in (5, 6):
        rig.write(page, A).result()
    settle(rig)
    flip(rig, 0, 5)
    for page in (6, 7):
        rig.write(page, B).result()
    settle(rig)
    assert heads(rig)[0][7] & 0b11100000 == 0b11100000
    assert fits(rig, heads(rig)[0]) & 0b11100000 == 0b11000000
    rig.write(5, B).result()
    settle(rig)
    assert fits(rig, heads(rig)[0]) & 0b11100000 == 0b11100000


def test_masks_of_slots(rig: FarRig) -> None:
    for page in (5, 6, 40, 80):
        rig.write(page, A).result()
    settle(rig)
    for page in (6, 40):
        rig.write(page, B).result()
    masks = room_for(64)
    rig.volume.save_summed(masks)
    wanted = {head[0]: head[7] & head[2] & head[4] for head in heads(rig) if head[0]}
    assert {slot: mask_of(masks, slot) for slot in wanted} == wanted
    assert sorted(wanted.values()) == [0, 1 << 0, 1 << 5]
    for page in (5, 80):
        rig.write(page, B).result()
    assert lacking(rig) == [0, 2, 5]
    rig.volume.load_summed(bytes(masks))
    assert lacking(rig) == [0, 2], "page 6 of block 0 had none, page 40 neither"
    rig.volume.load_summed(b"")
    assert lacking(rig) == [0, 2]


def test_whoever_has_sums_has_those_of_what_is_there(rig: FarRig) -> None:
    """Writes, discards and epochs beside those who make sums and one who looks, for a moment."""
    stop = time.monotonic() + RACE_S
    failures: list[str] = []
    checked = 0

    def writing(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < stop:
            page = chance.randrange(BLOCKS * 16 - 32)  # the last block is that of looked_up
            if chance.random() < 0.1:
                rig.door.discard(page * PAGE_BYTES, PAGE_BYTES)
            else:
                rig.door.write(page * PAGE_BYTES, chance.randbytes(PAGE_BYTES))
            time.sleep(chance.choice((0, 0, 0.001)))

    def looking() -> None:
        nonlocal checked
        while time.monotonic() < stop:
            for block, before in enumerate(heads(rig)):
                pages = before[2] & before[4] & before[7]
                if not pages:
                    continue
                good = fits(rig, before)
                if heads(rig)[block] == before:
                    checked += 1
                    if good & pages != pages:
                        failures.append(f"block {block}: {before}, {good & pages:#x}")

    def making() -> None:
        while time.monotonic() < stop:
            for block in rig.volume.find_unsummed(0, 1, 100)[0]:
                make(rig, block)

    threads = [threading.Thread(target=writing, args=(seed,)) for seed in (1, 2)]
    threads += [threading.Thread(target=looking), threading.Thread(target=making)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        rig.epoch()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    assert checked > 20
    settle(rig)
    for head in heads(rig):
        sums_of = head[2]
        assert head[0] == 0 or fits(rig, head) & sums_of == sums_of
