"""The checks of `tierblk doctor`. Each looks, changes nothing, and never raises."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tierblk.cli.client import Daemon, DeadSocket, candidates
from tierblk.errors import TierblkError
from tierblk.rundir import run_root
from tierblk.units import MIB, format_size

KERNEL_TESTED = (6, 12)
KERNEL_LEAST = (6, 0)
CONTROL_DEVICE = Path("/dev/ublk-control")
MEMLOCK_BYTES = 64 * MIB
PROC = Path("/proc")
SYS = Path("/sys")


@dataclass(frozen=True)
class Check:
    """One finding. state: "ok", "warn" or "fail"; fix: what to do about it, "" when nothing."""

    name: str
    state: str
    message: str
    fix: str = ""


def run_checks(timeout_s: float) -> list[Check]:
    """All checks, in the order in which one would fix things. timeout_s: for a daemon's answer."""
    checks: list[Check] = []
    groups: tuple[Callable[[], Iterable[Check]], ...] = (
        lambda: [kernel(platform.release())],
        lambda: [permissions(os.geteuid())],
        lambda: [driver(CONTROL_DEVICE)],
        lambda: [features(CONTROL_DEVICE)],
        lambda: [devices_max(SYS)],
        lambda: [io_uring(PROC, os.geteuid())],
        lambda: [memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], os.geteuid())],
        lambda: [run_dir(run_root(), PROC)],
        lambda: daemons(timeout_s),
    )
    for group in groups:
        try:
            checks += group()
        except (OSError, TierblkError) as error:
            checks.append(Check("doctor", "warn", f"a check could not be made: {error}"))
    return checks


def kernel(release: str) -> Check:
    """The kernel's version against what is tested."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    if not match:
        return Check("kernel", "warn", f"{release}: a version that is not understood")
    version = (int(match[1]), int(match[2]))
    if version >= KERNEL_TESTED:
        return Check("kernel", "ok", release)
    upgrade = "use Linux 6.12 or newer (Debian 13 has it)"
    if version >= KERNEL_LEAST:
        return Check("kernel", "warn", f"{release} is older than all that tierblk is tested on", upgrade)
    return Check("kernel", "fail", f"{release} is too old: it has no ublk", upgrade)


def permissions(uid: int) -> Check:
    """Devices are made by root."""
    if uid == 0:
        return Check("permissions", "ok", "this is root")
    return Check("permissions", "fail", f"user {uid} cannot make block devices", "run tierblk as root")


def driver(control: Path) -> Check:
    """The ublk driver: there, loadable, or neither."""
    if control.exists():
        if os.access(control, os.R_OK | os.W_OK):
            return Check("driver", "ok", f"{control} is there")
        return Check("driver", "fail", f"no permission to open {control}", "run tierblk as root")
    if _can_load("ublk_drv"):
        return Check(
            "driver",
            "fail",
            "the ublk module is not loaded",
            "modprobe ublk_drv; for every boot: echo ublk_drv > /etc/modules-load.d/ublk.conf",
        )
    return Check(
        "driver",
        "fail",
        "this kernel has no ublk driver",
        "boot a kernel with CONFIG_BLK_DEV_UBLK (Debian's linux-image packages from 13 on have it)",
    )


def _can_load(module: str) -> bool:
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not modprobe:
        return False
    try:
        tried = subprocess.run([modprobe, "--dry-run", "--quiet", module], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


def features(control: Path) -> Check:
    """What the driver offers, asked by GET_FEATURES through the C core."""
    try:
        from tierblk.core import ublk
    except ImportError as error:
        return Check(
            "features",
            "fail",
            f"tierblk's C core is not built ({error})",
            "make setup, or install tierblk again",
        )
    if not control.exists():
        return Check("features", "warn", "not known while there is no ublk driver")
    try:
        bits = ublk.features()
    except (OSError, TierblkError) as error:
        return Check(
            "features", "fail", f"the driver does not say what it can do: {error}", "run tierblk as root"
        )
    names = [name for bit, name in sorted(ublk.FEATURE_NAMES.items()) if bits & bit]
    return Check("features", "ok", f"{', '.join(names) or 'none that tierblk uses'} ({bits:#x})")


def devices_max(sys: Path) -> Check:
    """How many ublk devices there may be; the parameter counts those made without root, too."""
    limit = _number(sys / "module" / "ublk_drv" / "parameters" / "ublks_max")
    used = len(list((sys / "class" / "ublk-char").glob("ublkc*")))
    if limit is None:
        return Check("devices", "ok", f"{used} ublk devices")
    if used < limit:
        return Check("devices", "ok", f"{used} ublk devices, at most {limit}")
    return Check(
        "devices",
        "warn",
        f"{used} ublk devices: the limit is {limit}",
        f"echo {max(256, 4 * limit)} > /sys/module/ublk_drv/parameters/ublks_max",
    )


def io_uring(proc: Path, uid: int) -> Check:
    """Whether an administrator has switched io_uring off."""
    disabled = _number(proc / "sys" / "kernel" / "io_uring_disabled") or 0
    fix = "sysctl -w kernel.io_uring_disabled=0"
    if disabled >= 2:
        return Check("io_uring", "fail", "it is switched off (kernel.io_uring_disabled = 2)", fix)
    if disabled == 1 and uid != 0:
        return Check("io_uring", "fail", "it is switched off for all but root", fix)
    return Check("io_uring", "ok", "it is available")


def memlock(limit_bytes: int, uid: int) -> Check:
    """Rings count as locked memory for those who have no CAP_IPC_LOCK."""
    if uid == 0 or limit_bytes == resource.RLIM_INFINITY or limit_bytes >= MEMLOCK_BYTES:
        return Check(
            "memory", "ok", "locked memory is not limited" if uid == 0 else "the limit is high enough"
        )
    return Check(
        "memory",
        "warn",
        f"only {format_size(limit_bytes)} may be locked",
        "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service",
    )


def run_dir(root: Path, proc: Path) -> Check:
    """Block maps live here: a tmpfs is as fast as memory and forgets at reboot, as it has to (R1)."""
    kind = filesystem(root, proc)
    if kind in ("tmpfs", "ramfs"):
        return Check("run directory", "ok", f"{root} is on a {kind}")
    return Check(
        "run directory",
        "warn",
        f"{root} is on {kind or 'an unknown filesystem'}, not on a tmpfs: slower",
        "mount -t tmpfs tmpfs /run, or set TIERBLK_RUN_DIR to a directory on one",
    )


def filesystem(path: Path, proc: Path) -> str:
    """The type of the filesystem that a path is, or would be, on; "" when that is not known."""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in (proc / "self" / "mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = point == "/" or real == point or real.startswith(f"{point}/")
        if inside and len(point) >= len(best):  # of two on one point, the later one hides the other
            best, kind = point, after.split(" ")[0]
    return kind


def daemons(timeout_s: float) -> list[Check]:
    """Every socket in the run directory: alive, dead or hanging."""
    found = [_daemon(daemon) for daemon in candidates(timeout_s)]
    return found or [Check("daemons", "ok", "none is running")]


def _daemon(daemon: Daemon) -> Check:
    pid = daemon.info.get("pid", "?")
    try:
        count = len(daemon.devices())
    except DeadSocket:
        return Check(
            "daemon",
            "warn",
            f"{daemon} was killed and left {daemon.run_dir} behind",
            f"attach with its cache again, or, to give that cache up: rm -r {daemon.run_dir}",
        )
    except TierblkError as error:
        return Check("daemon", "fail", error.message, error.hint or f"kill {pid}")
    return Check("daemon", "ok", f"{daemon} answers, {count} attached")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
