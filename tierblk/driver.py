"""What daemon and command line know of ublk devices beyond single commands: whose a device is, what an error
means, and how one is taken away that no daemon serves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from errno import EACCES, EMFILE, ENODEV, ENOENT, EPERM
from pathlib import Path

import tierblk
from tierblk.core import MAX_TAGS, ublk
from tierblk.errors import DeviceError

STAMP_MAGIC = 0x7469657262 << 24
"""Upper 40 bits of the opaque word that the driver keeps for a device ("tierb"); below: 24 bits of the
cache's uuid."""

STOP_MS = 60_000
_POLL_S = 0.02

_TRY_STOP = """
import sys
sys.path.append(sys.argv[1])
from tierblk.core import ublk
sys.stdout.write(".")
sys.stdout.flush()
try:
    ublk.try_stop_dev(int(sys.argv[2]), timeout_ms=600_000)
except OSError as error:
    sys.exit(error.errno)
"""


def stamp_of(cache_uuid: bytes) -> int:
    """What marks a ublk device as one of this cache directory's."""
    return STAMP_MAGIC | int.from_bytes(cache_uuid[:3], "big")


def is_stamped(stamp: int) -> bool:
    """Whether a device with this word is tierblk's, of whatever cache directory."""
    return stamp >> 24 == STAMP_MAGIC >> 24


def driver_error(error: OSError) -> DeviceError:
    """What an error of the driver means to a user."""
    if error.errno in (ENOENT, ENODEV) and not os.path.exists("/dev/ublk-control"):
        return DeviceError(
            "this kernel has no ublk driver loaded: /dev/ublk-control is missing",
            "modprobe ublk_drv; `tierblk doctor` says what this kernel lacks",
        )
    if error.errno in (EACCES, EPERM):
        return DeviceError("no permission to use /dev/ublk-control", "run it as root")
    if error.errno == EMFILE:
        return DeviceError(
            f"the devices of one daemon can have {MAX_TAGS} requests in flight together",
            "lower device.queues or device.queue_depth, or use another cache directory",
        )
    return DeviceError(f"the ublk driver refused: {error.strerror}")


def devices() -> list[ublk.DeviceInfo]:
    """All ublk devices of this machine, by number. OSError when the driver cannot be asked. Blocks."""
    found = []
    for node in Path("/dev").glob("ublkc[0-9]*"):
        number = node.name.removeprefix("ublkc")
        if number.isdecimal() and (info := info_of(int(number))) is not None:
            found.append(info)
    return sorted(found, key=lambda info: info.dev_id)


def info_of(dev_id: int) -> ublk.DeviceInfo | None:
    """A device as the driver has it; None when there is none of this number. OSError."""
    try:
        return ublk.dev_info(dev_id)
    except OSError as error:
        if error.errno == ENODEV:
            return None
        raise


def has_server(info: ublk.DeviceInfo) -> bool:
    """Whether the device is served now. Kernels before 7.0 go on naming a server that has ended."""
    return info.state == ublk.STATE_LIVE and os.path.exists(f"/proc/{info.server_pid}")


def wait_for_rest(dev_id: int, timeout_s: float) -> ublk.DeviceInfo | None:
    """The device when it is no longer LIVE, which it stays for a moment after its daemon died, or as it is
    when the time is up. None: it is gone. Blocks; OSError."""
    deadline = time.monotonic() + timeout_s
    while (info := info_of(dev_id)) is not None and info.state == ublk.STATE_LIVE:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    return info


def take_away(dev_id: int, *, rest_s: float = 10.0) -> None:
    """Stop and delete a device that no daemon serves; who waits for it gets EIO. It may be gone already.

    STOP_DEV waits for nobody here: a device at rest (QUIESCED, DEAD) has no server that could hold a request.
    One that does not come to rest is left alone. Blocks; OSError, DeviceError."""
    info = wait_for_rest(dev_id, rest_s)
    if info is None:
        return
    if info.state == ublk.STATE_LIVE:
        raise DeviceError(f"ublk device {dev_id} is still served, by process {info.server_pid}")
    for command in (ublk.stop_dev, ublk.del_dev):
        try:
            command(dev_id, timeout_ms=STOP_MS)
        except OSError as error:
            if error.errno != ENODEV:
                raise


_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME")


def send_try_stop(dev_id: int) -> subprocess.Popen[bytes]:
    """A process that has begun to send TRY_STOP and ends with its errno. Blocks while it starts; OSError."""
    root = str(Path(tierblk.__file__).resolve().parent.parent)
    command = [sys.executable, "-P", "-c", _TRY_STOP, root, str(dev_id)]
    # The daemon's environment may have credentials, which this one has no use for.
    env = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    with process.stdout as begun:
        begun.read(1)
    return process
