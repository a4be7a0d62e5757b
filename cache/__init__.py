"""The local tier: knows disk, never network."""

from tierblk.cache import dirt
from tierblk.cache.cache import Cache
from tierblk.cache.commit import VolumeSource
from tierblk.cache.evict import Watermarks, commit_is_due, slots_to_evict
from tierblk.cache.layers import LayerRecord, VolumeChange
from tierblk.cache.start import StartMode
from tierblk.cache.throttle import Throttle

__all__ = [
    "Cache",
    "LayerRecord",
    "StartMode",
    "Throttle",
    "VolumeChange",
    "VolumeSource",
    "Watermarks",
    "commit_is_due",
    "dirt",
    "slots_to_evict",
]
