"""The local tier: knows disk, never network.

Its names are imported when they are used: a command that only looks into a directory needs few of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Cache": "tierblk.cache.cache",
    "VolumeSource": "tierblk.cache.commit",
    "Watermarks": "tierblk.cache.evict",
    "commit_is_due": "tierblk.cache.evict",
    "slots_to_evict": "tierblk.cache.evict",
    "LayerRecord": "tierblk.cache.layers",
    "VolumeChange": "tierblk.cache.layers",
    "Entry": "tierblk.cache.rows",
    "StartMode": "tierblk.cache.start",
    "Throttle": "tierblk.cache.throttle",
    "LayerView": "tierblk.cache.view",
    "State": "tierblk.cache.view",
    "View": "tierblk.cache.view",
    "look": "tierblk.cache.view",
}


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found
