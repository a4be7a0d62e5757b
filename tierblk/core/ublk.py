"""Control commands of the ublk driver (Documentation/block/ublk.rst; numbers as in the project's ublk notes).

Every function blocks and is called from a thread that may, never from the event loop: START_DEV waits for the
queue, and before Linux 6.15 for a partition scan; STOP_DEV waits for requests. A negative errno becomes
OSError."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tierblk.core import check
from tierblk.core._core import ffi, lib

F_SUPPORT_ZERO_COPY = 1 << 0
F_USER_RECOVERY = 1 << 3
F_USER_RECOVERY_REISSUE = 1 << 4
F_RECOVERY = F_USER_RECOVERY | F_USER_RECOVERY_REISSUE
F_CMD_IOCTL_ENCODE = 1 << 6
F_USER_COPY = 1 << 7
F_UPDATE_SIZE = 1 << 10
F_AUTO_BUF_REG = 1 << 11
F_SAFE_STOP_DEV = 1 << 17
F_NO_AUTO_PART_SCAN = 1 << 18
F_ZERO_COPY = F_SUPPORT_ZERO_COPY | F_USER_COPY | F_AUTO_BUF_REG
"""What plane zero-copy needs, all of it (Linux 6.16)."""

FEATURE_NAMES = {
    F_SUPPORT_ZERO_COPY: "SUPPORT_ZERO_COPY",
    F_USER_RECOVERY: "USER_RECOVERY",
    F_USER_RECOVERY_REISSUE: "USER_RECOVERY_REISSUE",
    F_USER_COPY: "USER_COPY",
    F_UPDATE_SIZE: "UPDATE_SIZE",
    F_AUTO_BUF_REG: "AUTO_BUF_REG",
    F_SAFE_STOP_DEV: "SAFE_STOP_DEV",
    F_NO_AUTO_PART_SCAN: "NO_AUTO_PART_SCAN",
}

STATE_DEAD, STATE_LIVE, STATE_QUIESCED, STATE_FAIL_IO = 0, 1, 2, 3

_GET_QUEUE_AFFINITY = 0x80207501
_GET_DEV_INFO = 0x80207502
_ADD_DEV = 0xC0207504
_START_DEV = 0xC0207506
_STOP_DEV = 0xC0207507
_SET_PARAMS = 0xC0207508
_START_USER_RECOVERY = 0xC0207510
_END_USER_RECOVERY = 0xC0207511
_GET_FEATURES = 0x80207513
_DEL_DEV_ASYNC = 0x80207514
_TRY_STOP_DEV = 0xC0207517

_ALL_QUEUES = 0xFFFF
_NEW_ID = 0xFFFFFFFF
_INFO = struct.Struct("<HHHHIIiIQQII16x")  # ublksrv_ctrl_dev_info, 64 bytes
_BASIC = struct.Struct("<IIIBBBBIIQQ")  # ublk_params up to and with ublk_param_basic, 40 bytes
_DISCARD = struct.Struct("<IIIIH2x")  # ublk_param_discard, 20 bytes behind it
_DMA_ALIGN_AT = 68  # bytes behind the basic ones
_DMA_ALIGN = struct.Struct("<I4x")  # ublk_param_dma_align
_PARAM_TYPE_BASIC, _PARAM_TYPE_DISCARD, _PARAM_TYPE_DMA_ALIGN = 1 << 0, 1 << 1, 1 << 4
_CLEAR_SECTORS_MAX = 2**31 // 512
"""Of one DISCARD or WRITE_ZEROES, in whole blocks; a larger one comes in pieces."""
_AFFINITY_BYTES = 1024  # 8192 processors
_ATTR_READ_ONLY, _ATTR_VOLATILE_CACHE, _ATTR_FUA = 1, 4, 8

QUICK_MS = 10_000
"""For commands that wait for nothing but the driver."""


@dataclass(frozen=True)
class DeviceInfo:
    """ublksrv_ctrl_dev_info as the driver returned it; `flags` is what was granted, `stamp` is ours to
    use."""

    dev_id: int
    queues: int
    queue_depth: int
    state: int
    max_io_bytes: int
    server_pid: int
    flags: int
    stamp: int


def _control(
    cmd_op: int,
    dev_id: int,
    payload: bytearray | None,
    data: int,
    timeout_ms: int,
    what: str,
    queue_id: int = _ALL_QUEUES,
) -> int:
    pointer = ffi.from_buffer(payload) if payload is not None else ffi.NULL
    length = len(payload) if payload is not None else 0
    rc = lib.tb_ublk_control(cmd_op, dev_id, queue_id, pointer, length, data, timeout_ms)
    return check(rc, what)


def features() -> int:
    """The driver's feature bits (GET_FEATURES). Raises OSError ENOENT or EACCES when the driver cannot be
    reached."""
    payload = bytearray(8)
    _control(_GET_FEATURES, _NEW_ID, payload, 0, QUICK_MS, "GET_FEATURES")
    return int.from_bytes(payload, "little")


def _info(payload: bytearray) -> DeviceInfo:
    queues, depth, state, _, max_io, dev_id, pid, _, flags, stamp, _, _ = _INFO.unpack(payload)
    return DeviceInfo(dev_id, queues, depth, state, max_io, pid, flags, stamp)


def add_dev(
    *, queues: int, queue_depth: int, max_io_bytes: int, flags: int, stamp: int, dev_id: int | None = None
) -> DeviceInfo:
    """ADD_DEV. Unknown flags are cleared silently by the driver, and it makes no more queues than there are
    processors: use what is returned."""
    wanted = _NEW_ID if dev_id is None else dev_id
    payload = bytearray(
        _INFO.pack(queues, queue_depth, 0, 0, max_io_bytes, wanted, -1, 0, flags, stamp, 0, 0)
    )
    _control(_ADD_DEV, wanted, payload, 0, QUICK_MS, "ADD_DEV")
    return _info(payload)


def queue_cpus(dev_id: int, q_id: int) -> bytes:
    """GET_QUEUE_AFFINITY: a mask of the processors whose requests come to this queue."""
    payload = bytearray(_AFFINITY_BYTES)
    what = f"GET_QUEUE_AFFINITY of device {dev_id}"
    _control(_GET_QUEUE_AFFINITY, dev_id, payload, q_id, QUICK_MS, what)
    return bytes(payload.rstrip(b"\0"))


def set_params(
    dev_id: int, *, size_bytes: int, block_bytes: int, read_only: bool, memory_align_bytes: int | None = None
) -> None:
    """SET_PARAMS: 512-byte logical and 4096-byte physical blocks; no request with data crosses `block_bytes`.
    A device that can be written to has a volatile cache, FUA, DISCARD and WRITE_ZEROES. memory_align_bytes:
    what requests' pages have to be aligned to at least, a power of two below 4096."""
    attrs = _ATTR_READ_ONLY if read_only else _ATTR_VOLATILE_CACHE | _ATTR_FUA
    sectors = block_bytes // 512
    types, tail = _PARAM_TYPE_BASIC, b""
    if not read_only:
        types |= _PARAM_TYPE_DISCARD
        tail = _DISCARD.pack(0, 4096, _CLEAR_SECTORS_MAX, _CLEAR_SECTORS_MAX, 1)
    if memory_align_bytes is not None:
        types |= _PARAM_TYPE_DMA_ALIGN
        tail = tail.ljust(_DMA_ALIGN_AT, b"\0") + _DMA_ALIGN.pack(memory_align_bytes - 1)
    size = _BASIC.size + len(tail)
    basic = _BASIC.pack(size, types, attrs, 9, 12, 16, 12, sectors, sectors, size_bytes // 512, 0)
    _control(_SET_PARAMS, dev_id, bytearray(basic + tail), 0, QUICK_MS, f"SET_PARAMS of device {dev_id}")


def start_dev(dev_id: int, *, pid: int, timeout_ms: int) -> None:
    """START_DEV: /dev/ublkbN appears. The queue must be fetching and misses be served."""
    _control(_START_DEV, dev_id, None, pid, timeout_ms, f"START_DEV of device {dev_id}")


def start_user_recovery(dev_id: int) -> None:
    """START_USER_RECOVERY: the device may be opened and fetched from again. OSError EBUSY while the process
    that had it is still letting go of it, ENODEV when there is no such device."""
    _control(_START_USER_RECOVERY, dev_id, None, 0, QUICK_MS, f"START_USER_RECOVERY of device {dev_id}")


def end_user_recovery(dev_id: int, *, pid: int, timeout_ms: int) -> None:
    """END_USER_RECOVERY: requests come again, first those that the old server had not completed. The queue
    must be fetching."""
    _control(_END_USER_RECOVERY, dev_id, None, pid, timeout_ms, f"END_USER_RECOVERY of device {dev_id}")


def stop_dev(dev_id: int, *, timeout_ms: int) -> None:
    """STOP_DEV, whoever uses the device. The door must be draining."""
    _control(_STOP_DEV, dev_id, None, 0, timeout_ms, f"STOP_DEV of device {dev_id}")


def try_stop_dev(dev_id: int, *, timeout_ms: int) -> None:
    """TRY_STOP_DEV (7.0): OSError EBUSY while the device is open, EOPNOTSUPP on older kernels."""
    _control(_TRY_STOP_DEV, dev_id, None, 0, timeout_ms, f"TRY_STOP_DEV of device {dev_id}")


def del_dev(dev_id: int, *, timeout_ms: int) -> None:
    """DEL_DEV_ASYNC: its nodes are gone when this returns. DEL_DEV would wait until the number can be used
    again, which is as long as anybody, stopped or not, keeps the device's file open."""
    _control(_DEL_DEV_ASYNC, dev_id, None, 0, timeout_ms, f"DEL_DEV of device {dev_id}")


def dev_info(dev_id: int) -> DeviceInfo:
    """GET_DEV_INFO. Raises OSError ENODEV for a device that is not there."""
    payload = bytearray(_INFO.size)
    _control(_GET_DEV_INFO, dev_id, payload, 0, QUICK_MS, f"GET_DEV_INFO of device {dev_id}")
    return _info(payload)
