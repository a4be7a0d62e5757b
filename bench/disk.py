"""The disk that the benchmarks may use, as a folder on a filesystem of its own or on one that is there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.fio import BenchError
from bench.process import output

LABEL = "tierblk-bench"


@contextmanager
def folder_on(name: str | None) -> Iterator[Path | None]:
    """A folder on a disk: below `name` if that is a folder; if it is a block device, on an ext4 made on it.
    Only an empty device, or one that this made before, is ever formatted. None for None. Raises
    BenchError."""
    if name is None:
        yield None
        return
    path = Path(name)
    if path.is_dir():
        with tempfile.TemporaryDirectory(prefix="tierblk-bench-", dir=path) as folder:
            yield Path(folder)
        return
    if not path.is_block_device():
        raise BenchError(f"TIERBLK_BENCH_DISK: {name} is neither a folder nor a block device")
    found = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "TYPE", str(path)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if found and LABEL not in found:
        raise BenchError(
            f"TIERBLK_BENCH_DISK: {name} is not empty ({' '.join(found)}); it would be overwritten"
        )
    output(["mkfs.ext4", "-q", "-F", "-L", LABEL, "-E", "lazy_itable_init=0,lazy_journal_init=0", path])
    with tempfile.TemporaryDirectory(prefix="tierblk-bench-") as mount:
        output(["mount", path, mount])
        try:
            yield Path(mount)
        finally:
            output(["umount", mount])
