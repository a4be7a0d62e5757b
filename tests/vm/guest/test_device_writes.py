"""Writable devices: bytes of every alignment, on every plane (I1, R4), what a detach keeps, and large volumes
without a base."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from errno import ENOSPC
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.device_rig import MIB
from tests.vm.guest.helpers import Tierblk, WebServer, run
from tests.vm.guest.test_device_planes import HAS_ZERO_COPY

SECTOR = 512
BASE_BYTES = 6 * MIB + 3 * SECTOR
VOLUME_BYTES = 8 * MIB + 5 * SECTOR
STEPS = 70


class Direct:
    """A block device, past the page cache. Offsets and lengths are sectors' multiples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._buffer = mmap(-1, 2 * MIB)

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(self._buffer)[: len(data)]
        view[:] = data
        assert os.pwritev(self._fd, [view], offset) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        done, parts = 0, []
        while done < length:
            view = memoryview(self._buffer)[: min(length - done, len(self._buffer))]
            count = os.preadv(self._fd, [view], offset + done)
            assert count > 0
            parts.append(bytes(view[:count]))
            done += count
        return b"".join(parts)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def change_at_random(device: Path, model: bytearray, seed: int, steps: int = STEPS) -> None:
    """Writes, discards and zeroes near each other, of sectors and of pages; after each few a look at all."""
    chance = random.Random(seed)
    direct = Direct(device)
    sectors = len(model) // SECTOR
    for step in range(steps):
        unit = chance.choice([1, 1, 8, 128])
        count = chance.randint(1, 20) * unit
        at = chance.randrange(0, sectors // 4 if step % 3 else sectors) // unit * unit
        count = min(count, sectors - at)
        start, length = at * SECTOR, count * SECTOR
        kind = chance.choice(["write", "write", "write", "discard", "zeroes", "sync"])
        if kind == "write":
            data = chance.randbytes(length)
            direct.write(start, data)
            model[start : start + length] = data
        elif kind == "discard":
            run("blkdiscard", "--offset", str(start), "--length", str(length), "--force", device)
            low, high = -(-start // 4096) * 4096, (start + length) // 4096 * 4096
            if start + length == len(model):
                high = len(model)
            assert_zero_or(direct, model, start, length)
            if low < high:
                model[low:high] = bytes(high - low)
        elif kind == "zeroes":
            run("blkdiscard", "--zeroout", "--offset", str(start), "--length", str(length), "--force", device)
            model[start : start + length] = bytes(length)
        else:
            direct.sync()
        if step % 25 == 24:
            assert direct.read(0, len(model)) == bytes(model), f"I1: after step {step} of seed {seed}"
    direct.close()


def assert_zero_or(direct: Direct, model: bytearray, start: int, length: int) -> None:
    """What a DISCARD leaves is as it was or zeros, sector by sector; the model learns which."""
    found = direct.read(start, length)
    for at in range(0, length, SECTOR):
        sector = found[at : at + SECTOR]
        assert sector in (bytes(SECTOR), model[start + at : start + at + SECTOR])
        model[start + at : start + at + SECTOR] = sector


# Not every pair on every kernel: what differs between planes and queues is looked at by tests of reads too.
@pytest.mark.parametrize(
    ("plane", "queues"), [("copy", 1), ("zero-copy", 2)] if HAS_ZERO_COPY else [("copy", 2)]
)
def test_what_is_written_is_read_on_every_plane(
    plane: str, queues: int, scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("written.raw", BASE_BYTES, seed=101)
    keys: dict[str, Any] = {"device__plane": plane, "device__queues": queues, "volume__mode": "local"}
    keys["volume__size"] = f"{VOLUME_BYTES}B"
    config = tierblk.config("written", web.url_of(image), scratch / "cache", "32MiB", **keys)
    device = tierblk.attach(config)
    model = bytearray(image.read_bytes().ljust(VOLUME_BYTES, b"\0"))
    change_at_random(device, model, seed=102)
    status = tierblk.status("written")
    assert (status["plane"], status["read_only"], status["volume"], status["errors"]) == (
        plane,
        False,
        "local",
        0,
    )
    assert status["write_requests"] > 0
    assert status["discard_requests"] > 0
    assert status["flush_requests"] > 0
    tierblk.run("detach", "written")
    device = tierblk.attach(config)
    direct = Direct(device)
    assert direct.read(0, VOLUME_BYTES) == bytes(model), "a local volume is kept at detach"
    direct.close()
    tierblk.run("stop")
    device = tierblk.attach(config)
    change_at_random(device, model, seed=103, steps=20)
    tierblk.run("stop")


def test_a_scratch_volume_is_gone_at_detach(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("scratch.raw", BASE_BYTES, seed=104)
    config = tierblk.config("scratch", web.url_of(image), scratch / "cache", "16MiB", volume__mode="scratch")
    for _ in range(2):
        device = tierblk.attach(config)
        direct = Direct(device)
        assert direct.read(0, BASE_BYTES) == image.read_bytes()
        direct.write(MIB, b"x" * MIB)
        direct.sync()
        direct.close()
        assert tierblk.status("scratch")["volume_bytes"] == MIB
        tierblk.run("detach", "scratch")
    tierblk.run("stop")


def test_a_cold_write_asks_the_server_for_nothing(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("cold.raw", BASE_BYTES, seed=105)
    config = tierblk.config("cold", web.url_of(image), scratch / "cache", "16MiB", volume__mode="local")
    device = tierblk.attach(config)
    asked = len(web.requests("/cold.raw"))
    direct = Direct(device)
    for at in random.Random(1).sample(range(BASE_BYTES // 4096), 300):
        direct.write(at * 4096, b"y" * 4096)
    direct.sync()
    direct.close()
    assert len(web.requests("/cold.raw")) == asked
    tierblk.run("stop")


def fits(direct: Direct, mib: int) -> bool:
    """Writes one MiB there; False: ENOSPC."""
    try:
        direct.write(mib * MIB, bytes([mib + 1]) * MIB)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        return False
    return True


def test_a_volume_that_no_longer_fits_says_so_and_what_is_there_stays(
    scratch: Path, tierblk: Tierblk
) -> None:
    config = tierblk.config(
        "full", None, scratch / "cache", "16MiB", volume__mode="local", volume__size="64MiB"
    )
    device = tierblk.attach(config)
    direct = Direct(device)
    written = next(at for at in range(64) if not fits(direct, at))
    assert 14 <= written < 16
    status = tierblk.status("full")
    assert status["state"] == "degraded"
    assert status["reason"].startswith("the cache is full: volumes have 1")
    for at in range(written):
        assert direct.read(at * MIB, MIB) == bytes([at + 1]) * MIB
    run("blkdiscard", "--offset", "0", "--length", str(4 * MIB), "--force", device)
    assert fits(direct, 32), "what was discarded makes room"
    direct.close()
    tierblk.run("stop")
