"""Threads that read a device at random, compare every byte with the image, and keep what was wrong."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.torture.image import open_image

SECTOR_BYTES = 512
PAGE_BYTES = 4096
LENGTH_MAX_BYTES = 1 << 20
# Memory too is used at every alignment that the kernel takes.
BUFFER_BYTES = LENGTH_MAX_BYTES + PAGE_BYTES
POISON = 0xA5
BLKFLSBUF = 0x1261
FLUSH_EACH = 300
FAILURES_MAX = 10

_libc = ctypes.CDLL(None, use_errno=False)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memset.restype = ctypes.c_void_p

Choice = Callable[[random.Random, int], tuple[int, int]]


def anywhere(size_bytes: int, *, hot_share: float = 0.25) -> Choice:
    """Chooses (offset, length) for a grain in bytes: lengths of 512 bytes to 1 MiB, each magnitude as likely
    as any other, anywhere; some of them (hot_share) in a hot twentieth, now and then at the very end.
    """
    hot_bytes = max(size_bytes // 20, min(size_bytes, 2 * LENGTH_MAX_BYTES))

    def choose(chance: random.Random, grain: int) -> tuple[int, int]:
        length = min(int(SECTOR_BYTES * 2048 ** chance.random()) // grain * grain, size_bytes)
        where = chance.random()
        if where < 0.01:
            return size_bytes - length, length
        span = hot_bytes if where < 0.01 + hot_share else size_bytes
        return chance.randrange((span - length) // grain + 1) * grain, length

    return choose


@dataclass(frozen=True)
class Failure:
    """A read that failed or lied."""

    what: str
    thread: int
    number: int
    direct: bool
    offset_bytes: int
    length_bytes: int
    seconds: float

    def __str__(self) -> str:
        how = "direct" if self.direct else "buffered"
        return (
            f"{self.what} (thread {self.thread}, its read {self.number}, {how}, offset {self.offset_bytes}, "
            f"length {self.length_bytes}, took {self.seconds:.3f} s)"
        )


class Readers:
    """Threads that read a device until `count` reads are done or `stop` is called.

    Each draws from a sequence of its own, which follows from seed and thread number. mixed: every second
    thread reads through the page cache, at any byte; else all read O_DIRECT, in sectors. refusable: an EIO is
    counted (`refused`), not a failure, if the same read is right when it is tried again at once.
    """

    def __init__(
        self,
        device: Path,
        image: Path,
        choose: Choice,
        *,
        seed: int,
        count: int | None = None,
        threads: int = 8,
        mixed: bool = True,
        refusable: bool = False,
    ) -> None:
        self.refused = 0
        self.failures: list[Failure] = []
        self.slowest_s = 0.0
        self._device = device
        self._image = open_image(image)
        self._choose = choose
        self._seed = seed
        self._count = count
        self._refusable = refusable
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._done = [0] * threads
        self._bytes = [0] * threads
        self._began_s: list[float | None] = [None] * threads
        self._threads = [
            threading.Thread(target=self._run, args=(number, not mixed or number % 2 == 0), daemon=True)
            for number in range(threads)
        ]

    @property
    def done(self) -> int:
        """Reads that have ended."""
        return sum(self._done)

    @property
    def each_done(self) -> list[int]:
        """Reads that have ended, by thread."""
        return list(self._done)

    @property
    def done_bytes(self) -> int:
        """Bytes that were read and compared."""
        return sum(self._bytes)

    @property
    def longest_wait_s(self) -> float:
        """How long the longest of the reads that now run has been running."""
        now_s = time.monotonic()
        return max((now_s - began_s for began_s in self._began_s if began_s is not None), default=0.0)

    @property
    def running(self) -> bool:
        """Whether any thread still reads."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """The threads begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No further read begins."""
        self._over.set()

    def wait(self, limit_s: float) -> bool:
        """Whether all threads have ended within the limit."""
        deadline_s = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not self.running

    def _run(self, thread: int, direct: bool) -> None:
        chance = random.Random(f"{self._seed}/{thread}")
        try:
            with _Eye(self._device, self._image, direct=direct) as eye:
                for number in itertools.count():
                    if self._over.is_set() or not self._may_go_on():
                        return
                    offset, length = self._choose(chance, SECTOR_BYTES if direct else 1)
                    if not direct and chance.random() < 0.5:
                        eye.forget(offset, length, everything=chance.random() < 1 / FLUSH_EACH)
                    self._read(eye, thread, number, offset, length, skew=chance.randrange(8) * SECTOR_BYTES)
        except Exception as error:
            self._failed(Failure(f"a reader died: {error!r}", thread, -1, direct, 0, 0, 0.0))

    def _may_go_on(self) -> bool:
        return self._count is None or next(self._numbers) < self._count

    def _read(self, eye: _Eye, thread: int, number: int, offset: int, length: int, skew: int) -> None:
        began_s = self._began_s[thread] = time.monotonic()
        what = eye.read(offset, length, skew)
        if self._refusable and what.startswith(f"error {errno.EIO} "):
            self.refused += 1
            what = eye.read(offset, length, skew)
        self._began_s[thread] = None
        seconds = time.monotonic() - began_s
        self.slowest_s = max(self.slowest_s, seconds)
        self._done[thread] += 1
        self._bytes[thread] += length
        if what:
            self._failed(Failure(what, thread, number, eye.direct, offset, length, seconds))

    def _failed(self, failure: Failure) -> None:
        self.failures.append(failure)
        if len(self.failures) >= FAILURES_MAX:
            self._over.set()


class _Eye:
    """One thread's open device, its buffer, and the image to compare with."""

    def __init__(self, device: Path, image: mmap.mmap, *, direct: bool) -> None:
        self.direct = direct
        self._fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._image_at = ctypes.addressof(ctypes.c_char.from_buffer(image))

    def __enter__(self) -> _Eye:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def forget(self, offset: int, length: int, *, everything: bool) -> None:
        """The kernel's page cache drops these bytes (or all of the device), so that the device is asked."""
        if everything:
            fcntl.ioctl(self._fd, BLKFLSBUF)
            return
        first = offset // PAGE_BYTES * PAGE_BYTES
        past = -(-(offset + length) // PAGE_BYTES) * PAGE_BYTES
        os.posix_fadvise(self._fd, first, past - first, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int, skew: int) -> str:
        """Reads into the buffer, from its byte `skew` on; returns what is wrong with it, "" for nothing."""
        at = self._at + skew
        _libc.memset(at, POISON, length)
        try:
            count = os.preadv(self._fd, [self._view[skew : skew + length]], offset)
        except OSError as error:
            return f"error {error.errno} ({error.strerror})"
        if count != length:
            return f"short: {count} bytes"
        if _libc.memcmp(at, self._image_at + offset, length) == 0:
            return ""
        return self._difference(at, offset, length)

    def _difference(self, at: int, offset: int, length: int) -> str:
        wrong = [n for n in _sectors(offset, length) if self._differs(at, offset, *n)]
        begin, size = wrong[0]
        first = next(n for n in range(begin, begin + size) if self._differs(at, offset, n, 1))
        got = ctypes.string_at(at + first, min(16, length - first)).hex()
        wanted = ctypes.string_at(self._image_at + offset + first, min(16, length - first)).hex()
        return (
            f"WRONG BYTES: first at {offset + first} (block {(offset + first) >> 16}, page "
            f"{(offset + first) >> 12 & 15}), {len(wrong)} sectors differ, got {got}, not {wanted}"
        )

    def _differs(self, at: int, offset: int, begin: int, size: int) -> bool:
        return bool(_libc.memcmp(at + begin, self._image_at + offset + begin, size))


def _sectors(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(begin, size) of the pieces of a read that lie in one sector, relative to its beginning."""
    begin = 0
    while begin < length:
        size = min(SECTOR_BYTES - (offset + begin) % SECTOR_BYTES, length - begin)
        yield begin, size
        begin += size
