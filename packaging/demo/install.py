#!/usr/bin/env python3
"""Boots a real Debian from a volume over an image on a web server, lets dpkg install packages on it, cuts the
power, and boots it again: what was installed is there.

Environment: RTT_MS and MBIT shape the link to the web server, as for the demo.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "vm"))

from demo import INTERRUPTED, link_settings  # noqa: E402  (they need the paths set above)
from tierdemo import boots, image  # noqa: E402
from tiervm import disks, host, kernels  # noqa: E402
from tiervm.paths import temporary  # noqa: E402
from tiervm.say import Failed, end_in_order, say  # noqa: E402

MIB = 1 << 20


def main() -> int:
    """Both boots; every failure is one sentence on stderr."""
    end_in_order()
    began_s = time.monotonic()
    try:
        host.require_supported()
        link = link_settings()
        say("== a VM with Debian's newest kernel; what it needs is made once")
        host.install(host.VM_PACKAGES)
        kernel, root, disk = kernels.kernel("new"), disks.test_root(), image.image_disk()
        with temporary("cache") as folder:
            cache = boots.new_cache(folder)
            first = boots.boot_image(
                kernel, root, disk, cache, {**link, "ROOT": "volume", "PACKAGES": "install"},
                "Debian on the volume, dpkg installs",
            )  # fmt: skip
            say(f"  {_words(first)}; dpkg took {first.packages['seconds']:.0f} s")
            say("  the power was cut when dpkg had ended")
            again = boots.boot_image(
                kernel, root, disk, cache, {**link, "ROOT": "volume", "PACKAGES": "check"},
                "the same volume after the power cut",
            )  # fmt: skip
        if wrong := again.packages["wrong"]:
            raise Failed(f"after the power cut: {wrong}.")
        say(f"  {_words(again)}; dpkg and ext4 find nothing wrong")
        say(f"all of it took {time.monotonic() - began_s:.0f} s")
        return 0
    except Failed as failure:
        sys.stderr.write(f"demo-install: {failure}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("demo-install: interrupted; nothing is left running\n")
        return INTERRUPTED


def _words(boot: boots.Numbers) -> str:
    device = boot.device
    return (
        f"{boot.packages['count']} packages; {device['fetched_bytes'] / MIB:.1f} MiB fetched, "
        f"{device['write_bytes'] / MIB:.1f} MiB written, {device['flush_requests']} flushes, "
        f"{device['errors']} errors"
    )


if __name__ == "__main__":
    sys.exit(main())
