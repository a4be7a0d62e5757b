"""What `tierblk top` shows, made of what daemons said: rates and percentiles of the time between two samples
(tierblk/sample.py). Pure.

A sample has the daemon's own stamps, so rates are right however late it came. Whose counters went back, or
whose daemon is another one, has no rates until its next sample. Who does not answer keeps the last numbers,
marked as stale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from tierblk.cli.top_counters import Document, Since, dicts, number, opt_number, text
from tierblk.cli.top_upload import Upload, UploadMeter
from tierblk.extent import BLOCK_BYTES
from tierblk.latency import TIERS, Latencies

ENDED_KEEP_S = 60.0
"""How long a daemon that has ended is still shown."""
HISTORY_ROUNDS = 600
_KINDS = ("hit", "zero", "miss", "write", "flush", "discard")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a daemon said in a round; run_dir tells daemons apart. sample: None when it said nothing.
    error: why it said
    nothing; "": it did answer."""

    run_dir: str
    cache_dir: str
    pid: int
    sample: Document | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Tier:
    """Requests of one tier in the interval, and how long they took."""

    requests_per_s: float
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None


@dataclass(frozen=True, slots=True)
class Moment:
    """One interval of a device, for its history."""

    iops: float
    read_bytes_per_s: float
    write_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device. Rates are None without an interval; hit_percent also when nothing was read."""

    name: str
    path: str
    cache_dir: str
    run_dir: str
    state: str
    reason: str | None
    for_s: float | None
    stale: bool
    volume: str | None
    url: str | None
    plane: str | None
    size_bytes: int
    interval_s: float | None
    iops: float | None
    requests_per_s: dict[str, float]
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    fetched_bytes_per_s: float | None
    hit_percent: float | None
    latencies: dict[str, Tier]
    waiting: int
    oldest_wait_ms: int
    errors: int
    errors_per_s: float | None
    paced_per_s: float | None
    space_waits_per_s: float | None
    upload: Upload | None
    history: tuple[Moment, ...] = ()
    history_first: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """The same device from round to round."""
        return self.run_dir, self.name


@dataclass(frozen=True, slots=True)
class CacheView:
    """A daemon and its cache directory. state: "ok", "slowed", "failing", "silent" or "ended"."""

    cache_dir: str
    run_dir: str
    pid: int
    state: str
    error: str | None
    silent_s: float | None
    interval_s: float | None
    size_bytes: int
    free_bytes: int
    dirty_bytes: int
    quarantined_bytes: int
    bad_bytes: int
    evicted_bytes_per_s: float | None
    throttle_reason: str | None
    throttle_bytes_per_s: int | None
    commit_failure: str | None
    commit_failed_s: float | None

    @property
    def stale(self) -> bool:
        """Its numbers are old."""
        return self.state in ("silent", "ended")


@dataclass(frozen=True, slots=True)
class RemoteView:
    """An image's server, or the store of a volume, as one daemon sees it."""

    url: str
    kind: str
    cache_dir: str
    devices: tuple[str, ...]
    state: str
    reason: str | None
    for_s: float | None
    next_try_s: float | None
    waiting: int
    stale: bool
    bytes_per_s: float | None
    requests_per_s: float | None
    retries_per_s: float | None
    errors_per_s: float | None


@dataclass(frozen=True, slots=True)
class Picture:
    """All of them at one time."""

    unix_s: float
    caches: tuple[CacheView, ...] = ()
    devices: tuple[DeviceView, ...] = ()
    remotes: tuple[RemoteView, ...] = ()

    def only(self, names: Collection[str]) -> Picture:
        """Devices whose name is one of these, or fits one as a pattern of the shell, and what they use. A
        daemon that has told nothing yet may be theirs."""
        if not names:
            return self
        devices = tuple(d for d in self.devices if any(fnmatchcase(d.name, name) for name in names))
        used, shown = {device.run_dir for device in devices}, {device.name for device in devices}
        return replace(
            self,
            caches=tuple(c for c in self.caches if c.run_dir in used or c.error),
            devices=devices,
            remotes=tuple(remote for remote in self.remotes if shown.intersection(remote.devices)),
        )

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        document = asdict(self)
        for device in document["devices"]:
            del device["history"], device["history_first"]
        return document


class History:
    """Of a device: the last HISTORY_ROUNDS moments; first: the number of the first of them."""

    def __init__(self) -> None:
        self.moments: deque[Moment] = deque(maxlen=HISTORY_ROUNDS)
        self.first = 0

    def add(self, moment: Moment) -> None:
        """The newest."""
        self.first += len(self.moments) == HISTORY_ROUNDS
        self.moments.append(moment)


class _Source:
    """One daemon, from round to round."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.sample: Document = {}
        self.before: Document = {}
        self.silent_at_s: float | None = None
        self.ended_at_s: float | None = None
        self.histories: dict[str, History] = {}
        self.meters: dict[str, UploadMeter] = {}
        self.devices: tuple[DeviceView, ...] = ()
        self.remotes: tuple[RemoteView, ...] = ()

    def take(self, answer: Answer, now_s: float) -> None:
        """What it said, or that it said nothing."""
        self.answer, self.ended_at_s = answer, None
        if answer.sample is not None:
            self.before, self.sample = self.sample, answer.sample
            self.devices = tuple(self._device(device) for device in dicts(self.sample, "devices"))
            self.remotes = tuple(self._remote(remote) for remote in dicts(self.sample, "remotes"))
            known = {device.name for device in self.devices}
            for kept in (self.histories, self.meters):
                for name in kept.keys() - known:
                    del kept[name]
        if not answer.error:
            self.silent_at_s = None
        elif self.silent_at_s is None:
            self.silent_at_s = now_s

    def _since(self, now: Document, before: Document | None) -> Since:
        """From one document of this daemon's sample to the same of the sample before."""
        daemons = [dict_of(sample, "daemon") for sample in (self.sample, self.before)]
        same = all(daemons[0].get(key) == daemons[1].get(key) for key in ("pid", "started"))
        elapsed_s = number(self.sample, "monotonic_s") - number(self.before, "monotonic_s")
        return Since(now, before if same else None, elapsed_s)

    def _device(self, now: Document) -> DeviceView:
        name, unix_s = text(now, "name") or "?", number(self.sample, "unix_s")
        before = next((d for d in dicts(self.before, "devices") if d.get("name") == name), None)
        if before is not None and any(before.get(key) != now.get(key) for key in ("attached", "recovered")):
            before = None
        since = self._since(now, before)
        rates = {kind: since.rate(f"{kind}_requests") for kind in _KINDS}
        known = {kind: rate for kind, rate in rates.items() if rate is not None}
        iops = sum(known.values()) if known else None
        read, write = since.rate("hit_bytes", "miss_bytes", "zero_bytes"), since.rate("write_bytes")
        history = self.histories.setdefault(name, History())
        if iops is not None:
            history.add(Moment(iops, read or 0.0, write or 0.0))
        upload = None
        if far := dict_of(now, "write_back"):
            meter = self.meters.setdefault(name, UploadMeter())
            upload = meter.measure(self._since(far, dict_of(before or {}, "write_back") or None), unix_s)
        started = opt_number(now, "since")
        return DeviceView(
            name=name,
            path=text(now, "path") or "",
            cache_dir=self.answer.cache_dir,
            run_dir=self.answer.run_dir,
            state=text(now, "state") or "?",
            reason=text(now, "reason"),
            for_s=None if started is None else max(0.0, unix_s - started),
            stale=False,
            volume=text(now, "volume"),
            url=text(now, "url"),
            plane=text(now, "plane"),
            size_bytes=int(number(now, "size_bytes")),
            interval_s=since.elapsed_s if since.counts else None,
            iops=iops,
            requests_per_s=known,
            read_bytes_per_s=read,
            write_bytes_per_s=write,
            fetched_bytes_per_s=since.rate("fetched_bytes"),
            hit_percent=_hit_percent(since),
            latencies=_latencies(since),
            waiting=int(number(now, "waiting")),
            oldest_wait_ms=int(number(now, "oldest_wait_ms")),
            errors=int(number(now, "errors")),
            errors_per_s=since.rate("errors"),
            paced_per_s=since.rate("paced"),
            space_waits_per_s=since.rate("space_waits"),
            upload=upload,
            history=tuple(history.moments),
            history_first=history.first,
        )

    def _remote(self, now: Document) -> RemoteView:
        same = ("kind", "url")
        before = next(
            (r for r in dicts(self.before, "remotes") if all(r.get(key) == now.get(key) for key in same)),
            None,
        )
        since, started = self._since(now, before), opt_number(now, "since")
        devices = now.get("devices")
        return RemoteView(
            url=text(now, "url") or "?",
            kind=text(now, "kind") or "?",
            cache_dir=self.answer.cache_dir,
            devices=tuple(map(str, devices)) if isinstance(devices, list) else (),
            state=text(now, "state") or "?",
            reason=text(now, "reason"),
            for_s=None if started is None else max(0.0, number(self.sample, "unix_s") - started),
            next_try_s=opt_number(now, "next_try_s"),
            waiting=int(number(now, "waiting")),
            stale=False,
            bytes_per_s=since.rate("fetched_bytes"),
            requests_per_s=since.rate("requests"),
            retries_per_s=since.rate("retries"),
            errors_per_s=since.rate("errors"),
        )

    def cache(self, now_s: float) -> CacheView:
        """As it is now."""
        cache, before = dict_of(self.sample, "cache"), dict_of(self.before, "cache") or None
        since, unix_s = self._since(cache, before), number(self.sample, "unix_s")
        throttle, failure = dict_of(cache, "throttle"), dict_of(cache, "commit_failure")
        state, error = "ok", self.answer.error or None
        if self.ended_at_s is not None:
            state, error = "ended", f"its daemon (pid {self.answer.pid}) has ended"
        elif self.silent_at_s is not None:
            state = "silent"
        elif failure:
            state = "failing"
        elif throttle:
            state = "slowed"
        silent_at_s = self.silent_at_s if self.ended_at_s is None else self.ended_at_s
        evicted = since.rate("evicted")
        slots = {
            key: int(number(cache, key)) * BLOCK_BYTES
            for key in ("slots", "free", "dirty_slots", "quarantined", "bad")
        }
        failed_at = opt_number(failure, "since")
        return CacheView(
            cache_dir=self.answer.cache_dir,
            run_dir=self.answer.run_dir,
            pid=self.answer.pid,
            state=state,
            error=error,
            silent_s=None if silent_at_s is None else max(0.0, now_s - silent_at_s),
            interval_s=since.elapsed_s if since.counts else None,
            size_bytes=slots["slots"],
            free_bytes=slots["free"],
            dirty_bytes=slots["dirty_slots"],
            quarantined_bytes=slots["quarantined"],
            bad_bytes=slots["bad"],
            evicted_bytes_per_s=None if evicted is None else evicted * BLOCK_BYTES,
            throttle_reason=text(throttle, "reason"),
            throttle_bytes_per_s=int(number(throttle, "bytes_per_s")) if throttle else None,
            commit_failure=text(failure, "reason"),
            commit_failed_s=None if failed_at is None else max(0.0, unix_s - failed_at),
        )


class Model:
    """Rounds in, pictures out."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def update(
        self, answers: Iterable[Answer], orphans: Sequence[Document] = (), *, now_s: float, unix_s: float
    ) -> Picture:
        """The picture after a round. answers: one of every daemon that has a socket; who has none any more
        has ended. orphans: devices that no daemon serves, as `status` shows them. now_s: monotonic."""
        heard = {answer.run_dir: answer for answer in answers}
        for run_dir, answer in heard.items():
            source = self._sources.setdefault(run_dir, _Source(answer))
            source.take(answer, now_s)
        for run_dir, source in list(self._sources.items()):
            if run_dir in heard:
                continue
            source.ended_at_s = now_s if source.ended_at_s is None else source.ended_at_s
            if now_s - source.ended_at_s > ENDED_KEEP_S or not source.sample:
                del self._sources[run_dir]
        waiting = [_orphan(document) for document in orphans]
        return self._picture(waiting, now_s, unix_s)

    def _picture(self, waiting: list[DeviceView], now_s: float, unix_s: float) -> Picture:
        sources = sorted(self._sources.values(), key=lambda source: source.answer.cache_dir)
        caches, devices, remotes = [], [], []
        orphaned = {device.path for device in waiting}
        for source in sources:
            cache = source.cache(now_s)
            caches.append(cache)
            devices += [
                replace(device, stale=cache.stale, state=cache.state if cache.stale else device.state)
                for device in source.devices
                if not (cache.state == "ended" and device.path in orphaned)
            ]
            remotes += [replace(remote, stale=cache.stale) for remote in source.remotes]
        return Picture(unix_s, tuple(caches), (*devices, *waiting), tuple(remotes))


def dict_of(document: Document, key: str) -> Document:
    """An object inside one; {} if it is none."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _orphan(document: Document) -> DeviceView:
    """A device that waits for a daemon: nobody counts."""
    source = _Source(Answer("", "", 0))
    return source._device(document)


def _hit_percent(since: Since) -> float | None:
    """Of the bytes that are no zeros. Never rounds up to 100."""
    hit, miss = since.grown("hit_bytes"), since.grown("miss_bytes")
    if hit is None or miss is None or not hit + miss:
        return None
    return int(hit * 1000 // (hit + miss)) / 10


def _latencies(since: Since) -> dict[str, Tier]:
    """Of the tiers that had any request in the interval."""
    tiers = {}
    tick_s = number(since.now, "tick_s")
    for name in TIERS:
        counts = since.grown_counts("latency_counts", name)
        if counts is None or not any(counts):
            continue
        found = Latencies(counts, tick_s)
        percentiles_s = [found.percentile_s(percent) for percent in (50, 90, 99, 99.9)]
        p50, p90, p99, p999 = (None if s is None else round(s * 1e6, 1) for s in percentiles_s)
        tiers[name] = Tier(found.total / since.elapsed_s, p50, p90, p99, p999)
    return tiers
