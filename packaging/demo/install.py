#!/usr/bin/env python3
"""Boots a real Debian from a volume over an image on a web server, lets dpkg install packages on it, cuts the
power, and boots it again: what was installed is there.

Environment: RTT_MS and MBIT shape the link to the web server, as for the demo.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "vm"))

from demo import run  # noqa: E402  (they need the paths set above)
from tierdemo import boots, image  # noqa: E402
from tiervm import disks, host, kernels  # noqa: E402
from tiervm.paths import temporary  # noqa: E402
from tiervm.say import Failed, say  # noqa: E402

MIB = 1 << 20


def install_and_check(link: dict[str, str]) -> None:
    """Both boots, with a power cut between them. Raises Failed."""
    say("== a VM with Debian's newest kernel; what it needs is made once")
    host.install(host.VM_PACKAGES)
    kernel, root, disk = kernels.kernel("new"), disks.test_root(), image.image_disk()
    settings = {**link, "ROOT": "volume"}
    with temporary("cache") as folder:
        cache = boots.new_cache(folder)
        title = "Debian on the volume, dpkg installs"
        first = boots.boot_image(kernel, root, disk, cache, {**settings, "PACKAGES": "install"}, title)
        say(f"  {_words(first)}; dpkg took {first.packages['seconds']:.0f} s")
        say("  the power was cut when dpkg had ended")
        title = "the same volume after the power cut"
        again = boots.boot_image(kernel, root, disk, cache, {**settings, "PACKAGES": "check"}, title)
    if wrong := again.packages["wrong"]:
        raise Failed(f"after the power cut: {wrong}.")
    say(f"  {_words(again)}; dpkg and ext4 find nothing wrong")


def _words(boot: boots.Numbers) -> str:
    device = boot.device
    return (
        f"{boot.packages['count']} packages; {device['fetched_bytes'] / MIB:.1f} MiB fetched, "
        f"{device['write_bytes'] / MIB:.1f} MiB written, {device['flush_requests']} flushes, "
        f"{device['errors']} errors"
    )


if __name__ == "__main__":
    sys.exit(run("demo-install", install_and_check))
