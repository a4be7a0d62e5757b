"""The Debian packages that this machine needs to build and run VMs: installs what is missing only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tiervm.say import Failed, Step, say

VM_PACKAGES = [
    "qemu-system-x86",
    "mmdebstrap",
    "busybox-static",
    "cpio",
    "e2fsprogs",
    "fdisk",
    "kmod",
    "xz-utils",
    "debian-archive-keyring",
]
# For running the demo on a kernel of this machine's own that has ublk.
NATIVE_PACKAGES = ["nginx-light", "iproute2", "systemd-container"]
POLICY = Path("/usr/sbin/policy-rc.d")


def missing(packages: list[str]) -> list[str]:
    """Those of the packages that are not installed."""
    command = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    present = {line.split()[0] for line in listed.splitlines() if line.endswith(" installed")}
    return [name for name in packages if name not in present]


def install(packages: list[str]) -> None:
    """Installs what is missing. Raises Failed with the command to run when we are not root."""
    wanted = missing(packages)
    if not wanted:
        return
    line = f"apt-get install --no-install-recommends {' '.join(wanted)}"
    if os.geteuid() != 0:
        raise Failed(f"these packages are missing; as root, run: {line}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "--no-install-recommends", *wanted]
    say(f"  {line}")
    with Step("host packages") as step, _ServicesStayOff():
        try:
            step.run(command, env=environment)
        except Failed:
            # A fresh machine, or one with old lists: learn what there is, then once more.
            step.run(["apt-get", "update"], env=environment)
            step.run(command, env=environment)


class _ServicesStayOff:
    """While packages are installed, none of them starts a server (nginx would take port 80)."""

    def __enter__(self) -> None:
        self._ours = not POLICY.exists()
        if self._ours:
            POLICY.write_text("#!/bin/sh\nexit 101\n")
            POLICY.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        if self._ours:
            POLICY.unlink(missing_ok=True)


def require_supported() -> None:
    """Raises Failed where nothing of this can work: another architecture, not root."""
    if os.uname().machine != "x86_64":
        raise Failed(f"the VMs are x86-64 only; this machine is {os.uname().machine}.")
    if os.geteuid() != 0:
        raise Failed("building a VM's root filesystem needs root (mmdebstrap, device nodes).")
