"""The far tier: knows network, never the cache.

source: what can be read, and how it is opened. http, client, direct, answer: HTTP. file, threads: local ones.
image: how blocks lie in a source. fetcher: all traffic to a source, made of pace (limits, whose turn it is),
race (one try, with a second request beside it), hedge (when it is worth one), retry, and outage.

store: what volumes are written to. stores: which one an address opens. directory: one in a local folder.
bucket: what those behind HTTP share, with exchange (one request) and listing (the XML in answers). s3, gs and
az: how each vendor is asked, with sigv4 and sharedkey, which sign. wallet: credentials and their renewal;
credentials, google, azure: where they come from; tokens: how those of OAuth are asked for.
patient: a store that tries a few times.

What a volume is in object storage, without any network: names (of its objects), birth (volume.json), record
and epoch (what an epoch changes, as values and as bytes), extents (where every page is, made of pieces and
ranges), checkpoint (all of that as bytes); packed is what the binary ones share.

A volume in its stores: lineage (those of a clone and of its ancestors), history (its log, read and followed),
stored (its pages, as a source).
"""

from tierblk.remote.birth import Base as BirthBase
from tierblk.remote.birth import Birth
from tierblk.remote.birth import Parent as BirthParent
from tierblk.remote.epoch import RECORD_BYTES_MAX, hash_of
from tierblk.remote.epoch import decode as decode_record
from tierblk.remote.epoch import encode as encode_record
from tierblk.remote.extents import ExtentMap
from tierblk.remote.fetcher import Fetcher, Health
from tierblk.remote.history import follow, load, write_checkpoint
from tierblk.remote.image import RawImage
from tierblk.remote.kept import Changes
from tierblk.remote.lineage import Lineage, begin, open_lineage, read_birth
from tierblk.remote.names import EpochName, SnapshotName
from tierblk.remote.pace import Priority, Ticket, TokenBucket
from tierblk.remote.patient import PatientStore, tried
from tierblk.remote.race import FetchCounters
from tierblk.remote.record import (
    CRC_BYTES,
    IN_RECORD,
    INLINE_AT,
    INLINE_BYTES_MAX,
    Codec,
    Data,
    Head,
    ObjectName,
    Record,
    Run,
    Zeroes,
)
from tierblk.remote.source import Identity, Progress, Source, open_source
from tierblk.remote.store import Store, prove
from tierblk.remote.stored import StoredPages
from tierblk.remote.stores import open_store

__all__ = [
    "CRC_BYTES",
    "INLINE_AT",
    "INLINE_BYTES_MAX",
    "IN_RECORD",
    "RECORD_BYTES_MAX",
    "Birth",
    "BirthBase",
    "BirthParent",
    "Changes",
    "Codec",
    "Data",
    "EpochName",
    "ExtentMap",
    "FetchCounters",
    "Fetcher",
    "Head",
    "Health",
    "Identity",
    "Lineage",
    "ObjectName",
    "PatientStore",
    "Priority",
    "Progress",
    "RawImage",
    "Record",
    "Run",
    "SnapshotName",
    "Source",
    "Store",
    "StoredPages",
    "Ticket",
    "TokenBucket",
    "Zeroes",
    "begin",
    "decode_record",
    "encode_record",
    "follow",
    "hash_of",
    "load",
    "open_lineage",
    "open_source",
    "open_store",
    "prove",
    "read_birth",
    "tried",
    "write_checkpoint",
]
