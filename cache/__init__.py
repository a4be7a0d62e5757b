"""The local tier: knows disk, never network."""

from tierblk.cache import dirt
from tierblk.cache.cache import Cache
from tierblk.cache.commit import VolumeSource
from tierblk.cache.evict import Watermarks, commit_is_due, slots_to_evict
from tierblk.cache.layers import LayerRecord, VolumeChange
from tierblk.cache.rows import Entry
from tierblk.cache.start import StartMode
from tierblk.cache.throttle import Throttle
from tierblk.cache.view import LayerView, State, View, look

__all__ = [
    "Cache",
    "Entry",
    "LayerRecord",
    "LayerView",
    "StartMode",
    "State",
    "Throttle",
    "View",
    "VolumeChange",
    "VolumeSource",
    "Watermarks",
    "commit_is_due",
    "dirt",
    "look",
    "slots_to_evict",
]
