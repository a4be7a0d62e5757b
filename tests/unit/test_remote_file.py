"""file:// sources: right bytes, clear refusals, and a file that changes while it is read."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tierblk.config import RemoteSettings
from tierblk.errors import RemoteRefused, RemoteUnavailable
from tierblk.remote import open_source
from tierblk.remote.file import PIECE_BYTES, FileSource, open_file

CONTENT = random.Random(5).randbytes(3 * PIECE_BYTES + 777)
DEADLINE_S = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the content."""
    path = tmp_path / "disk #1?.raw"
    path.write_bytes(CONTENT)
    return path


async def open_path(path: Path) -> FileSource:
    return await open_file(path.as_uri())


async def test_identity_is_what_stat_says(path: Path) -> None:
    source = await open_source(path.as_uri(), RemoteSettings())
    found = os.stat(path)
    assert source.identity.url == path.as_uri()
    assert source.identity.size_bytes == len(CONTENT)
    assert (
        source.identity.validator == f"stat:{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
    )
    await source.aclose()


async def test_random_ranges(path: Path) -> None:
    source, chance = await open_path(path), random.Random(6)
    for _ in range(40):
        length_bytes = chance.randrange(1, len(CONTENT) + 1)
        offset_bytes = chance.randrange(len(CONTENT) - length_bytes + 1)
        buffer, seen = bytearray(length_bytes), list[int]()
        await source.read_into(offset_bytes, memoryview(buffer), seen.append)
        assert buffer == CONTENT[offset_bytes : offset_bytes + length_bytes]
        assert seen == [*range(PIECE_BYTES, length_bytes, PIECE_BYTES), length_bytes]
    await source.aclose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:image.raw", "by its whole path"),
        ("file://image.raw", "by its whole path"),
        ("file://host/image.raw", "by its whole path"),
        ("file:///image.raw?x=1", r"\? or #"),
        ("file:///image.raw#x", r"\? or #"),
        ("file:///image%00.raw", "zero byte"),
        ("file:///nowhere/image.raw", "there is no file /nowhere/image.raw"),
        ("file:///", "/ is a directory"),
        ("file:///dev/null", "not a regular file"),
        ("file:///dev/null/image.raw", "cannot be opened: Not a directory"),
        ("ftp://host/image.raw", "no address that can be read"),
        ("image.raw", "no address that can be read"),
    ],
)
async def test_what_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(RemoteRefused, match=message):
        await open_source(url, RemoteSettings())


async def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(RemoteRefused, match="not a regular file"):
            await open_path(tmp_path / "fifo")


async def test_block_device_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stat.S_ISREG", lambda mode: False)
    monkeypatch.setattr("stat.S_ISBLK", lambda mode: True)
    path = tmp_path / "disk"
    path.touch()
    with pytest.raises(RemoteRefused, match="no version to pin"):
        await open_path(path)


@pytest.mark.parametrize("change", ["touch", "write", "grow", "shrink"])
async def test_changed_while_open(path: Path, change: str) -> None:
    source = await open_path(path)
    await source.read_into(0, memoryview(bytearray(4096)), lambda count: None)
    if change == "touch":
        os.utime(path, ns=(0, 12345))
    else:
        with path.open("r+b") as file:
            if change == "write":
                file.write(b"new")
                file.flush()
                os.utime(path, ns=(0, 12345))  # the clock of a fast machine may stand still
            elif change == "grow":
                file.truncate(len(CONTENT) + 1)
            else:
                file.truncate(1000)
    seen = list[int]()
    with pytest.raises(RemoteRefused, match=r"has changed: it was opened as .* and is now"):
        await source.read_into(0, memoryview(bytearray(4096)), seen.append)
    assert seen == [], "no byte of a changed file counts (I6)"
    await source.aclose()


async def test_replaced_file_stays_as_it_was(path: Path) -> None:
    source = await open_path(path)
    other = path.with_name("other")
    other.write_bytes(bytes(len(CONTENT)))
    other.rename(path)
    buffer = bytearray(len(CONTENT))
    await source.read_into(0, memoryview(buffer), lambda count: None)
    assert buffer == CONTENT
    await source.aclose()


async def test_behind_the_end(path: Path) -> None:
    source = await open_path(path)
    with pytest.raises(RemoteRefused, match=f"ends after {len(CONTENT)} bytes"):
        await source.read_into(len(CONTENT) - 10, memoryview(bytearray(11)), lambda count: None)
    await source.aclose()


async def test_closed(path: Path) -> None:
    source = await open_path(path)
    await source.aclose()
    await source.aclose()
    with pytest.raises(RemoteRefused, match="closed"):
        await source.read_into(0, memoryview(bytearray(10)), lambda count: None)


async def test_disk_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    source = await open_path(path)
    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(RemoteUnavailable, match="cannot be read: Input/output error"):
        await source.read_into(0, memoryview(bytearray(10)), lambda count: None)
    await source.aclose()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


class Hung:
    """A filesystem that does not answer `preadv` until it `may_end`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.may_end, self.ended = asyncio.Event(), threading.Event(), threading.Event()
        self.fds = set[int]()
        self._loop, self._preadv = asyncio.get_running_loop(), os.preadv
        monkeypatch.setattr("os.preadv", self.read)

    def read(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._loop.call_soon_threadsafe(self.reading.set)
        assert self.may_end.wait(DEADLINE_S)
        self.fds.add(os.fstat(fd).st_ino)
        count = self._preadv(fd, buffers, offset)
        self.ended.set()
        return count


async def test_cancelled_read_ends_at_once_and_nothing_is_written_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads cannot be stopped; what it reads into is not the caller's (I6, R5)."""
    hung = Hung(monkeypatch)
    source, buffer, seen = await open_path(path), bytearray(2 * PIECE_BYTES), list[int]()
    read = asyncio.create_task(source.read_into(0, memoryview(buffer), seen.append))
    async with asyncio.timeout(DEADLINE_S):
        await hung.reading.wait()
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        hung.may_end.set()
        assert await asyncio.to_thread(hung.ended.wait, DEADLINE_S)
        again = bytearray(2 * PIECE_BYTES)
        await source.read_into(PIECE_BYTES, memoryview(again), lambda count: None)
    assert again == CONTENT[PIECE_BYTES : 3 * PIECE_BYTES]
    assert seen == []
    assert buffer == bytes(len(buffer))
    await source.aclose()


async def test_a_source_is_closed_though_reads_hang_and_its_file_when_they_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, source = Hung(monkeypatch), await open_path(path)
    fd = source._fd
    assert fd is not None
    reads = [
        asyncio.create_task(source.read_into(n, memoryview(bytearray(9)), lambda count: None))
        for n in range(9)
    ]
    async with asyncio.timeout(DEADLINE_S):
        await hung.reading.wait()
        await source.aclose()
        ends = await asyncio.gather(*reads, return_exceptions=True)
        assert [str(end)[-21:] for end in ends] == ["this source is closed"] * 9
        hung.may_end.set()
        await until(lambda: not os.path.exists(f"/proc/self/fd/{fd}"))
    assert hung.fds == {os.stat(path).st_ino}, "a number that is somebody else's by then is not read"


async def test_what_hangs_is_an_error_after_read_timeout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, opening later, and a read; a thread that comes back late takes no descriptor along."""
    settings, may_end = RemoteSettings.model_validate({"read_timeout": "100ms"}), threading.Event()
    pin = (await open_path(path)).identity
    source, later = (
        await open_source(path.as_uri(), settings),
        await open_source(path.as_uri(), settings, pin=pin),
    )
    hung, real_open, opened = Hung(monkeypatch), os.open, list[int]()

    def slow_open(name: str, flags: int) -> int:
        assert may_end.wait(DEADLINE_S)
        opened.append(real_open(name, flags))
        return opened[-1]

    monkeypatch.setattr("os.open", slow_open)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(RemoteUnavailable, match=r"asked for bytes 5-12, but nothing came for 0\.1 s"):
            await source.read_into(5, memoryview(bytearray(8)), lambda count: None)
        with pytest.raises(RemoteUnavailable, match=r"could not be opened within 0\.1 s"):
            await later.read_into(5, memoryview(bytearray(8)), lambda count: None)
        with pytest.raises(RemoteUnavailable, match=r"could not be opened within 0\.1 s"):
            await open_source(path.as_uri(), settings)
        hung.may_end.set()
        may_end.set()
        await until(lambda: len(opened) == 2)
        await until(lambda: not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in opened))
    await source.aclose()
    await later.aclose()


HANGS = """
import asyncio, os, sys, threading
from tierblk.remote.file import open_file

async def main():
    source, reading, loop = await open_file(sys.argv[1]), asyncio.Event(), asyncio.get_running_loop()

    def hang(*arguments):
        loop.call_soon_threadsafe(reading.set)
        threading.Event().wait()

    os.preadv = hang
    read = asyncio.create_task(source.read_into(0, memoryview(bytearray(9)), print))
    await reading.wait()
    read.cancel()
    await asyncio.wait([read])
    await source.aclose()

asyncio.run(main())
"""


def test_a_read_that_hangs_does_not_keep_the_process(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, path.as_uri()], timeout=DEADLINE_S, cwd=ROOT)
    assert done.returncode == 0
