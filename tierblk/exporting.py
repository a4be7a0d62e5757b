"""An image of what a device shows, out of its cache directory: with a daemon beside it or without, also of a
device that cannot be attached any more because another host has taken its volume over (R18, R19)."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tierblk.cache import LayerRecord, State, View
from tierblk.config import Config
from tierblk.durable import sync_directory
from tierblk.errors import CacheError, TierblkError
from tierblk.extent import BLOCK_BYTES
from tierblk.origin import ImageOrigin, Origin, StoreOrigin, extents_of, standing_of
from tierblk.outlast import to_the_end
from tierblk.qcow2 import Qcow2Writer
from tierblk.reader import WINDOW_BYTES, DeviceReader, Part, Tally
from tierblk.remote import Identity

AHEAD = 4
"""Windows that are read at once, each with memory of its own."""

_ZEROS = bytes(BLOCK_BYTES)

Format = Literal["raw", "qcow2"]
Trouble = Callable[[TierblkError], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How an image is to be made. offline: nothing is fetched. holes: what cannot be had is left out."""

    format: Format = "raw"
    offline: bool = False
    holes: bool = False


class Reader(Protocol):
    """Reads a device in windows; see DeviceReader."""

    size_bytes: int
    tally: Tally

    def windows(self) -> Iterator[tuple[int, int]]: ...

    async def read(self, offset_bytes: int, length_bytes: int, buffer: mmap.mmap) -> None: ...


class Sink(Protocol):
    """Takes the blocks of a device that are not zeros, in order. OSError."""

    def write(self, offset_bytes: int, data: memoryview) -> None: ...

    def finish(self) -> None: ...


class RawFile:
    """A sparse file."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._fd = descriptor
        self._size_bytes = size_bytes

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """A block."""
        while data:
            written = os.pwrite(self._fd, data, offset_bytes)
            data, offset_bytes = data[written:], offset_bytes + written

    def finish(self) -> None:
        """Of the device's size."""
        os.ftruncate(self._fd, self._size_bytes)


class Stream:
    """Bytes one after the other, zeros too: for a pipe."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._fd = descriptor
        self._size_bytes = size_bytes
        self._at = 0

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """A block."""
        self._zeros(offset_bytes)
        self._put(data)

    def finish(self) -> None:
        """Up to the device's end."""
        self._zeros(self._size_bytes)

    def _zeros(self, end_bytes: int) -> None:
        while self._at < end_bytes:
            self._put(memoryview(_ZEROS)[: end_bytes - self._at])

    def _put(self, data: memoryview) -> None:
        while data:
            written = os.write(self._fd, data)
            data, self._at = data[written:], self._at + written


# -- what is to be read ---


@asynccontextmanager
async def open_device(
    view: View, config: Config, pin: Identity | None, wanted: Wanted, on_trouble: Trouble
) -> AsyncIterator[DeviceReader]:
    """The device of a config, as the cache has it. pin: the version of its image; None: what lies below its
    volume, or the one that was used last. CacheError: the cache knows nothing of it, or not what is needed.
    """
    volume = _volume(view, config)
    if volume is not None and volume.base is not None:
        pin = Identity(*volume.base)
    before = view.volume_state(volume) if volume is not None else None
    standing = standing_of(view, volume) if volume is not None and volume.is_stored else None
    origins: list[Origin] = []
    base = _base_part(view, config, pin, origins, on_trouble)
    try:
        if volume is None:
            if base is None:
                raise CacheError(f"the cache in {view.path} knows no version of {config.shown_base}")
            yield DeviceReader(view, None, base, base.size_bytes, offline=wanted.offline, holes=wanted.holes)
            return
        size_bytes, origin = volume.size_bytes, None
        if standing is not None:
            extents = await extents_of(view, volume, standing)
            size_bytes = extents.head.size_bytes
            origin = StoreOrigin(config, standing, extents, on_trouble)
            origins.append(origin)
            if base is not None:
                base = Part(base.layer, base.origin, min(base.size_bytes, extents.head.base_visible_bytes))
        part = Part(view.layer(volume), origin, size_bytes)
        yield DeviceReader(view, part, base, size_bytes, offline=wanted.offline, holes=wanted.holes)
        if not wanted.offline and view.volume_state(volume) != before:  # where pages are is known as of then
            raise CacheError(f"{volume.name} was attached meanwhile", "do it again")
    finally:
        for each in origins:
            await each.aclose()


def _volume(view: View, config: Config) -> LayerRecord | None:
    """Of the device's name."""
    if config.volume is None:
        return None
    name = config.device.name
    found = next((record for record in view.records if record.is_volume and record.name == name), None)
    if found is None:
        raise CacheError(
            f"the cache in {view.path} has no volume {name}",
            "nothing of it was written here; a volume in object storage can be attached anywhere",
        )
    if view.state is State.STRANGE:
        raise CacheError(
            f"the index of {view.path} is not of the same time as its slots: what was written to {name} "
            "cannot be found with it",
            "put the whole directory back as it was at one time",
        )
    if found.damaged:
        raise CacheError(f"part of what was written to {name} is lost: {found.damaged}")
    return found


def _base_part(
    view: View, config: Config, pin: Identity | None, origins: list[Origin], on_trouble: Trouble
) -> Part | None:
    bases = sorted(
        (record for record in view.records if not record.is_volume), key=lambda record: record.used_unix_s
    )
    known = [
        record
        for record in bases
        if (record.has_identity(pin.url, pin.size_bytes, pin.validator) if pin else record.url == config.url)
    ]
    if pin is None and known:
        pin = Identity(known[-1].url, known[-1].size_bytes, known[-1].validator)
    if pin is None:
        return None
    origin = ImageOrigin(config, pin, on_trouble)
    origins.append(origin)
    return Part(view.layer(known[-1]) if known else None, origin, pin.size_bytes)


# -- to write it ---


async def copy(reader: Reader, sink: Sink, progress: Callable[[int], None]) -> int:
    """All of a device into a sink, in order; how many bytes were no zeros. progress: told how many bytes of
    the device were done since the last time. OSError is the sink's; TierblkError the reader's."""
    written, done_bytes, windows = 0, 0, reader.windows()
    # Not closed by hand: the traceback of an error may still hold a part of one.
    free = [mmap.mmap(-1, WINDOW_BYTES) for _ in range(AHEAD)]
    running: deque[tuple[asyncio.Task[None], int, int, mmap.mmap]] = deque()

    def begin() -> None:
        while free and (window := next(windows, None)) is not None:
            buffer = free.pop()
            task = asyncio.create_task(reader.read(*window, buffer))
            running.append((task, *window, buffer))

    try:
        begin()
        while running:
            task, offset_bytes, length_bytes, buffer = running[0]
            await task
            written += await to_the_end(
                asyncio.to_thread(_put_window, sink, offset_bytes, length_bytes, buffer)
            )
            running.popleft()
            free.append(buffer)
            progress(offset_bytes + length_bytes - done_bytes)
            done_bytes = offset_bytes + length_bytes
            begin()
        await to_the_end(asyncio.to_thread(sink.finish))
        progress(reader.size_bytes - done_bytes)
    finally:
        for task, *_ in running:
            task.cancel()
        await asyncio.gather(*(task for task, *_ in running), return_exceptions=True)
    return written


def _put_window(sink: Sink, offset_bytes: int, length_bytes: int, buffer: mmap.mmap) -> int:
    written = 0
    with memoryview(buffer) as view:
        for at in range(0, length_bytes, BLOCK_BYTES):
            with view[at : min(at + BLOCK_BYTES, length_bytes)] as block:
                if bytes(block) != _ZEROS[: len(block)]:
                    sink.write(offset_bytes + at, block)
                    written += len(block)
    return written


@contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[int]:
    """A descriptor of a file beside `path` that takes its name at the end, durable then; if it does not come
    to that, it is gone. CacheError: there is something already. OSError."""
    _refuse_another(path, replace=replace)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _refuse_another(path, replace=replace)  # an export takes long
        part.replace(path)
        sync_directory(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _refuse_another(path: Path, *, replace: bool) -> None:
    if os.path.lexists(path) and not (replace and path.is_file()):
        what = "is no file" if not path.is_file() else "is there already"
        raise CacheError(f"{path} {what}", "choose another name" + ("" if replace else ", or say --replace"))


def sink_of(image_format: Format, descriptor: int, size_bytes: int) -> Sink:
    """A file's, which is empty."""
    writer = Qcow2Writer if image_format == "qcow2" else RawFile
    return writer(descriptor, size_bytes)
