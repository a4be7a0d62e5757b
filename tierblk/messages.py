"""What goes over the control socket: the bodies of requests, which are checked against these models, and the
answers, which tests check. openapi.py makes the description of the interface out of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from tierblk.cache.layers import LAYER_ID_MAX
from tierblk.config import Config
from tierblk.errors import KINDS

Count = Annotated[int, Field(ge=0)]
UnixTime = Annotated[float, Field(ge=0, description="seconds since 1970")]


class _IsConfig:
    """Described as what a config file says; it is read by config.parse, whose errors name every key."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(Config.__pydantic_core_schema__)


# -- bodies ---


class Body(BaseModel):
    """Base of all: nothing is taken for something else, and a key that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NoBody(Body):
    """Nothing has to be said: no body at all, or an empty object."""


_ATTACH: Any = {
    "config_path": "/etc/tierblk/debian.toml",
    "config": {
        "device": {"name": "debian"},
        "base": {"url": "https://images.example/debian.raw"},
        "cache": {"dir": "/var/cache/tierblk", "size": "20GiB"},
    },
}


class AttachBody(Body):
    """config: what the config file says. config_path: that file, for messages and records; it is not read.
    take_over, discard_local, clone_local: as the options of `tierblk attach`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ATTACH]})

    config_path: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]
    config: Annotated[dict[str, Any], _IsConfig]
    take_over: bool = False
    discard_local: bool = False
    clone_local: bool = False


class DetachBody(Body):
    """force: also when it is in use; who uses it gets EIO."""

    force: bool = False


class SyncBody(Body):
    """wait: the answer comes when all is in object storage."""

    wait: bool = False


def _whole(value: Any) -> Any:
    """JSON has no integers: 5.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


LayerId = Annotated[int, Field(ge=1, le=LAYER_ID_MAX), BeforeValidator(_whole)]
Offset = Annotated[int, Field(ge=0, le=(1 << 63) - 1), BeforeValidator(_whole)]
Range = Annotated[list[Offset], Field(min_length=2, max_length=2)]
"""[offset, length] in bytes."""
Ranges = Annotated[list[Range], Field(max_length=65536)]


class EvictBody(Body):
    """layer_id: as `GET /v1/daemon` has it. ranges: [offset, length] in bytes of the layer; blocks that lie
    in one in whole go, unless they are dirty or in use."""

    layer_id: LayerId
    ranges: Ranges


class PinBody(Body):
    """ranges: as for evict; blocks that one touches. pinned: false takes it back."""

    layer_id: LayerId
    ranges: Ranges
    pinned: bool = True


class DropBody(Body):
    """pages: [block, mask of 16 pages]; those that are clean and not in use are not cached any more."""

    layer_id: LayerId
    pages: Annotated[list[Range], Field(max_length=65536)]


class CollectBody(Body):
    """older_s: only what was not used for so many seconds. dry_run: it is only said what would go."""

    older_s: Annotated[float, Field(ge=0, le=1e10)] = 86400.0
    dry_run: bool = False


class StopBody(Body):
    """if_idle: only if there is no device, and no attach runs."""

    if_idle: bool = False


# -- answers ---


class Answer(BaseModel):
    """Base of all: every key is named here."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """kind: what the one who gets it has to do, see tierblk/errors.py. hint: the way out. exit_code: of a
    command that ends with it."""

    kind: Annotated[str, Field(json_schema_extra={"enum": sorted(KINDS)})]
    message: str
    hint: str | None
    exit_code: Annotated[int, Field(ge=1, le=8)]


class ErrorAnswer(Answer):
    """Every answer whose status is 400 or above."""

    error: Error


class Latency(Answer):
    """How many requests, and how long, in microseconds, so many percent of them took at most."""

    requests: Count
    p50_us: float | None
    p99_us: float | None
    p99_9_us: Annotated[float | None, Field(alias="p99.9_us")]


class Latencies(Answer):
    """By tier. Those of writes and flushes are there for devices that have them."""

    hit: Latency | None = None
    zero: Latency | None = None
    miss: Latency | None = None
    memory: Latency | None = None
    write: Latency | None = None
    flush: Latency | None = None


class WriteBack(Answer):
    """How far a volume in object storage is behind what was written."""

    url: str
    epoch: Count
    epoch_at: UnixTime | None
    dirty_bytes: Count
    dirty_since: UnixTime | None
    uploading: bool
    sealed_bytes: Count
    sent_bytes: Count
    sending: Count
    uploaded_bytes: Count
    fullness: float | None = None
    max_dirty_bytes: Count | None
    epochs: Count
    put_requests: Count
    put_bytes: Count
    durability: Literal["local", "remote"]
    held: bool
    fenced: str | None
    trouble: str | None
    trouble_since: UnixTime | None
    next_try_s: float | None


class WaitingDevice(Answer):
    """A device that this daemon could not take over, or not yet: nobody serves it, and who uses it waits."""

    name: str
    path: str
    size_bytes: Count
    state: str
    reason: str | None
    url: str | None
    validator: str | None
    config_path: str
    recovery: bool
    read_only: bool
    attached: UnixTime
    recovered: UnixTime | None
    warnings: list[str]


class Device(WaitingDevice):
    """A device that is served. state: ok, degraded, refused, fenced; starting, recovering, stopping, stopped,
    handed over, gone. Counts are since the daemon began to serve it."""

    plane: Literal["copy", "zero-copy"]
    latencies: Latencies
    hit_bytes: Count
    zero_bytes: Count
    miss_bytes: Count
    requests: Count
    hit_requests: Count
    zero_requests: Count
    miss_requests: Count
    errors: Count
    slot_errors: Count
    active: Count
    waiting: Count
    oldest_wait_ms: Count
    enters: Count
    bounced: Count
    memory_requests: Count
    write_requests: Count
    write_bytes: Count
    partial_writes: Count
    space_waits: Count
    paced: Count
    yielded: Count
    flush_requests: Count
    flush_records: Count
    flush_commits: Count
    discard_requests: Count
    discard_bytes: Count
    fetched_bytes: Count
    remote_requests: Count
    remote_retries: Count
    remote_errors: Count
    remote_waiting: Count
    cached_bytes: Count
    volume: Literal["scratch", "local", "write-back"] | None
    volume_bytes: Count
    since: UnixTime | None
    next_try_s: float | None
    queues: Annotated[int, Field(ge=1, le=64)]
    queue_depth: Annotated[int, Field(ge=1, le=1024)]
    hot_memory_bytes: Count
    on_outage: str
    write_back: WriteBack | None = None


class Devices(Answer):
    """In the order of their attachment."""

    devices: list[Device | WaitingDevice]


class CachedLayer(Answer):
    """What the cache holds of an image or a volume."""

    layer_id: Count
    kind: str
    name: str | None
    url: str | None
    size_bytes: Count
    cached_bytes: Count


class CommitFailure(Answer):
    """Why the index cannot be written. final: only a restart helps."""

    reason: str
    since: UnixTime
    final: bool


class CacheCounts(Answer):
    """The engine's counters, in slots and blocks, beside what is named."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]

    session: Count
    layers: list[CachedLayer]
    commit_failure: CommitFailure | None


class NoCounts(Answer):
    """Of a cache that is not open yet, or no longer."""


class Throttle(Answer):
    """How writes that need a new slot are slowed down."""

    reason: Literal["upload", "slots"]
    bytes_per_s: Count


class DaemonInfo(Answer):
    """The daemon and its cache directory. fills: blocks that are being filled."""

    pid: Annotated[int, Field(ge=1)]
    started: UnixTime
    cache_dir: str
    config_path: str
    cache: CacheCounts | NoCounts
    fills: Count
    slot_write_failure: str | None
    throttle: Throttle | None
    warnings: list[str]


class EvictedBytes(Answer):
    """dirty_bytes: stay, since nobody else has them; busy_bytes: stay, since they were in use."""

    layer_id: LayerId
    evicted_bytes: Count
    dirty_bytes: Count
    busy_bytes: Count


class Pinned(Answer):
    """pins: [offset, length] in bytes, all of the layer."""

    layer_id: LayerId
    pins: list[Range]


class Dropped(Answer):
    """How many pages went. busy_blocks: were in use, so nothing of them went."""

    layer_id: LayerId
    dropped_pages: Count
    busy_blocks: list[Count]


class UnusedLayer(Answer):
    """An image that nobody uses. used_unix_s: when somebody did."""

    layer_id: LayerId
    what: str
    validator: str
    used_unix_s: Count
    cached_bytes: Count


class Collected(Answer):
    """What went, or would."""

    layers: list[UnusedLayer]
    cached_bytes: Count


class Detached(Answer):
    """warning: what the user has to know about what is left, if anything is."""

    detached: str
    warning: str | None


class Stopping(Answer):
    """stopping: false when it was only to stop if idle, and is not. The process ends when all has stopped."""

    stopping: bool
