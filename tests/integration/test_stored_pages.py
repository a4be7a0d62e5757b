"""Pages of volumes in stores: whatever the map, a read brings what was written, or says that it cannot."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from uuid import UUID

import pytest
import zstandard

from tests.integration.servers import remote_settings
from tests.integration.volume_store import Watched, put
from tests.unit import volume_rig
from tests.unit.volume_rig import UUID_1, Volume
from tierblk.core import crc32c
from tierblk.errors import RemoteMismatch, RemoteRefused
from tierblk.extent import PAGE_BYTES
from tierblk.remote import epoch, stored
from tierblk.remote.birth import Birth
from tierblk.remote.directory import DirectoryStore
from tierblk.remote.fetcher import Fetcher
from tierblk.remote.history import open_lineage
from tierblk.remote.pieces import Piece
from tierblk.remote.record import Codec, Run
from tierblk.remote.source import Identity
from tierblk.remote.stored import Checksum, StoredPages

PAGES = 200
SIZE_BYTES = PAGES * PAGE_BYTES - 512  # the last page is cut
BIRTH = Birth(UUID_1, SIZE_BYTES, None, None, 1_795_000_000)
UUID_2 = UUID(int=2)
MARK = 0xEE
Stored = Callable[..., Awaitable[StoredPages]]


def zstd(raw: bytes) -> bytes | None:
    frame = zstandard.ZstdCompressor().compress(raw)
    return frame if len(frame) < len(raw) else None


def noise(seed: int) -> bytes:
    return Random(seed).randbytes(PAGE_BYTES)


def text(seed: int) -> bytes:
    return f"page {seed} ".encode().ljust(16, b".") * (PAGE_BYTES // 16)


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, Watched]:
    return {url: Watched(DirectoryStore(f"file://{tmp_path}/{url}")) for url in ("parent", "own")}


@pytest.fixture
async def source(watched: dict[str, Watched]) -> AsyncIterator[Stored]:
    async def open_parent(url: str) -> Watched:
        return watched["parent"]

    async def make(
        volume: Volume, parent: Volume | None = None, checksum: Checksum = crc32c, **keys: int
    ) -> StoredPages:
        if parent is not None:
            await put(parent, watched["parent"])
        await put(volume, watched["own"])
        found = await open_lineage(watched["own"], open_parent)
        return StoredPages(found, volume.map.copy(), checksum, **keys)

    yield make
    for store in watched.values():
        await store.aclose()


class Reading:
    """A buffer, and what was told of it."""

    def __init__(self, first: int, pages: int) -> None:
        self.offset_bytes = first * PAGE_BYTES
        self.buffer = bytearray([MARK]) * (
            min(self.offset_bytes + pages * PAGE_BYTES, SIZE_BYTES) - self.offset_bytes
        )
        self.told: list[int] = []
        self.seen = b""

    def progress(self, count: int) -> None:
        assert count > len(self.seen)
        assert self.buffer.startswith(self.seen), "what was told is not written again (R5)"
        self.told.append(count)
        self.seen = bytes(self.buffer[:count])

    async def of(self, pages: StoredPages) -> Reading:
        await pages.read_into(self.offset_bytes, memoryview(self.buffer), self.progress)
        assert self.seen == self.buffer, "everything is told"
        return self


def expected(volume: Volume, pages: dict[int, bytes], reading: Reading) -> bytes:
    first = reading.offset_bytes // PAGE_BYTES
    count = -(-len(reading.buffer) // PAGE_BYTES)
    there = {
        piece.page + at
        for piece in volume.map.lookup(first, count)
        if isinstance(piece, Piece)
        for at in range(piece.pages)
    }
    whole = b"".join(
        pages[page] if page in there else bytes(PAGE_BYTES) for page in range(first, first + count)
    )
    return whole[: len(reading.buffer)]


def random_story(chance: Random) -> tuple[Volume, Volume, dict[int, bytes]]:
    """A clone, its parent, and what is in the pages that were ever written."""
    parent = volume = Volume(BIRTH)
    pages: dict[int, bytes] = {}
    for number in range(10):
        if number == 6:
            parent, volume = volume, volume.clone(UUID_2, "parent")
        writes, page = {}, chance.randrange(20)
        while page < PAGES:
            make = chance.choice([noise, text, text])
            for at in range(page, min(PAGES, page + chance.randrange(1, 30))):
                writes[at] = make(number * 1000 + at)
                page = at
            page += chance.randrange(2, 60)
        zeroes = [(at, 1) for at in range(0, PAGES, 11) if at not in writes and chance.random() < 0.3]
        volume.commit(writes, zeroes, inline=chance.random() < 0.4)
        pages |= writes
    return volume, parent, pages


@pytest.mark.parametrize("limits", ["as they are", "small"])
@pytest.mark.parametrize("seed", range(6))
async def test_whatever_the_map(
    source: Stored, monkeypatch: pytest.MonkeyPatch, seed: int, limits: str
) -> None:
    chance = Random(seed)
    monkeypatch.setattr(volume_rig, "squeezed", zstd)
    volume, parent, pages = random_story(chance)
    assert {piece.codec for _, row in volume.map.rows() for piece in row} == {Codec.RAW, Codec.ZSTD}
    if limits == "small":
        monkeypatch.setattr(stored, "GAP_BYTES_MAX", PAGE_BYTES)
        monkeypatch.setattr(stored, "RANGE_BYTES_MAX", 5 * PAGE_BYTES)
        monkeypatch.setattr(stored, "THREAD_BYTES", 1)
    opened = await source(volume, parent)
    for _ in range(30):
        first = chance.randrange(PAGES)
        reading = Reading(first, chance.randrange(1, PAGES - first + 1))
        await reading.of(opened)
        assert reading.buffer == expected(volume, pages, reading)
        told = [count for count in reading.told if count != len(reading.buffer)]
        assert all(count % PAGE_BYTES == 0 for count in told)


async def test_pages_in_order_go_straight_into_the_buffer(
    source: Stored, watched: dict[str, Watched]
) -> None:
    volume = Volume(BIRTH)
    volume.commit({page: noise(page) for page in range(10, 90)})
    opened = await source(volume)
    reading = await Reading(20, 50).of(opened)
    assert reading.buffer == b"".join(noise(page) for page in range(20, 70))
    ((_, offset_bytes, length_bytes),) = watched["own"].ranges
    assert (offset_bytes, length_bytes) == (10 * PAGE_BYTES, 50 * PAGE_BYTES)
    assert watched["own"].owners == [reading.buffer]
    assert watched["own"].owners[0] is reading.buffer


async def test_what_lies_near_in_one_object_is_one_request(
    source: Stored, watched: dict[str, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = Volume(BIRTH)
    volume.commit({page: noise(page) for page in range(100)})
    volume.commit({page: noise(1000 + page) for page in range(0, 100, 10)})
    opened = await source(volume)
    reading = await Reading(0, 100).of(opened)
    assert [length for _, _, length in watched["own"].ranges] == [10 * PAGE_BYTES, 99 * PAGE_BYTES]
    assert reading.buffer[: 2 * PAGE_BYTES] == noise(1000) + noise(1)
    watched["own"].ranges.clear()
    monkeypatch.setattr(stored, "GAP_BYTES_MAX", 0)
    await Reading(0, 100).of(opened)
    assert len(watched["own"].ranges) == 1 + 10
    watched["own"].ranges.clear()
    monkeypatch.setattr(stored, "GAP_BYTES_MAX", PAGE_BYTES)
    monkeypatch.setattr(stored, "RANGE_BYTES_MAX", 20 * PAGE_BYTES)
    await Reading(0, 100).of(opened)
    assert max(length for _, _, length in watched["own"].ranges) == 19 * PAGE_BYTES
    assert len(watched["own"].ranges) == 6


async def test_runs_may_lie_in_any_order_with_gaps_and_over_each_other(
    source: Stored, watched: dict[str, Watched]
) -> None:
    volume = Volume(BIRTH)
    record = volume.commit({page: noise(page) for page in range(6)})
    at = {0: 1, 1: 2, 2: 4, 3: 0, 4: 1}  # pages 0, 1 and 2 go on here but not there; 4 is as 0
    runs = tuple(
        Run(page, 1, 7, at[page] * PAGE_BYTES, PAGE_BYTES, Codec.RAW, volume_rig.crcs(noise(at[page])))
        for page in range(5)
    )
    five = b"".join(map(noise, range(1, 6)))
    whole = Run(16, 5, 7, PAGE_BYTES, 5 * PAGE_BYTES, Codec.RAW, volume_rig.crcs(five))
    volume = Volume(BIRTH, {str(record.object_name(7)): b"".join(map(noise, range(6)))})
    volume.take(replace(record, runs=(*runs, whole)))
    opened = await source(volume)
    assert (await Reading(0, 5).of(opened)).buffer == b"".join(noise(at[page]) for page in range(5))
    assert (await Reading(0, 3).of(opened)).buffer == noise(1) + noise(2) + noise(4)
    assert [length for _, _, length in watched["own"].ranges] == [5 * PAGE_BYTES, 4 * PAGE_BYTES]
    assert (await Reading(0, 21).of(opened)).buffer.endswith(five)
    assert len(watched["own"].ranges) == 3


async def test_a_compressed_run_is_read_once_for_all_its_parts(
    source: Stored, watched: dict[str, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_rig, "squeezed", zstd)
    volume = Volume(BIRTH)
    volume.commit({page: text(page) for page in range(16)})
    volume.commit({5: noise(5), 9: noise(9)})
    opened = await source(volume)
    reading = await Reading(3, 10).of(opened)
    assert reading.buffer == b"".join((noise if page in (5, 9) else text)(page) for page in range(3, 13))
    assert len(watched["own"].ranges) == 2


async def test_the_last_page_in_part_and_as_a_whole(source: Stored) -> None:
    volume = Volume(BIRTH)
    last = noise(1)[:-512] + bytes(512)
    volume.commit({198: noise(198), 199: last})
    opened = await source(volume)
    reading = await Reading(198, 2).of(opened)
    assert len(reading.buffer) == 2 * PAGE_BYTES - 512
    assert reading.buffer == (noise(198) + last)[:-512]
    whole = bytearray(2 * PAGE_BYTES)
    await opened.read_into(198 * PAGE_BYTES, memoryview(whole), lambda count: None)
    assert whole == noise(198) + last


async def test_holes_are_zeros_and_ask_nobody(source: Stored, watched: dict[str, Watched]) -> None:
    volume = Volume(BIRTH)
    volume.commit({50: noise(50)}, [(60, 10)])
    opened = await source(volume)
    reading = await Reading(51, 100).of(opened)
    assert reading.buffer == bytes(100 * PAGE_BYTES)
    assert (reading.told, watched["own"].ranges) == ([100 * PAGE_BYTES], [])
    assert (await Reading(40, 20).of(opened)).told == [10 * PAGE_BYTES, 20 * PAGE_BYTES]


@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (0, 100), (0, SIZE_BYTES + 8192), (-4096, 4096)])
async def test_what_is_not_whole_pages_of_it(source: Stored, offset: int, length: int) -> None:
    opened = await source(Volume(BIRTH))
    with pytest.raises(ValueError, match="pages"):
        await opened.read_into(offset, memoryview(bytearray(length)), lambda count: None)


async def test_a_clone_and_its_identity(source: Stored, watched: dict[str, Watched]) -> None:
    parent = Volume(BIRTH)
    parent.commit({1: noise(1), 2: noise(2)})
    volume = parent.clone(UUID_2, "parent")
    volume.commit({2: noise(22)}, inline=True)
    opened = await source(volume, parent)
    assert (await Reading(1, 2).of(opened)).buffer == noise(1) + noise(22)
    assert [len(watched[url].ranges) for url in ("parent", "own")] == [1, 1]
    assert opened.identity == Identity(watched["own"].shown, SIZE_BYTES, f"volume:{UUID_2}")
    await opened.aclose()
    assert all(store.is_closed for store in watched.values())


async def test_the_map_counts_as_it_was_when_the_read_began(
    source: Stored, watched: dict[str, Watched]
) -> None:
    volume = Volume(BIRTH)
    volume.commit({1: noise(1)})
    opened = await source(volume)
    record = volume.commit({1: noise(2)})

    async def go_on(name: str) -> None:
        watched["own"].before = None
        opened._extents.apply(record, epoch.hash_of(volume.objects["epoch/" + f"{2:016x}"]))

    watched["own"].before = go_on
    assert (await Reading(1, 1).of(opened)).buffer == noise(1)
    await put(volume, watched["own"])
    assert (await Reading(1, 1).of(opened)).buffer == noise(2)


# --- what goes wrong ---


def frames() -> dict[str, bytes]:
    """What could be stored instead of a frame of 4 pages, and begins with the first of them, if it can."""
    raw = b"".join(text(page) for page in range(4))
    packed = zstandard.ZstdCompressor().compress
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress
    huge = b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\1\0\0"
    return {
        "of fewer pages": packed(raw[:PAGE_BYTES]),
        "of more pages": packed(raw * 2),
        "an enormous one": huge,
        "of fewer pages than it says": unsized(raw[:PAGE_BYTES]),
        "of more pages than it says": unsized(raw * 2),
        "a part": packed(raw)[:-3],
        "something behind it": packed(raw) + b"?",
        "two": packed(raw[:-PAGE_BYTES]) + packed(raw[:PAGE_BYTES]),
        "no frame": b"no frame at all",
    }


@pytest.mark.parametrize("wrong", frames())
async def test_frames_that_are_none(source: Stored, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setattr(volume_rig, "squeezed", lambda raw: frames()[wrong])
    volume = Volume(BIRTH)
    volume.commit({page: text(page) for page in range(4)})
    opened = await source(volume)
    reading = Reading(0, 1)
    if wrong in ("of fewer pages", "of more pages", "an enormous one"):  # nothing is reserved for it (I12)
        monkeypatch.delattr(zstandard, "ZstdDecompressor")
    with pytest.raises(RemoteMismatch, match=r"data/.* does not decompress to 4 pages"):
        await reading.of(opened)
    assert reading.told == []
    assert reading.buffer == bytes([MARK]) * PAGE_BYTES


async def test_a_frame_of_other_pages(source: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_rig, "squeezed", lambda raw: zstd(raw[:-1] + b"?"))
    volume = Volume(BIRTH)
    volume.commit({page: text(page) for page in range(4)})
    reading = Reading(0, 4)
    with pytest.raises(RemoteMismatch, match=r"data/.*: page 3 is not what was stored"):
        await reading.of(await source(volume))
    assert reading.told == []


async def test_a_frame_that_does_not_say_its_size_is_one(
    source: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_rig, "squeezed", zstandard.ZstdCompressor(write_content_size=False).compress)
    volume = Volume(BIRTH)
    volume.commit({page: text(page) for page in range(4)})
    assert (await Reading(1, 2).of(await source(volume))).buffer == text(1) + text(2)


async def test_a_wrong_checksum_is_told_and_what_is_before_it_stays(
    source: Stored, watched: dict[str, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "RANGE_BYTES_MAX", 8 * PAGE_BYTES)
    monkeypatch.setattr(stored, "REQUESTS_OF_READ_MAX", 1)
    volume = Volume(BIRTH)
    record = volume.commit({page: noise(page) for page in range(32)})
    name = str(record.object_name(7))
    data = bytearray(volume.objects[name])
    data[20 * PAGE_BYTES] ^= 1
    volume.objects[name] = bytes(data)
    opened = await source(volume)
    reading = Reading(0, 32)
    with pytest.raises(RemoteMismatch, match=rf"own/{name}: page 20 is not what was stored"):
        await reading.of(opened)
    # A piece is read as a whole, and these have 16 pages.
    assert reading.told == [16 * PAGE_BYTES]


async def test_the_fetcher_asks_once_more_for_what_does_not_fit(
    source: Stored, watched: dict[str, Watched], caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume(BIRTH)
    volume.commit({page: noise(page) for page in range(32)})
    wrongs = [1]
    opened = await source(volume, checksum=lambda data: crc32c(data) ^ (wrongs.pop() if wrongs else 0))
    fetcher = Fetcher(opened, remote_settings())
    reading = Reading(0, 32)
    await fetcher.fetch(0, memoryview(reading.buffer), reading.progress)
    assert reading.buffer == b"".join(noise(page) for page in range(32))
    assert "asking once more" in caplog.text
    assert len(watched["own"].ranges) == 2


async def test_an_object_that_is_not_there_is_named(source: Stored, watched: dict[str, Watched]) -> None:
    volume = Volume(BIRTH)
    name = str(volume.commit({1: noise(1)}).object_name(7))
    volume.commit({2: noise(2)})
    opened = await source(volume)
    await watched["own"].delete(name)
    with pytest.raises(RemoteRefused, match=f"own/{name} is not there") as caught:
        await Reading(0, 4).of(opened)
    assert not isinstance(caught.value, RemoteMismatch)


async def test_who_is_cancelled_leaves_a_buffer_that_nobody_writes_to(
    source: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "THREAD_BYTES", 1)
    monkeypatch.setattr(volume_rig, "squeezed", zstd)
    volume = Volume(BIRTH)
    volume.commit({page: text(page) for page in range(16)})
    loop, checking, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    checked: list[int] = []

    def slow(data: memoryview) -> int:
        loop.call_soon_threadsafe(checking.set)
        go_on.wait(30)
        checked.append(1)
        return crc32c(data)

    reading = Reading(0, 16)
    task = asyncio.create_task(reading.of(await source(volume, checksum=slow)))
    await checking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await loop.shutdown_default_executor()  # which waits for the thread
    assert len(checked) == 16
    assert reading.told == []
    assert reading.buffer == bytes([MARK]) * 16 * PAGE_BYTES


async def test_all_requests_have_ended_when_one_fails_or_it_is_cancelled(
    source: Stored, watched: dict[str, Watched]
) -> None:
    volume = Volume(BIRTH)
    names = [str(volume.commit({page: noise(page)}).object_name(7)) for page in range(4)]
    opened = await source(volume)
    store, all_there, never = watched["own"], asyncio.Event(), asyncio.Event()

    async def fail(name: str) -> None:
        if store.running == 4:
            all_there.set()
        await all_there.wait()
        if name == names[2] and fails:
            raise RemoteRefused("it is enough")
        await never.wait()

    store.before, fails = fail, True
    with pytest.raises(RemoteRefused, match="it is enough"):
        await Reading(0, 4).of(opened)
    assert (store.running, store.most_running) == (0, 4)
    all_there.clear()
    fails = False
    task = asyncio.create_task(Reading(0, 4).of(opened))
    await all_there.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.running == 0


async def test_so_many_requests_at_once(source: Stored, watched: dict[str, Watched]) -> None:
    volume = Volume(BIRTH)
    for page in range(20):
        volume.commit({page: noise(page)})
    opened = await source(volume, requests_max=11)
    assert (await Reading(0, 20).of(opened)).buffer == b"".join(noise(page) for page in range(20))
    assert watched["own"].most_running == stored.REQUESTS_OF_READ_MAX
    await asyncio.gather(*(Reading(0, 20).of(opened) for _ in range(3)))
    assert watched["own"].most_running == 11
