"""The far tier: knows network, never the cache.

source: what can be read, and how it is opened. http, direct, answer: HTTP. file: local files. image: how
blocks lie in a source. fetcher: all traffic to a source.
"""

from tierblk.remote.fetcher import FetchCounters, Fetcher, plan_windows
from tierblk.remote.image import RawImage
from tierblk.remote.source import Identity, Progress, Source, open_source

__all__ = [
    "FetchCounters",
    "Fetcher",
    "Identity",
    "Progress",
    "RawImage",
    "Source",
    "open_source",
    "plan_windows",
]
