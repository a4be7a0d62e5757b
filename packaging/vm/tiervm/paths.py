"""Where things are kept, by keys of what they were made from, so that making them again costs nothing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
GUEST_FILES = Path(__file__).resolve().parents[1] / "guest"


def build_dir() -> Path:
    """The folder of everything built for VMs: `$TIERBLK_BUILD_DIR/vm`, else `build/vm` of this checkout.

    Several checkouts may name one folder: entries are keyed by their inputs, made aside and renamed into
    place.
    """
    base = os.environ.get("TIERBLK_BUILD_DIR")
    path = (Path(base).resolve() if base else REPO / "build") / "vm"
    path.mkdir(parents=True, exist_ok=True)
    return path


def key_of(*inputs: str | bytes | Path) -> str:
    """Twelve hex digits that change with any input: a text, bytes, or the content of a file."""
    digest = hashlib.sha256()
    for item in inputs:
        data = (
            item.read_bytes() if isinstance(item, Path) else item.encode() if isinstance(item, str) else item
        )
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def making(target: Path) -> Iterator[Path]:
    """A path beside `target` to build a file or folder at; becomes `target` when the block ends well, else
    goes away.

    The name carries our process id: two makers never share one, and the last to finish wins with equal
    content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    remove(scratch)
    try:
        yield scratch
        if target.is_dir():
            remove(target)
        scratch.rename(target)
    finally:
        remove(scratch)


def remove(path: Path) -> None:
    """Removes a file or a folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(name: str) -> Iterator[Path]:
    """A folder in the build folder for the length of the block.

    Held by a lock, so that the next one can sweep up after a process that was killed.
    """
    for path in build_dir().glob("temp-*"):
        with contextlib.suppress(OSError), open(path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
    folder = Path(tempfile.mkdtemp(prefix=f"temp-{name}-", dir=build_dir()))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            remove(folder)


def prune(folder: Path, kept: int) -> None:
    """Removes all but the youngest entries of a folder of keyed things."""
    by_age = sorted(folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)
    for path in by_age[:-kept]:
        remove(path)


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Holds the lock `name` of the build folder: one process at a time makes a thing that takes minutes."""
    with open(build_dir() / f"lock-{name}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
