"""Debian's cloud kernels that have ublk: found at run time, downloaded and unpacked, never installed."""

from __future__ import annotations

import functools
import json
import lzma
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tiervm.apt import Apt
from tiervm.paths import GUEST_FILES, alone, build_dir, key_of, making
from tiervm.say import Failed, Step, output, say

SUITES = ["trixie", "trixie-backports"]
META_PACKAGE = "linux-image-cloud-amd64"
# Names for the two ends of what is supported; "old" is trixie's own kernel, "new" whatever backports has
# today.
KINDS = ("old", "new")
OLD_PREFIX = "6.12."
MODULES = [
    "virtio_blk", "ublk_drv", "nbd", "null_blk", "loop", "brd", "overlay", "dm-mod", "dm-flakey",
    "dm-log-writes",
    "dm-delay", "xfs", "btrfs", "sch_netem", "sch_tbf", "veth",
]  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `release` as uname says it, `image` bootable, `initramfs` with the modules that
    tests need.
    """

    kind: str
    release: str
    image: Path
    initramfs: Path


def kernel(kind: str) -> Kernel:
    """The kernel "old" or "new", downloaded and unpacked when it is not there yet."""
    if kind not in KINDS:
        raise Failed(f"there is no kernel {kind!r}; say one of: {', '.join(KINDS)}.")
    with alone("kernels"):
        apt = Apt(SUITES)
        memo = apt.memo("kernels.json")
        if not memo.exists():
            with Step("which kernels there are") as step:
                _update(apt, step)
                found = {name: _resolve(apt, name) for name in KINDS}
            memo.write_text(json.dumps(found))
        release, packages = json.loads(memo.read_text())[kind]
        folder = build_dir() / "kernels" / release
        if folder.is_dir():
            say(f"  kernel {release}: kept from before")
        else:
            with Step(f"kernel {release}") as step, making(folder) as scratch:
                _download(apt, step, packages, scratch, release)
        return Kernel(kind, release, folder / "vmlinuz", _initramfs(folder, release))


def _update(apt: Apt, step: Step) -> None:
    try:
        apt.update(step)
    except Failed:
        if not apt.has_lists:
            raise
        say("  the archive cannot be reached; going by its last known package lists")


def _resolve(apt: Apt, kind: str) -> tuple[str, list[str]]:
    """The release ("7.3.4+deb13-cloud-amd64") and the packages ("name=version") that carry it."""
    versions = [
        stanza
        for stanza in apt.show(META_PACKAGE)
        if kind == "new" or stanza["Version"].startswith(OLD_PREFIX)
    ]
    if not versions:
        raise Failed(f"the suites {', '.join(SUITES)} have no {kind} {META_PACKAGE}.")
    newest = functools.reduce(_newer, versions)
    match = re.search(r"linux-image-(\S+-cloud-amd64)", newest.get("Depends", ""))
    if not match:
        raise Failed(f"{META_PACKAGE} {newest['Version']} names no kernel package in its dependencies.")
    release = match[1]
    # Since 7.x the image package is an empty shell around two others; before, it has everything itself.
    split = [[f"linux-binary-unsigned-{release}", f"linux-binary-{release}"], [f"linux-modules-{release}"]]
    chosen = [_first(apt, names) for names in split]
    if not all(chosen):
        chosen = [_first(apt, [f"linux-image-{release}"])]
    packages = [name for name in chosen if name]
    if not packages:
        raise Failed(f"no package carries the kernel {release}.")
    return release, packages


def _newer(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    older = subprocess.run(
        ["dpkg", "--compare-versions", one["Version"], "lt", other["Version"]], check=False
    )
    return other if older.returncode == 0 else one


def _first(apt: Apt, names: Iterable[str]) -> str | None:
    for name in names:
        stanzas = apt.show(name)
        if stanzas:
            return f"{name}={functools.reduce(_newer, stanzas)['Version']}"
    return None


def _download(apt: Apt, step: Step, packages: list[str], folder: Path, release: str) -> None:
    """Fills `folder` with vmlinuz and lib/modules/RELEASE of the modules in MODULES, uncompressed, with
    modules.dep.
    """
    debs = folder / "debs"
    try:
        files = apt.download(step, packages, debs)
    except Failed:
        # An upload since our lists were fetched: the caller's next run resolves anew.
        apt.forget()
        raise
    tree = folder / "tree"
    for file in files:
        step.run(["dpkg-deb", "-x", file, tree])
    images = [*tree.glob("boot/vmlinuz-*"), *tree.glob(f"usr/lib/modules/{release}/vmlinuz*")]
    if not (tree / "lib").exists():
        # 7.x packages name usr/lib; depmod looks below lib.
        (tree / "lib").symlink_to("usr/lib")
    modules = tree / "lib/modules" / release
    if not images or not modules.is_dir():
        raise Failed(f"the packages {', '.join(packages)} lack a kernel or its modules.")
    shutil.copyfile(images[0], folder / "vmlinuz")
    step.run(["depmod", "-b", tree, release])
    _pick_modules(modules, folder / "lib/modules" / release)
    step.run(["depmod", "-b", folder, release])
    shutil.rmtree(tree)
    shutil.rmtree(debs)


def _pick_modules(source: Path, target: Path) -> None:
    """Copies the wanted modules and what they depend on; busybox and speed want them uncompressed."""
    depends = {}
    for line in (source / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(": ")
        depends[path.rstrip(":")] = needs.split()
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in depends}
    wanted: set[str] = set()
    for name in MODULES:
        file_name = by_name.get(name.replace("-", "_"))
        # Absent means built in, or not in this kernel: the tests that need it will say so.
        if file_name:
            wanted |= {file_name, *depends[file_name]}
    for path in sorted(wanted):
        data = (source / path).read_bytes()
        file = target / path.removesuffix(".xz")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lzma.decompress(data) if path.endswith(".xz") else data)
    # depmod reads these; a split package may leave one of them elsewhere, and an empty one will do.
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (target / name).write_bytes((source / name).read_bytes() if (source / name).exists() else b"")


def _initramfs(folder: Path, release: str) -> Path:
    """The initial file system for a kernel: busybox, our init, the modules. Uncompressed: emulators unpack
    slowly.
    """
    busybox = Path("/usr/bin/busybox") if Path("/usr/bin/busybox").exists() else Path("/bin/busybox")
    init = GUEST_FILES / "init"
    target = folder / f"initramfs-{key_of(busybox, init)}.cpio"
    if not target.exists():
        with Step(f"initramfs for {release}"), making(target) as scratch:
            tree = scratch.with_name(scratch.name + ".tree")
            for name in ("bin", "dev", "proc", "sys", "root"):
                (tree / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(busybox, tree / "bin/busybox")
            (tree / "bin/sh").symlink_to("busybox")
            shutil.copy(init, tree / "init")
            (tree / "init").chmod(0o755)
            shutil.copytree(folder / "lib", tree / "lib")
            output(["sh", "-c", f"cd '{tree}' && find . | cpio --quiet -o -H newc >'{scratch}'"])
            shutil.rmtree(tree)
    return target
