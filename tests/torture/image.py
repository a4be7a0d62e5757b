"""Images in which a byte at the wrong place shows."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

MIB = 1 << 20
# Odd, so that the same noise comes again at a sector's boundary only after 512 MiB.
STEP_BYTES = 77_773
NOISE_LIFE = 512
# Every so often a stretch of zeros, as disks have them: what was not read at all looks like it.
ZEROS_EACH = 16


def write_image(path: Path, size_bytes: int, seed: int) -> None:
    """An image without two equal sectors, but for one MiB of zeros in 16.

    Each MiB is the same noise, turned by another odd number of bytes: as quick as a copy, in an emulator too.
    """
    noise = b""
    with open(path, "wb") as file:
        for number, start in enumerate(range(0, size_bytes, MIB)):
            if number % NOISE_LIFE == 0:
                noise = random.Random(f"{seed}/{number}").randbytes(MIB)
            turn = number * STEP_BYTES % MIB
            piece = bytes(MIB) if number % ZEROS_EACH == ZEROS_EACH - 1 else noise[turn:] + noise[:turn]
            file.write(piece[: size_bytes - start])


def open_image(path: Path) -> mmap.mmap:
    """The image in memory, to compare with: a private map, writable only because ctypes asks for that."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
