"""The null target: the same C server, moving no data. What the kernel's driver and our queue cost.

`python3 -m bench.null` compiles it into build/bench (once per change of the core)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tierblk.core import BLOCK_BYTES, ublk
from tierblk.planes import cpus_of

HERE = Path(__file__).resolve().parent
CORE = HERE.parent / "tierblk" / "core"
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fno-strict-aliasing"]
WRAPPED = ["tb_serve", "tb_queue_start"]
NODE_S = 10.0
STOP_MS = 30_000


def compiled(build_dir: Path) -> Path:
    """The compiled server, made again when a source of the core is newer. CalledProcessError."""
    target = build_dir / "null.so"
    sources = [HERE / "null.c", *sorted(path for path in CORE.glob("*.c") if path.name != "_core.c")]
    inputs = [*sources, *CORE.glob("*.h")]
    if target.exists() and all(path.stat().st_mtime_ns < target.stat().st_mtime_ns for path in inputs):
        return target
    build_dir.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(f".{os.getpid()}")
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    command = ["gcc", *FLAGS, "-shared", "-fPIC", "-Wl,-Bsymbolic", *wraps, f"-I{CORE}"]
    subprocess.run([*command, *map(str, sources), "-luring", "-o", str(aside)], check=True)
    aside.rename(target)
    return target


class _Server:
    """The library's functions, with their types."""

    def __init__(self, path: Path) -> None:
        lib = ctypes.CDLL(str(path))
        self.open = lib.null_open
        self.open.argtypes = [
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_uint16,
            ctypes.c_uint32,
            ctypes.c_uint16,
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_void_p),
        ]
        self.close = lib.null_close
        self.close.argtypes, self.close.restype = [ctypes.c_void_p], None


def _appears(path: str) -> None:
    """devtmpfs is a moment behind the driver and tells nobody. Raises TimeoutError."""
    deadline = time.monotonic() + NODE_S
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {NODE_S:.0f} s")
        time.sleep(0.005)


@contextmanager
def null_device(
    library: Path, *, size_bytes: int, depth: int, user_copy: bool, queues: int = 1
) -> Iterator[str]:
    """The path of a ublk device whose reads bring nothing, served by the compiled `library`.

    With `user_copy` the driver moves nothing either; without it the driver copies a buffer of the server's,
    as it does for plane `copy`. Raises OSError."""
    server = _Server(library)
    flags = ublk.features() & ublk.F_NO_AUTO_PART_SCAN | (ublk.F_USER_COPY if user_copy else 0)
    with ExitStack() as stack:
        device = ublk.add_dev(
            queues=queues, queue_depth=depth, max_io_bytes=BLOCK_BYTES, flags=flags, stamp=0
        )
        stack.callback(ublk.del_dev, device.dev_id, timeout_ms=STOP_MS)
        ublk.set_params(device.dev_id, size_bytes=size_bytes, block_bytes=BLOCK_BYTES, read_only=True)
        character = f"/dev/ublkc{device.dev_id}"
        _appears(character)
        cdev_fd = os.open(character, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, cdev_fd)
        for q_id, cpus in enumerate(cpus_of(device.dev_id, queues)):
            queue = ctypes.c_void_p()
            rc = server.open(
                cdev_fd,
                size_bytes,
                depth,
                device.dev_id,
                q_id,
                cpus or None,
                len(cpus),
                user_copy,
                ctypes.byref(queue),
            )
            if rc < 0:
                raise OSError(-rc, f"the null server cannot serve device {device.dev_id}")
            stack.callback(server.close, queue)
        # Registered after `close`, so done before it: a thread ends when the driver has taken
        # every tag back.
        stack.callback(ublk.stop_dev, device.dev_id, timeout_ms=STOP_MS)
        ublk.start_dev(device.dev_id, pid=os.getpid(), timeout_ms=STOP_MS)
        _appears(f"/dev/ublkb{device.dev_id}")
        yield f"/dev/ublkb{device.dev_id}"


if __name__ == "__main__":
    sys.stdout.write(f"{compiled(HERE.parent / 'build' / 'bench')}\n")
