"""The engine by itself: native, through the local door, the test deciding what the remote brings and when."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from errno import EBADF
from pathlib import Path

import pytest

from tests.engine_rig import Rig, unpack_row
from tierblk.core import BLOCK_BYTES, MAP_HEADER_BYTES, PAGE_BYTES, ROW_BYTES, Engine, crc32c, page_sums
from tierblk.latency import lower_bound_ticks

TAIL_BYTES = 3 * 512
IMAGE = random.Random(7).randbytes(40 * BLOCK_BYTES + TAIL_BYTES)
ZERO_BLOCK = 9
IMAGE = IMAGE[: ZERO_BLOCK * BLOCK_BYTES] + bytes(BLOCK_BYTES) + IMAGE[(ZERO_BLOCK + 1) * BLOCK_BYTES :]


@pytest.fixture(params=[512, 4096], ids=["512e", "4kn"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(tmp_path, IMAGE, 64, dio_align_bytes=request.param)
    yield rig
    rig.close()


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


@pytest.mark.parametrize("mask", [0, 1, 0x8000, 0xFFFF, 0x7FF8, 0b1011_1111_0110])
def test_sums_of_the_pages_of_a_block(mask: int) -> None:
    block = os.urandom(BLOCK_BYTES)
    sums = memoryview(page_sums(memoryview(block), mask)).cast("I")
    wanted = [crc32c(block[at : at + PAGE_BYTES]) for at in range(0, BLOCK_BYTES, PAGE_BYTES)]
    assert list(sums) == [each if mask >> page & 1 else 0 for page, each in enumerate(wanted)]


def test_a_miss_is_filled_once_and_then_hits(rig: Rig) -> None:
    reads = [rig.read(512 * i, 4096) for i in range(12)]
    rig.settle()
    assert set(rig.asked) == {0}  # I7, single flight: twelve readers, one MISS
    rig.finish(*reads)
    for i, read in enumerate(reads):
        assert read.result() == rig.expect(512 * i, 4096)
    before = rig.door.stats()
    assert rig.read(0, BLOCK_BYTES).result(10) == rig.expect(0, BLOCK_BYTES)
    after = rig.door.stats()
    assert after["hit_requests"] == before["hit_requests"] + 1
    assert after["miss_requests"] == before["miss_requests"]


def test_a_waiter_wakes_at_its_own_pages(rig: Rig) -> None:
    early, late = rig.read(PAGE_BYTES, 2 * PAGE_BYTES), rig.read(14 * PAGE_BYTES, PAGE_BYTES)
    rig.settle()
    rig.fill(0, pages=3, final=False)
    assert early.result(10) == rig.expect(PAGE_BYTES, 2 * PAGE_BYTES)
    assert not late.done()
    rig.finish(late)
    assert late.result() == rig.expect(14 * PAGE_BYTES, PAGE_BYTES)


def test_a_fill_that_ends_early_keeps_what_came_and_asks_for_the_rest(rig: Rig) -> None:
    read = rig.read(0, BLOCK_BYTES)
    rig.settle()
    rig.fill(0, pages=5, final=True)
    rig.until(lambda: 0 in rig.asked and 0 not in rig.finals)
    assert rig.asked[0].pages == 0xFFE0  # a new MISS, for what is still missing (R5)
    rig.finish(read)
    assert read.result() == rig.expect(0, BLOCK_BYTES)


def test_reads_cross_blocks_and_the_ragged_end(rig: Rig) -> None:
    size = len(IMAGE)
    assert size % PAGE_BYTES
    for offset, length in [(0, size), (size - 512, 512), (BLOCK_BYTES - 512, 1024), (512, 5 * BLOCK_BYTES)]:
        read = rig.read(offset, length)
        rig.finish(read)
        assert read.result() == rig.expect(offset, length)
    last = len(IMAGE) // BLOCK_BYTES
    slot = rig.entries()[last][0]
    with rig.slots_path.open("rb") as slots:
        slots.seek(slot * BLOCK_BYTES)
        page = slots.read(PAGE_BYTES)
    assert page == IMAGE[last * BLOCK_BYTES :] + bytes(PAGE_BYTES - TAIL_BYTES)  # beyond the end: zeros


def test_reads_outside_the_device_are_refused(rig: Rig) -> None:
    for offset, length in [(len(IMAGE), 512), (len(IMAGE) - 512, 1024), (1, 512), (0, 513), (1 << 63, 512)]:
        with pytest.raises(OSError, match="read of"):
            rig.door.read(offset, length)


def test_a_block_of_zeros_takes_no_slot(rig: Rig) -> None:
    used = rig.engine.free_slots()
    read = rig.read(ZERO_BLOCK * BLOCK_BYTES, BLOCK_BYTES)
    rig.finish(read)
    assert read.result() == bytes(BLOCK_BYTES)
    assert rig.entries()[ZERO_BLOCK] == (0, 0, 0, 0xFFFF, 0)
    assert rig.engine.free_slots() == used
    assert rig.read(ZERO_BLOCK * BLOCK_BYTES + 512, 512).result(10) == bytes(512)
    assert rig.door.stats()["zero_requests"] == 1


def test_a_failed_fill_ends_its_waiters_and_nothing_is_cached(rig: Rig) -> None:
    read, other = rig.read(0, 4096), rig.read(BLOCK_BYTES, 4096)
    rig.until(lambda: set(rig.asked) == {0, 1})
    rig.fill(0, pages=0, final=False)
    rig.fail(0, errno=5)
    with pytest.raises(OSError, match="Input/output error"):
        read.result(10)
    rig.finish(other)
    assert 0 not in rig.entries()
    again = rig.read(0, 4096)  # the next reader asks anew
    rig.finish(again)
    assert again.result() == rig.expect(0, 4096)


def test_latencies_are_counted_by_tier(rig: Rig) -> None:
    rig.finish(rig.read(0, 2 * BLOCK_BYTES))
    for _ in range(3):
        rig.finish(rig.read(0, BLOCK_BYTES))
    (hit, hit_ticks), (zero, _), (miss, miss_ticks), *others = rig.door.latencies()
    stats = rig.door.stats()
    assert [sum(hit), sum(zero), sum(miss)] == [stats[f"{t}_requests"] for t in ("hit", "zero", "miss")]
    assert sum(hit) > 0
    assert sum(miss) > 0
    assert [(sum(counts), ticks) for counts, ticks in others] == [(0, 0)] * 3
    for counts, ticks in ((hit, hit_ticks), (miss, miss_ticks)):
        least = sum(lower_bound_ticks(bucket) * count for bucket, count in enumerate(counts))
        most = sum(lower_bound_ticks(bucket + 1) * count for bucket, count in enumerate(counts))
        assert least <= ticks < most
    assert 1e-11 < rig.engine.tick_s() < 1e-6


def test_r5_an_old_token_is_refused(rig: Rig) -> None:
    read = rig.read(0, 4096)
    rig.settle()
    old = rig.asked[0]
    rig.fail(0)
    rig.until(lambda: not rig.asked)
    assert isinstance(read.exception(10), OSError)
    again = rig.read(0, 4096)
    rig.until(lambda: 0 in rig.asked)
    new, rig.asked[0] = rig.asked[0], old
    rig.fill(0)
    rig.until(lambda: not rig.finals)
    assert rig.results[-1].result == -116  # ESTALE
    assert not again.done()
    rig.asked[0] = new
    rig.finish(again)
    assert again.result() == rig.expect(0, 4096)


@pytest.mark.parametrize("offset", [64 * BLOCK_BYTES, 1 << 62, 512])
def test_i12_a_fill_outside_the_staging_memory_is_refused(rig: Rig, offset: int) -> None:
    read = rig.read(0, 4096)
    rig.settle()
    record = rig.asked[0]._replace(kind=1, value=offset, result=1, pages=0xFFFF)
    rig.engine.push([record])
    rig.until(lambda: bool(rig.results))
    assert rig.results[-1].result == -116
    rig.asked[0] = record
    rig.finish(read)
    assert read.result() == rig.expect(0, 4096)


def test_draining_ends_parked_and_later_misses_but_not_hits(rig: Rig) -> None:
    warm = rig.read(0, 4096)
    rig.finish(warm)
    parked = [rig.read(BLOCK_BYTES * i, 4096) for i in range(1, 8)]
    rig.until(lambda: len(rig.asked) == 7)
    rig.door.drain()
    for read in parked:
        assert isinstance(read.exception(10), OSError)
    assert isinstance(rig.read(20 * BLOCK_BYTES, 512).exception(10), OSError)
    assert rig.read(0, 4096).result(10) == rig.expect(0, 4096)
    assert rig.door.stats()["waiting"] == 0
    rig.settle_all()  # the fills go on for others


def test_without_a_free_slot_reads_pass_through(tmp_path: Path) -> None:
    rig = Rig(tmp_path, IMAGE, 4)
    for round_ in range(2):
        for block in range(8):
            read = rig.read(block * BLOCK_BYTES, BLOCK_BYTES)
            rig.finish(read)
            assert read.result() == rig.expect(block * BLOCK_BYTES, BLOCK_BYTES), (round_, block)
    assert len(rig.entries()) == 3
    assert rig.engine.free_slots() == 0
    rig.close()


def test_i4_an_evicted_slot_is_free_after_the_commit_only(rig: Rig) -> None:
    reads = [rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(8)]
    rig.finish(*reads)
    rig.commit()
    free = rig.engine.free_slots()
    assert rig.evict(5) == 5
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free, 5)
    rig.commit(ok=False)  # R7: a failed cycle releases nothing and forgets nothing
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free, 5)
    assert rig.layer.changed()
    rig.engine.commit_begin()
    assert rig.evict(1) == 1  # R6: freed after step 1, so not released by this cycle
    rig.layer.take_changed(100)
    rig.engine.commit_end(True)
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free + 5, 1)


def test_eviction_spares_what_is_hit_again(rig: Rig) -> None:
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(8)])
    rig.finish(
        *[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(10, 30)]
    )  # time passes: others are filled
    for i in (2, 5):
        assert rig.read(i * BLOCK_BYTES, 512).result(10) == rig.expect(i * BLOCK_BYTES, 512)
    assert rig.evict(20) == 20
    assert {2, 5} <= set(rig.entries())


def test_eviction_never_takes_what_is_being_filled(rig: Rig) -> None:
    read = rig.read(0, BLOCK_BYTES)
    rig.settle()
    rig.fill(0, pages=4, final=False)
    assert rig.evict(64) == 0
    rig.finish(read)
    assert read.result() == rig.expect(0, BLOCK_BYTES)


def test_i3_a_block_with_a_dirty_page_is_never_evicted(rig: Rig) -> None:
    """Nobody makes a page dirty yet; a row of the index can say so."""
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(3)])
    rig.commit()
    rig.stop()
    row = bytearray(rig.index[0][:-4])
    row[12 + 4 : 12 + 6] = row[12 + 10 : 12 + 12] = b"\x02\x00"  # the second block: present, dirty
    rig.index[0] = bytes(row) + crc32c(row).to_bytes(4, "little")
    rig.start("index")
    assert rig.evict(3) == 2
    assert [entry[1:] for entry in rig.entries().values()] == [(2, 0xFFFF, 0, 2)]
    assert set(rig.entries()) == {1}


def test_kill_and_warm_start_refetch_nothing(rig: Rig) -> None:
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(12)])
    held = rig.entries()
    rig.stop()  # nothing was committed: a killed daemon's index is empty
    assert not rig.index
    rig.start("warm")
    assert rig.entries() == held
    assert rig.layer.changed()  # R1: all rows count as changed
    for i in range(12):
        assert rig.read(i * BLOCK_BYTES, BLOCK_BYTES).result(10) == rig.expect(i * BLOCK_BYTES, BLOCK_BYTES)
    assert not rig.asked


def test_r1_a_warm_start_forgets_the_dead_sessions_requests(rig: Rig) -> None:
    rig.finish(rig.read(0, 4096))
    rig.stop()
    with rig.map_path.open("r+b") as file:
        file.seek(4096 + 16)
        file.write(b"\xff" * 16)  # a fill, readers and writers of the killed daemon
    rig.start("warm")
    assert rig.read(0, 4096).result(10) == rig.expect(0, 4096)
    assert rig.evict(1) == 1


def test_r8_slots_of_the_old_index_are_quarantined_at_a_warm_start(rig: Rig) -> None:
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(6)])
    rig.commit()
    free = rig.engine.free_slots()
    assert rig.evict(6) == 6
    rig.stop()
    rig.start("warm")
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free, 6)
    rig.commit()
    assert (rig.engine.free_slots(), rig.engine.quarantined_slots()) == (free + 6, 0)


def test_rows_survive_a_restart_from_the_index(rig: Rig) -> None:
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(12)])
    rig.commit()
    held = rig.entries()
    rig.stop()
    rig.start("index")
    assert rig.entries() == held
    assert not rig.layer.changed()
    mask, sums = rig.layer.page_sums(0)
    assert mask == 0xFFFF
    assert sums[3] == crc32c(IMAGE[3 * PAGE_BYTES : 4 * PAGE_BYTES])


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\xff\xff\xff\x00"),  # a slot beyond the file
        (8, b"\xff\xff"),  # R2: zero and cached at once
        (10, b"\x01\x00"),  # I3: dirty, but not present
        (12, b"\x01\x00\x00\x00"),  # I4: the second block names the first one's slot
    ],
)
def test_r9_a_row_that_cannot_be_is_refused_whole(rig: Rig, offset: int, value: bytes) -> None:
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(2)])
    rig.commit()
    rig.stop()
    (row, good), *_ = rig.index.items()
    slot = next(unpack_row(good))[0]
    if offset == 12:
        value = slot.to_bytes(4, "little")
    bad = bytearray(good[:-4])
    bad[offset : offset + len(value)] = value
    rig.index = {}
    rig.start("index")
    rig.close_door()
    rig.engine.close()
    fds = rig._fds
    engine = Engine(slots_fd=fds[0], slot_count=64, sums_fd=fds[1], staging_bytes=BLOCK_BYTES)
    layer = engine.open_layer(1, fds[2], len(IMAGE))
    with pytest.raises(ValueError, match="cannot be"):
        layer.load_row(row, bytes(bad) + crc32c(bad).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="checksum"):
        layer.load_row(row, bytes(bad) + good[-4:])
    with pytest.raises(ValueError, match="length"):
        layer.load_row(row, good[:-1])
    with pytest.raises(ValueError, match="cannot be"):
        layer.load_row(10**6, good)
    engine.finish_load()
    assert layer.peek_row(row) == b""  # nothing of it was taken
    assert engine.free_slots() == 63
    engine.close()
    for fd in fds:
        os.close(fd)
    rig._fds = []


def test_a_failing_slot_is_given_up_and_read_from_the_remote(rig: Rig) -> None:
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(4)])
    bad_slot, bad_block = max((entry[0], block) for block, entry in rig.entries().items())
    os.truncate(rig.slots_path, bad_slot * BLOCK_BYTES)  # that slot now reads short, as a failing disk would
    reads = [rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(4)]
    rig.finish(*reads)
    for i, read in enumerate(reads):
        assert read.result() == rig.expect(i * BLOCK_BYTES, BLOCK_BYTES)
    assert rig.door.stats()["slot_errors"] == 1
    assert rig.engine.stats()["bad"] == 1
    assert rig.entries()[bad_block][0] != bad_slot


def test_r2_a_slot_that_fails_stays_with_its_block_while_others_read_it(rig: Rig) -> None:
    """A slot read takes microseconds, so the count is put into the map as another read would have put it
    there."""
    rig.finish(*[rig.read(i * BLOCK_BYTES, BLOCK_BYTES) for i in range(4)])
    slot, block = max((entry[0], block) for block, entry in rig.entries().items())
    os.truncate(rig.slots_path, slot * BLOCK_BYTES)
    with rig.map_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as entries:
        readers_at = MAP_HEADER_BYTES + block * 32 + 20
        entries[readers_at] += 1
        read = rig.read(block * BLOCK_BYTES, BLOCK_BYTES)
        rig.finish(read)
        entries[readers_at] -= 1
    assert read.result() == rig.expect(block * BLOCK_BYTES, BLOCK_BYTES)
    assert rig.entries()[block][0] == slot
    assert rig.engine.stats()["bad"] == 0


def test_i5_a_block_whose_sums_cannot_be_stored_is_not_cached(rig: Rig) -> None:
    read_only = os.open(rig.sums_path, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(read_only, rig._fds[1], inheritable=False)
    os.close(read_only)
    read = rig.read(0, BLOCK_BYTES)
    rig.finish(read)
    assert read.result() == rig.expect(0, BLOCK_BYTES)
    assert [(event.result, event.pages) for event in rig.results] == [(-EBADF, 0)]
    assert rig.entries() == {}
    assert rig.engine.free_slots() == rig.slots - 1


def test_take_changed_gives_every_row_once(tmp_path: Path) -> None:
    image = random.Random(3).randbytes(4096) + bytes(1024 * BLOCK_BYTES)
    rig = Rig(tmp_path, image, 8)
    rig.finish(*[rig.read(i * 64 * BLOCK_BYTES, 512) for i in range(16)])
    rows = []
    while batch := rig.layer.take_changed(3):
        assert all(len(packed) == ROW_BYTES for _, packed in batch)
        rows += [row for row, _ in batch]
    assert sorted(rows) == list(range(16))
    assert not rig.layer.changed()
    rig.layer.put_back([5])
    assert [row for row, _ in rig.layer.take_changed(10)] == [5]
    rig.close()


def test_an_engine_with_an_open_door_is_not_closed(rig: Rig) -> None:
    with pytest.raises(OSError, match="still open"):
        rig.engine.close()
