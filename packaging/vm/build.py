#!/usr/bin/env python3
"""Makes ahead what VMs are made of: build.py host | kernels | root | clean, in the order given."""

from __future__ import annotations

import argparse
import sys

from tiervm import disks, host, kernels, paths
from tiervm.say import Failed, end_in_order, say


def _kernels() -> None:
    for kind in kernels.KINDS:
        say(f"  {kind}: {kernels.kernel(kind).release}")


def _clean() -> None:
    paths.remove(paths.build_dir())


ACTIONS = {
    "host": lambda: host.install(host.VM_PACKAGES),
    "kernels": _kernels,
    "root": disks.test_root,
    "clean": _clean,
}


def main() -> int:
    """The command line; every failure is one sentence on stderr."""
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=list(ACTIONS))
    try:
        host.require_supported()
        for name in parser.parse_args().what:
            ACTIONS[name]()
    except Failed as failure:
        sys.stderr.write(f"tierblk-vm: {failure}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("tierblk-vm: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
