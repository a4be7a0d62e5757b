"""A volume in object storage at its limits: an end to acknowledging (R19), FLUSHes that wait for the store
(R14), a reserve of slots for moves."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.core_far_rig import BLOCKS, VOLUME, FarRig, page_of, wait_for
from tests.engine_rig import TIMEOUT_S
from tierblk.core import BLOCK_BYTES, FLUSH, NEED_SPACE, PAGE_BYTES, LocalDoor

A, NEW = page_of("a"), page_of("n")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FarRig]:
    rig = FarRig(tmp_path)
    yield rig
    rig.close()


def says(call: Future[None] | Future[bytes]) -> int | None:
    """The errno with which it ended."""
    error = call.exception(TIMEOUT_S)
    assert error is None or isinstance(error, OSError)
    return error.errno if error else None


def fua(rig: FarRig, page: int) -> Future[None]:
    call = rig.pool.submit(rig.door.write, page * PAGE_BYTES, NEW, fua=True)
    rig.calls.append(call)
    return call


def flush(rig: FarRig) -> Future[None]:
    call = rig.pool.submit(rig.door.flush)
    rig.calls.append(call)
    return call


# -- refuse ---


def test_what_changes_a_refused_volume_fails_and_reads_go_on(rig: FarRig) -> None:
    rig.door.write(0, A)
    rig.stored({17: A})
    rig.volume.refuse(errno.EROFS)
    calls = [rig.write(0, NEW), rig.write(0, NEW[:512]), rig.discard(0), flush(rig), fua(rig, 3)]
    assert [says(call) for call in calls] == [errno.EROFS] * 5
    assert rig.door.read(0, PAGE_BYTES) == A
    read = rig.read(17)
    rig.finish(read)
    assert read.result() == A
    rig.volume.refuse(0)
    rig.door.write(PAGE_BYTES, NEW)
    rig.door.discard(0, PAGE_BYTES)
    assert rig.door.read(0, 2 * PAGE_BYTES) == bytes(PAGE_BYTES) + NEW


def test_a_write_in_flight_is_not_acknowledged(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, fifo=True)
    rig.stuff()
    write = rig.write(0, NEW)
    wait_for(lambda: rig.door.stats()["active"] == 1)
    rig.volume.refuse(errno.EIO)
    assert rig.land(write) == [NEW]
    assert says(write) == errno.EIO
    assert rig.masks(0) == (1, 1, 0, 1), "it is there all the same"
    rig.close()


def test_a_write_that_fetches_what_it_changes_in_part_is_not_acknowledged(rig: FarRig) -> None:
    rig.stored({5: A})
    write = rig.write(5, b"n" * 512)
    rig.miss(0)
    rig.volume.refuse(errno.EROFS)
    rig.fill(0)
    assert says(write) == errno.EROFS


def full(tmp_path: Path) -> FarRig:
    """Three blocks have all the slots there are."""
    rig = FarRig(tmp_path, slots=4)
    for block in range(3):
        rig.door.write(block * BLOCK_BYTES, A)
    return rig


def test_refused_writes_that_wait_for_space_end(tmp_path: Path) -> None:
    rig = full(tmp_path)
    early = rig.write(3 * 16, NEW)
    wait_for(lambda: rig.engine.stats()["needy"] == 1)
    rig.volume.refuse(errno.EROFS)
    assert says(early) == errno.EROFS
    assert rig.engine.stats()["needy"] == 0
    rig.close()


def test_a_refused_write_does_not_begin_to_wait_for_space(tmp_path: Path) -> None:
    """It was waiting for something else when the volume was refused."""
    rig = full(tmp_path)
    rig.stored({3 * 16: A})
    write = rig.write(3 * 16, b"n" * 512)
    rig.miss(3)
    rig.volume.refuse(errno.EROFS)
    rig.fill(3)
    assert says(write) == errno.EROFS
    rig.close()


def test_writes_of_other_volumes_go_on_waiting(tmp_path: Path) -> None:
    rig = full(tmp_path)
    with (tmp_path / "other").open("w+b") as file:
        file.truncate(1 << 20)
        other = rig.engine.open_layer(3, file.fileno(), BLOCK_BYTES, kind="write-back")
        door = LocalDoor(rig.engine, None, volume=other, queue_depth=4)
        waiting = rig.pool.submit(door.write, 0, NEW)
        wait_for(lambda: rig.engine.stats()["needy"] == 1)
        rig.volume.refuse(errno.EROFS)
        wait_for(lambda: rig.engine.stats()["needy"] == 1)
        rig.door.read(0, PAGE_BYTES)
        assert not waiting.done()
        rig.epoch()
        rig.evict(1)
        rig.commit()
        waiting.result(TIMEOUT_S)
        door.drain()
        door.quit()
        door.close()
        rig.close()


# -- flush_far ---


def told(rig: FarRig) -> int:
    rig.poll()
    return sum(event.kind == FLUSH and event.layer == VOLUME for event in rig.told)


def test_flushes_wait_for_the_store_up_to_the_count(rig: FarRig) -> None:
    rig.volume.flush_far(True)
    rig.door.write(0, A)
    calls = [flush(rig), fua(rig, 5)]
    rig.until(lambda: told(rig) == 1)
    rig.waits(2)
    first = rig.volume.far_count()
    assert first == 2
    late = flush(rig)
    rig.until(lambda: told(rig) == 2)
    rig.waits(3)
    assert rig.volume.far_count() == 3
    rig.volume.far_done(0)
    rig.waits(3)
    rig.volume.far_done(first)
    assert [says(call) for call in calls] == [None, None]
    rig.waits(1)
    rig.volume.far_done(3, error=errno.EIO)
    assert says(late) == errno.EIO
    rig.volume.flush_far(False)
    assert not told(rig) > 2


def test_far_flushes_of_a_refused_volume_are_not_acknowledged(rig: FarRig) -> None:
    rig.volume.flush_far(True)
    call = flush(rig)
    rig.until(lambda: told(rig) == 1)
    rig.volume.refuse(errno.EROFS)
    rig.volume.far_done(rig.volume.far_count())
    assert says(call) == errno.EROFS


def test_a_door_that_drains_ends_its_far_flushes_and_no_others(rig: FarRig) -> None:
    rig.volume.flush_far(True)
    door = LocalDoor(rig.engine, None, volume=rig.volume, queue_depth=4)
    mine, its = flush(rig), rig.pool.submit(door.flush)
    wait_for(lambda: rig.volume.far_count() == 2)
    door.drain()
    assert says(its) == errno.EIO
    assert says(rig.pool.submit(door.flush)) == errno.EIO
    rig.waits(1)
    assert not mine.done()
    rig.volume.far_done(2)
    assert says(mine) is None
    door.quit()
    door.close()


def test_far_flushes_that_end_while_doors_drain_are_not_lost(rig: FarRig) -> None:
    """The filler looks at the same list for its own reasons."""
    rig.volume.flush_far(True)
    other = LocalDoor(rig.engine, None, volume=rig.volume, queue_depth=4)
    for _ in range(300):
        calls = [flush(rig) for _ in range(8)]
        wait_for(lambda: rig.door.stats()["waiting"] == 8)
        other.drain()  # again and again: the filler goes through all that waits
        rig.volume.far_done(rig.volume.far_count())
        for call in calls:
            assert says(call) is None
        rig.calls.clear()
    other.quit()
    other.close()


# -- the reserve ---


def test_the_reserve_is_for_moves(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, slots=6)
    rig.engine.set_reserve(2)
    for block in range(3):
        rig.door.write(block * BLOCK_BYTES, A)
    assert rig.engine.free_slots() == 2
    write = rig.write(3 * 16, NEW)
    wait_for(lambda: rig.engine.stats()["needy"] == 1)
    rig.until(lambda: any(event.kind == NEED_SPACE for event in rig.told))
    rig.stored({4 * 16: A})
    read = rig.read(4 * 16)
    rig.finish(read)
    assert rig.masks(4)[1] == 0, "a fill takes none either"
    rig.volume.seal()
    for block in range(2):
        rig.door.write(block * BLOCK_BYTES + PAGE_BYTES, NEW)
    assert rig.door.stats()["moved"] == 2
    assert rig.engine.free_slots() == 0
    assert not write.done()
    third = rig.write(2 * 16 + 1, NEW)
    wait_for(lambda: rig.engine.stats()["needy"] == 2)
    turns = rig.door.stats()["enters"]
    assert rig.door.read((BLOCKS - 1) * BLOCK_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)
    assert rig.door.stats()["enters"] < turns + 10, "nobody spins"
    blocks = rig.collect()
    rig.volume.clean(blocks, rig.upload(blocks))
    rig.volume.end_epoch()
    rig.commit()
    third.result(TIMEOUT_S)
    assert rig.engine.free_slots() == 2
    assert not write.done()
    rig.engine.set_reserve(0)
    write.result(TIMEOUT_S)
    rig.consistent()
    rig.close()


def test_only_the_reserve_is_free_and_nothing_hangs(tmp_path: Path) -> None:
    rig = FarRig(tmp_path, slots=6)
    rig.engine.set_reserve(5)
    write = rig.write(0, NEW)
    wait_for(lambda: rig.engine.stats()["needy"] == 1)
    rig.commit()
    wait_for(lambda: rig.door.stats()["space_waits"] >= 2 and rig.engine.stats()["needy"] == 1)
    rig.engine.set_reserve(4)
    write.result(TIMEOUT_S)
    rig.door.write(PAGE_BYTES, NEW)  # its block has a slot
    last = rig.write(16, NEW)
    wait_for(lambda: rig.engine.stats()["needy"] == 1)
    rig.engine.no_space(errno.ENOSPC)
    assert says(last) == errno.ENOSPC
    rig.close()
