#!/usr/bin/env python3
"""Boots a real Debian from an image on a web server, through tierblk: cold, then warm; prints what it cost.

Environment: RTT_MS (round trip in milliseconds) and MBIT (Mbit/s) shape the link to the web server.
DEMO_IN=vm takes a VM although this machine's own kernel has ublk.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vm"))

from tierdemo import boots, image, native, report  # noqa: E402  (they need the path set above)
from tiervm import disks, host, kernels, qemu  # noqa: E402
from tiervm.paths import build_dir, temporary  # noqa: E402
from tiervm.say import Failed, end_in_order, say  # noqa: E402

INTERRUPTED = 130


def run(name: str, work: Callable[[dict[str, str]], None]) -> int:
    """A demo with the link that is asked for, to its end; every failure is one sentence on stderr."""
    end_in_order()
    began_s = time.monotonic()
    try:
        host.require_supported()
        work(link_settings())
        say(f"all of it took {time.monotonic() - began_s:.0f} s")
        return 0
    except Failed as failure:
        sys.stderr.write(f"{name}: {failure}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted; nothing is left running\n")
        return INTERRUPTED


def both_boots(link: dict[str, str]) -> None:
    """The whole demo."""
    if os.environ.get("DEMO_IN") != "vm" and native.can_run():
        cold, warm = here(link)
    else:
        cold, warm = in_vm(link)
    say(report.table(cold, warm, image.IMAGE_BYTES, image.allocated_bytes(), link))
    for file in report.keep(build_dir() / "demo", cold=cold, warm=warm):
        say(f"its reads in order: {file}")


def here(link: dict[str, str]) -> tuple[boots.Numbers, boots.Numbers]:
    """Both boots on this machine's own kernel."""
    say("== what the demo needs (made once, kept)")
    host.install(["mmdebstrap", "e2fsprogs", "fdisk", "debian-archive-keyring", *host.NATIVE_PACKAGES])
    image.image_disk()
    say(f"== this machine's kernel {os.uname().release} has ublk: the image boots as a container on it")
    with temporary("native") as folder, native.server(folder, link):
        cold = native.boot_image(folder, "cold: empty cache")
        return cold, native.boot_image(folder, "warm: same cache")


def in_vm(link: dict[str, str]) -> tuple[boots.Numbers, boots.Numbers]:
    """Both boots in a VM with Debian's newest kernel."""
    say("== a VM, since this machine has no ublk and systemd of its own; what it needs is made once")
    host.install(host.VM_PACKAGES)
    kernel = kernels.kernel("new")
    root = disks.test_root()
    disk = image.image_disk()
    accel = report.ACCELERATORS[qemu.accelerator(kernel)]
    say(f"== the image boots from tierblk under kernel {kernel.release}, {accel}")
    with temporary("cache") as folder:
        cache = boots.new_cache(folder)
        cold = boots.boot_image(kernel, root, disk, cache, link, "cold: empty cache")
        return cold, boots.boot_image(kernel, root, disk, cache, link, "warm: same cache")


def link_settings() -> dict[str, str]:
    """RTT_MS and MBIT as given. Raises Failed when one is not a positive number."""
    found = {}
    for name in ("RTT_MS", "MBIT"):
        text = os.environ.get(name, "")
        if text:
            if not text.replace(".", "", 1).isdigit() or float(text) <= 0:
                raise Failed(f"{name}={text} is not a positive number.")
            found[name] = text
    return found


if __name__ == "__main__":
    sys.exit(run("demo", both_boots))
