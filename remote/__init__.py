"""The far tier: knows network, never the cache.

source: what can be read, and how it is opened. http, client, direct, answer: HTTP. file, threads: local ones.
image: how blocks lie in a source. fetcher: all traffic to a source, made of pace (limits, whose turn it is),
race (one try, with a second request beside it), hedge (when it is worth one), retry, and outage.

store: what volumes are written to. directory: one in a local folder.
"""

from tierblk.remote.fetcher import Fetcher, Health
from tierblk.remote.image import RawImage
from tierblk.remote.pace import Priority, Ticket
from tierblk.remote.race import FetchCounters
from tierblk.remote.source import Identity, Progress, Source, open_source

__all__ = [
    "FetchCounters",
    "Fetcher",
    "Health",
    "Identity",
    "Priority",
    "Progress",
    "RawImage",
    "Source",
    "Ticket",
    "open_source",
]
