"""The local tier: knows disk, never network."""

from tierblk.cache.cache import Cache
from tierblk.cache.evict import Watermarks, commit_is_due, slots_to_evict

__all__ = ["Cache", "Watermarks", "commit_is_due", "slots_to_evict"]
