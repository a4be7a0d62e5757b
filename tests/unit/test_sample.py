"""What a daemon tells `tierblk top`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tierblk import sample
from tierblk.errors import CacheError, RemoteRefused, RemoteUnavailable, TierblkError
from tierblk.far import FarVolume
from tierblk.latency import by_tier
from tierblk.stacks import Stacks
from tierblk.volumes import Volumes


def filled(url: str, state: str = "ok", **more: Any) -> SimpleNamespace:
    """A layer that is fetched, as far as a sample looks at it."""
    counters = SimpleNamespace(in_flight=2, fetched_bytes=4096, requests=3, retries=1, errors=0)
    health = {"state": state, "since": None, "reason": None, "next_try_s": None, "waiting": 0}
    fetcher = SimpleNamespace(counters=counters)
    identity = SimpleNamespace(shown=url)
    image = SimpleNamespace(identity=identity)
    return SimpleNamespace(fetcher=fetcher, health=lambda: health, image=image, shown=url, **more)


def test_counts_come_without_the_empty_buckets_at_their_ends() -> None:
    device = {"name": "a", "state": "ok"}
    counts = {"a": by_tier([([0, 3, 0, 1, 0, 0], 9), ([0, 0], 0), ([5], 1)], 1e-9)}
    found = sample.document({"pid": 7, "cache": {"free": 3}}, [device], counts, 1e-9, None, [])
    assert found["devices"] == [
        device | {"tick_s": 1e-9, "latency_counts": {"hit": [0, 3, 0, 1], "zero": [], "miss": [5]}}
    ]
    assert found["daemon"] == {"pid": 7}
    assert found["cache"] == {"free": 3, "throttle": None}
    assert found["monotonic_s"] > 0


def test_a_device_that_nobody_serves_has_no_counts() -> None:
    found = sample.document({}, [{"name": "a"}], {}, 1e-9, {"reason": "slots", "bytes_per_s": 1}, [])
    assert found["devices"][0]["latency_counts"] == {}
    assert found["cache"]["throttle"]["reason"] == "slots"


def writer(trouble: TierblkError | None) -> SimpleNamespace:
    sender = SimpleNamespace(trouble=trouble, trouble_since=100.0, next_try_s=2.5)
    return SimpleNamespace(sender=sender)


@pytest.mark.parametrize(
    ("trouble", "state"),
    [
        (None, "ok"),
        (RemoteUnavailable("s3://b/v does not answer"), "degraded"),
        (RemoteRefused("s3://b/v answers 403"), "refused"),
        (CacheError("an epoch cannot be made: the disk"), "ok"),
    ],
)
def test_a_store_that_takes_nothing_is_not_ok_although_it_can_be_read(
    trouble: TierblkError | None, state: str
) -> None:
    far = filled("s3://b/v", name="d", layer=SimpleNamespace(layer_id=4))
    volumes = Volumes.__new__(Volumes)
    volumes.by_layer = {4: cast(FarVolume, far)}
    volumes._writers = cast(Any, {4: writer(trouble)})
    base = filled("http://h/x", patiences={"e": 0.0, "d": 1.0})
    stacks = SimpleNamespace(bases=SimpleNamespace(by_layer={1: base}), volumes=volumes)
    image, store = sample.remotes(cast(Stacks, stacks))
    assert (image["kind"], image["url"], image["devices"]) == ("image", "http://h/x", ["d", "e"])
    assert (store["kind"], store["url"], store["devices"]) == ("store", "s3://b/v", ["d"])
    assert store["state"] == state
    if state != "ok":
        assert (store["reason"], store["since"], store["next_try_s"]) == (str(trouble), 100.0, 2.5)
    assert image["requests"] == 3
