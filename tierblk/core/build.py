"""The recipe of the C core; setuptools runs it from the project's root, by path, without importing
tierblk."""

from pathlib import Path

from cffi import FFI

CORE = Path("tierblk/core")
SOURCES = [
    "thread.c",
    "ring.c",
    "crc32c.c",
    "slots.c",
    "rows.c",
    "journal.c",
    "map.c",
    "request.c",
    "serve.c",
    "forget.c",
    "volume.c",
    "clear.c",
    "flush.c",
    "pace.c",
    "giveway.c",
    "epoch.c",
    "move.c",
    "sums.c",
    "far.c",
    "hot.c",
    "fill.c",
    "wait.c",
    "write.c",
    "filler.c",
    "queue.c",
    "trace.c",
    "engine.c",
]
SOURCES += ["ublk.c", "ublk_control.c", "local.c", "tally.c"]

ffibuilder = FFI()
ffibuilder.cdef((CORE / "cdef.h").read_text())
ffibuilder.set_source(
    "tierblk.core._core",
    '#include <stddef.h>\n#include <stdint.h>\n#include "cdef.h"',
    sources=[str(CORE / name) for name in SOURCES],
    depends=[str(CORE / name) for name in ("cdef.h", "core.h", "calls.h", "prim.h", "ublk_abi.h")],
    include_dirs=[str(CORE)],
    libraries=["uring"],
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-fno-strict-aliasing",
    ],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
