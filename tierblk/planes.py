"""How a device is served: the plane by which bytes get into its requests, its queues and their processors.
Decisions; what the driver grants is asked in core/ublk.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tierblk.core import ublk

if TYPE_CHECKING:
    from tierblk.config import DeviceSettings

MEMORY_ALIGN_BYTES = 512
"""Of requests' pages on plane zero-copy: the cache's disk puts its data straight into them."""


def plane_of(flags: int) -> str:
    """The plane of a device with these flags of ADD_DEV, or the best with these features of the driver."""
    return "zero-copy" if flags & ublk.F_ZERO_COPY == ublk.F_ZERO_COPY else "copy"


def flags_wanted(settings: DeviceSettings, features: int) -> int:
    """For ADD_DEV, which may grant less."""
    flags = features & ublk.F_NO_AUTO_PART_SCAN
    if settings.recovery:
        flags |= ublk.F_RECOVERY
    if settings.plane != "copy" and plane_of(features) == "zero-copy":
        flags |= ublk.F_ZERO_COPY
    return flags


def queues_wanted(settings: DeviceSettings) -> int:
    """For ADD_DEV, which grants no more than processors. More than one are for who asks: one thread serves
    more hits than most devices are asked for."""
    return 1 if settings.queues == "auto" else settings.queues


def cpus_of(dev_id: int, queues: int) -> list[bytes]:
    """For each queue a mask of the processors that the kernel would like to see its thread on, as far as this
    process may run there; b"" when it is the only one, or they have nothing in common. OSError. Blocks."""
    if queues == 1:
        return [b""]
    allowed = sum(1 << cpu for cpu in os.sched_getaffinity(0))
    masks = [int.from_bytes(ublk.queue_cpus(dev_id, q_id), "little") & allowed for q_id in range(queues)]
    return [mask.to_bytes(-(-mask.bit_length() // 8), "little") for mask in masks]
