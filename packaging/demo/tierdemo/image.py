"""The Debian image that the demo serves and boots: a partition table, one ext4, systemd; made by Debian's own
tools.
"""

from __future__ import annotations

from pathlib import Path

from tiervm.apt import quoted
from tiervm.disks import GIB, MIB, bootstrap, ext4_of
from tiervm.paths import alone, build_dir, key_of, making, prune, remove
from tiervm.say import Step, output, say

SUITE = "trixie"
IMAGE_BYTES = 2 * GIB
PARTITION_START_BYTES = MIB
# A backup of the partition table lies in the last sectors.
PARTITION_BYTES = IMAGE_BYTES - 2 * MIB
PACKAGES = [
    "systemd-sysv", "udev", "dbus", "libpam-systemd", "openssh-server", "sudo", "cron", "python3",
    "ca-certificates",
    "curl", "vim-tiny", "less", "bash-completion", "iproute2", "iputils-ping", "netbase", "procps", "kmod",
    "e2fsprogs", "systemd-timesyncd", "systemd-resolved", "locales", "man-db", "linux-image-cloud-amd64",
]  # fmt: skip
# What is installed on it later, from files beside the image; with what they need that the image has not.
LATER = ["hello", "tree", "jq", "rsync", "sqlite3", "vim"]
DOWNLOAD = (
    'rm -f "$1"/var/cache/apt/archives/*.deb && '
    'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get install -y --download-only --no-install-recommends '
    + " ".join(LATER)
    + ' && mkdir "$1/later" && mv "$1"/var/cache/apt/archives/*.deb "$1/later/"'
)
# What the installer of a real machine would have answered.
SETTINGS = (
    'echo debian >"$1/etc/hostname" && echo "LABEL=debian / ext4 defaults 0 1" >"$1/etc/fstab"'
    ' && echo 0123456789abcdef0123456789abcdef >"$1/etc/machine-id" && rm -rf "$1"/var/lib/apt/lists/*'
    # As after its first boot: catalogues are built, nothing is due to an update of /usr.
    ' && chroot "$1" journalctl --update-catalog && chroot "$1" /usr/lib/systemd/systemd-update-done'
)
GPT = "label: gpt\nstart={start}, size={size}, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root\n"
SECTOR_BYTES = 512
RECIPE = "2"


def image_disk() -> Path:
    """A disk with debian.raw, for the VM whose web server serves it, and packages to install there later;
    made once for a list of packages.
    """
    target = _folder()
    with alone("image"):
        if target.exists():
            say("  Debian image: kept from before")
        else:
            with Step(f"Debian image ({SUITE}, {len(PACKAGES)} packages and what they need)") as step:
                _make(step, target)
            prune(target.parent, kept=2)
    return target / "disk"


def _folder() -> Path:
    key = key_of(RECIPE, SUITE, quoted(PACKAGES), DOWNLOAD, SETTINGS, GPT, str(IMAGE_BYTES))
    return build_dir() / "images" / f"debian-{key}"


def image_file() -> Path:
    """The image itself, debian.raw."""
    return _folder() / "content/debian.raw"


def allocated_bytes() -> int:
    """How much of the image is not a hole."""
    return image_file().stat().st_blocks * SECTOR_BYTES


def _make(step: Step, target: Path) -> None:
    with making(target) as folder:
        (folder / "content").mkdir(parents=True)
        raw = folder / "content/debian.raw"
        tree = folder / "tree"
        hooks = [f"--customize-hook={hook}" for hook in (DOWNLOAD, SETTINGS)]
        bootstrap(step, SUITE, PACKAGES, tree, hooks)
        (tree / "later").rename(folder / "content/later")
        step.hint = "writes the image"
        ext4_of(tree, raw, PARTITION_BYTES, offset_bytes=PARTITION_START_BYTES, label="debian")
        with open(raw, "ab") as file:
            file.truncate(IMAGE_BYTES)
        remove(tree)
        _partition(raw)
        step.hint = "puts it on a disk of its own"
        ext4_of(folder / "content", folder / "disk", IMAGE_BYTES * 5 // 4, label="image")


def _partition(raw: Path) -> None:
    start, size = PARTITION_START_BYTES // SECTOR_BYTES, PARTITION_BYTES // SECTOR_BYTES
    script = raw.with_name("partitions")
    script.write_text(GPT.format(start=start, size=size))
    output(["sh", "-c", f"sfdisk -q '{raw}' <'{script}'"])
    script.unlink()
