"""Disk images as files: an ext4 of a folder, an empty scratch disk, a root out of Debian packages."""

from __future__ import annotations

import os
from pathlib import Path

from tiervm.apt import inherited_options, origin, quoted
from tiervm.paths import alone, build_dir, key_of, making, prune, remove
from tiervm.say import Step, output, say

MIB = 1 << 20
GIB = 1 << 30

# The suite whose Python is 3.11, like the one that the project is built with.
TEST_SUITE = "bookworm"
TEST_ROOT_BYTES = 3 * GIB
TEST_PACKAGES = [
    "python3", "kmod", "util-linux", "iproute2", "procps", "e2fsprogs", "fdisk", "curl", "nginx-light",
    "fio", "strace", "xfsprogs", "btrfs-progs", "dmsetup",
    "liburing2", "nbdkit", "nbd-client",
]  # fmt: skip
# Documentation is most of the files of a small root, and nobody reads it in a test.
LEAN = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "lintian")]
# Part of every key: raise it when the way a root is made changes.
RECIPE = "1"


def ext4_of(
    folder: Path, target: Path, size_bytes: int, *, offset_bytes: int = 0, label: str = "tierblk"
) -> None:
    """Writes an ext4 with the content of `folder` into `target` (sparse), at an offset for disks with
    partitions.
    """
    with open(target, "ab") as file:
        file.truncate(max(size_bytes + offset_bytes, os.fstat(file.fileno()).st_size))
    # lazy_itable_init and no journal checksum zeroing: the file is sparse, its holes are zeros already.
    options = f"offset={offset_bytes},lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    output([
        "mke2fs", "-q", "-F", "-t", "ext4", "-L", label, "-E", options, "-d", folder, target,
        f"{size_bytes // 1024}k",
    ])  # fmt: skip


def scratch(target: Path, size_bytes: int) -> Path:
    """An empty ext4 disk in a sparse file."""
    target.unlink(missing_ok=True)
    with open(target, "wb") as file:
        file.truncate(size_bytes)
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    output(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", options, target])
    return target


def bootstrap(step: Step, suite: str, packages: list[str], folder: Path, extra: list[str]) -> None:
    """A minimal Debian with some packages in `folder`, from the machine's own mirror.

    `extra`: further options of mmdebstrap.
    """
    options = [f"--aptopt={option}" for option in inherited_options()]
    command = [
        "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory",
        f"--include={','.join(packages)}",
        "--dpkgopt=force-unsafe-io", *options, *extra, suite, str(folder), origin().line(suite),
    ]  # fmt: skip
    step.run(command, env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"})


def test_root() -> Path:
    """The root filesystem that tests and the demo run in: an ext4 image, made once for a list of packages."""
    key = key_of(RECIPE, TEST_SUITE, quoted(TEST_PACKAGES), quoted(LEAN))
    target = build_dir() / "roots" / f"test-{key}.ext4"
    with alone("test-root"):
        if target.exists():
            say("  test root: kept from before")
            return target
        with Step(f"test root ({TEST_SUITE}, {len(TEST_PACKAGES)} packages)") as step, making(target) as file:
            tree = file.with_name(file.name + ".tree")
            try:
                bootstrap(step, TEST_SUITE, TEST_PACKAGES, tree, LEAN)
                step.hint = "writes the disk image"
                ext4_of(tree, file, TEST_ROOT_BYTES, label="root")
            finally:
                remove(tree)
        prune(target.parent, kept=2)
    return target
