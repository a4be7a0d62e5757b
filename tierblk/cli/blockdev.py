"""What the short-lived commands do with block devices, because a daemon must never open its own (DESIGN 4).

Nothing here is needed for files or paths that are no block devices: then every function has nothing to do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tierblk.errors import DeviceError

BLKRRPART = 0x125F
RESCAN_TRIES = 20
POLL_S = 0.05
NODES_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 3.0

SYS = Path("/sys")
PROC = Path("/proc")
DEV = Path("/dev")


def is_block_device(path: str) -> bool:
    """Whether the path is one now."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def scan_partitions(path: str) -> str | None:
    """Ask the kernel to read the partition table. A warning when it could not; it need not find one."""
    for _ in range(RESCAN_TRIES):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, BLKRRPART)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.EBUSY:  # udev looks at the new device at the same time
                time.sleep(POLL_S)
                continue
            if error.errno in (errno.EINVAL, errno.ENOTTY):  # a device that has no partitions
                return None
            return f"cannot read the partition table of {path}: {error.strerror}"
        return None
    return f"the partition table of {path} was not read: the device is busy"


def partitions(path: str, sys: Path = SYS) -> list[str]:
    """Names of the device's partitions that the kernel knows, such as ublkb0p1, in order."""
    name = os.path.basename(path)
    try:
        found = [p.parent.name for p in (sys / "block" / name).glob(f"{glob_literal(name)}*/partition")]
    except OSError:
        return []
    return sorted(found, key=lambda found_name: (len(found_name), found_name))


def glob_literal(text: str) -> str:
    """The text as a glob pattern that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", text)


def wait_for_nodes(
    path: str, *, timeout_s: float = NODES_TIMEOUT_S, sys: Path = SYS, dev: Path = DEV
) -> str | None:
    """Until every partition has its node in /dev, and udev is done. A warning names what did not come."""
    settle()
    deadline = time.monotonic() + timeout_s
    while True:
        missing = [name for name in partitions(path, sys) if not (dev / name).exists()]
        if not missing:
            return None
        if time.monotonic() > deadline:
            return f"partitions without a device node in {dev}: {', '.join(missing)}"
        time.sleep(POLL_S)


def settle(timeout_s: int = 5) -> None:
    """Let udev end what it does with devices that just came, where there is udev."""
    udevadm = shutil.which("udevadm")
    if udevadm and os.path.exists("/run/udev/control"):
        command = [udevadm, "settle", f"--timeout={timeout_s}"]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s + 5)
        except (OSError, subprocess.TimeoutExpired):
            pass  # it only makes things smoother


def ensure_free(path: str) -> None:
    """DeviceError when the device, or a partition of it, is mounted or held; the message says by what."""
    if not is_block_device(path):
        return
    who = users(path)
    problem = errno.EBUSY if who else _exclusive_open(path)
    if problem == errno.EBUSY:
        mounts = [words.removeprefix("mounted at ") for words in who if words.startswith("mounted at ")]
        raise DeviceError(
            f"{path} is in use: {'; '.join(who) or 'held by something in the kernel'}",
            f"umount {' '.join(mounts)}" if mounts else "end what uses it first",
        )
    if problem not in (0, errno.ENOENT, errno.ENXIO, errno.ENODEV):  # those: it is gone, or going
        raise DeviceError(f"cannot open {path}: {os.strerror(problem)}")


def _exclusive_open(path: str) -> int:
    """The errno of an open that the kernel grants while nobody holds the disk or a partition; 0: granted.

    In a child: the open waits, and cannot be killed, while somebody closes the device who waits for a read
    that only the daemon can end. Who does not come back in time has not found a holder; the daemon goes on
    then, and its drain ends the child as well.
    """
    child = os.fork()
    if child == 0:
        code = errno.EIO
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            code = 0
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os._exit(code)
    child_fd = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(child_fd, select.POLLIN)
        if not poll.poll(OPEN_TIMEOUT_S * 1000):
            return 0
    finally:
        os.close(child_fd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def users(path: str, sys: Path = SYS, proc: Path = PROC) -> list[str]:
    """What uses a device or its partitions: "mounted at /mnt", "swap on /dev/...", "held by dm-0"."""
    names = [os.path.basename(path), *partitions(path, sys)]
    whole = sys / "block" / names[0]
    folders = [whole, *(whole / name for name in names[1:])]
    numbers = {_read(folder / "dev") for folder in folders} - {""}
    sources = {f"/dev/{name}" for name in names}
    found = [f"mounted at {point}" for point in _mounts(numbers, sources, proc)]
    for line in _read(proc / "swaps").splitlines():
        if line.split(" ")[0] in sources:
            found.append(f"swap on {line.split(' ')[0]}")
    for folder in folders:
        found += [f"held by {holder.name}" for holder in sorted((folder / "holders").glob("*"))]
    return found


def _mounts(numbers: set[str], sources: set[str], proc: Path) -> Iterator[str]:
    """Mount points by device number, or by source: btrfs has numbers of its own."""
    for line in _read(proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, origin = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(origin) < 2:
            continue
        if fields[2] in numbers or origin[1] in sources:
            yield re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
