#!/usr/bin/env python3
"""Boots a small VM with a kernel that has ublk, runs a command in it, and exits with the command's status.

    packaging/vm/run.py --kernel new -- python3 -m tierblk doctor

Inside: the project as it is in this checkout (PYTHONPATH is set, /opt/tierblk is read-only), a scratch disk
at /cache, no network but loopback. Exit status 125: the VM could not be run or did not get to the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tiervm import disks, host, kernels, payload, qemu
from tiervm.apt import quoted
from tiervm.paths import temporary
from tiervm.say import Failed, end_in_order, say

CANNOT_RUN = 125
INTERRUPTED = 130


def main() -> int:
    """The command line; every failure is one sentence on stderr."""
    end_in_order()
    options = _parser().parse_args()
    try:
        host.require_supported()
        host.install(host.VM_PACKAGES)
        return _run(options)
    except Failed as failure:
        sys.stderr.write(f"tierblk-vm: {failure}\n")
        return CANNOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("tierblk-vm: interrupted\n")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kernel", choices=kernels.KINDS, default="new", help="old: trixie's 6.12; new: backports' newest"
    )
    parser.add_argument("--mem", type=_mib, default=2048, help="memory, e.g. 2G or 1500M (default 2G)")
    parser.add_argument("--smp", type=int, default=2, help="processors (default 2)")
    parser.add_argument(
        "--disk", action="append", default=[], help="FILE[:ro|:snapshot], in the guest /run/disks/STEM"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=600, help="seconds until the VM is ended (default 600)"
    )
    parser.add_argument(
        "--plugin", default="", help="FILE,ARG=VALUE,… of a plugin for QEMU's emulator; one processor then"
    )
    parser.add_argument("command", nargs="+", help="what to run in the guest, as root")
    return parser


def _mib(text: str) -> int:
    units = {"G": 1024, "M": 1}
    if text[-1:].upper() not in units or not text[:-1].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 2G or 1500M")
    return int(text[:-1]) * units[text[-1].upper()]


def _disk(word: str) -> qemu.Disk:
    path, _, mode = word.partition(":")
    file = Path(path).resolve()
    if mode not in ("", "rw", "ro", "snapshot"):
        raise Failed(f"--disk {word}: the part after ':' is ro, rw or snapshot.")
    if not file.exists():
        raise Failed(f"--disk {word}: there is no file {file}.")
    return qemu.Disk(file.stem[:20], file, mode or "rw")


def _run(options: argparse.Namespace) -> int:
    command = options.command[0] if len(options.command) == 1 else quoted(options.command)
    given = [_disk(word) for word in options.disk]
    kernel = kernels.kernel(options.kernel)
    root = disks.test_root()
    with temporary("run") as folder:
        attached = [
            qemu.Disk("root", root, "snapshot"),
            qemu.Disk("payload", payload.make_payload(folder / "payload", {"command": command + "\n"}), "ro"),
            *given,
        ]
        if not any(disk.name == "cache" for disk in given):
            attached.append(qemu.Disk("cache", disks.scratch(folder / "cache", 8 * disks.GIB)))
        cpus = 1 if options.plugin else options.smp
        outcome = qemu.boot(
            qemu.Machine(
                kernel, attached, options.mem, cpus, options.timeout_s, plugin=options.plugin, on_line=say
            )
        )
    if outcome.status is None:
        raise Failed(f"the VM did not finish the command: {outcome.trouble}.")
    say(f"tierblk-vm: status {outcome.status} after {outcome.seconds:.1f} s")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
