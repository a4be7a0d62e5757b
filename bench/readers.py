"""Reads through a local door by threads in C (bench/readers.c): what a device's queue would ask for, without
this interpreter's lock between the daemon's loop and those who wait for it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from errno import EBADMSG
from pathlib import Path

from bench.fio import BenchError
from tierblk.core import LocalDoor
from tierblk.core._core import ffi, lib

SOURCE = Path(__file__).resolve().with_suffix(".c")
NS_PER_S = 1_000_000_000
FOREVER_S = 3600.0


@dataclass(frozen=True)
class Piece:
    """One read to do. The image has the place of every page, plus one, in that page's first eight bytes."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class Done:
    """One read that was done. `asked_s` of CLOCK_MONOTONIC."""

    piece: Piece
    asked_s: float
    wait_s: float


class _Piece(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("asked_ns", ctypes.c_uint64),
        ("wait_ns", ctypes.c_uint64),
        ("result", ctypes.c_int64),
    )


def compiled(build_dir: Path) -> Path:
    """The compiled readers, made again when their source is newer. Raises BenchError."""
    target = build_dir / "readers.so"
    if target.exists() and SOURCE.stat().st_mtime_ns < target.stat().st_mtime_ns:
        return target
    build_dir.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(f".{os.getpid()}")
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run(
        [*command, str(SOURCE), "-o", str(aside)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"bench/readers.c does not compile: {done.stderr.strip()[-300:]}")
    aside.rename(target)
    return target


class Readers:
    """Streams of reads, ready to go."""

    def __init__(self, library: Path, streams: Sequence[Sequence[Piece]]) -> None:
        """library: of `compiled`."""
        self._run = ctypes.CDLL(str(library)).bench_read
        self._arrays = [
            (_Piece * len(stream))(*[_Piece(p.offset_bytes, p.length_bytes) for p in stream])
            for stream in streams
        ]

    def run(self, door: LocalDoor, depth: int, limit_s: float | None = None) -> float:
        """Reads the streams side by side, `depth` threads each; the CPU-seconds of these threads. Blocks
        without the interpreter's lock. Once. Raises BenchError."""
        arrays, used_ns = self._arrays, ctypes.c_uint64()
        rc = self._run(
            ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.addressof(lib, "tb_local_read")))),
            ctypes.c_void_p(int(ffi.cast("uintptr_t", door.queues[0]))),
            (ctypes.c_void_p * len(arrays))(*map(ctypes.addressof, arrays)),
            (ctypes.c_uint64 * len(arrays))(*map(len, arrays)),
            ctypes.c_uint32(len(arrays)),
            ctypes.c_uint32(depth),
            ctypes.c_uint64(int((FOREVER_S if limit_s is None else limit_s) * NS_PER_S)),
            ctypes.byref(used_ns),
        )
        if rc:
            raise BenchError(f"cannot start the reading threads: {os.strerror(rc)}")
        return used_ns.value / NS_PER_S

    async def read(
        self,
        door: LocalDoor,
        depth: int,
        limit_s: float | None = None,
        *,
        refuse: Callable[[], Awaitable[None]],
    ) -> float:
        """The same beside an event loop. When it is cancelled it still waits for the end, for the door must
        not be closed before; `refuse` has the tier fail what waits and what is still to come, which would
        otherwise wait for a server that an interrupt has ended as well."""
        reading = asyncio.ensure_future(asyncio.to_thread(self.run, door, depth, limit_s))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            await refuse()
            await asyncio.wait([reading])
            raise

    def done(self) -> list[Done]:
        """What was read. Raises BenchError when a read failed or brought other bytes."""
        return [_done(raw) for array in self._arrays for raw in array if raw.asked_ns]


def _done(raw: _Piece) -> Done:
    piece = Piece(raw.offset, raw.length)
    if raw.result == -EBADMSG:
        raise BenchError(f"wrong bytes at {piece.offset_bytes}: no figure would mean anything")
    if raw.result:
        raise BenchError(f"a read at {piece.offset_bytes} failed: {os.strerror(-raw.result)}")
    return Done(piece, raw.asked_ns / NS_PER_S, raw.wait_ns / NS_PER_S)
