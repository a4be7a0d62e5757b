"""What `tierblk top` makes of two samples: rates, percentiles, and what becomes of who is silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from bench.top import sample
from tierblk.cli.top_counters import Since
from tierblk.cli.top_model import ENDED_KEEP_S, HISTORY_ROUNDS, Answer, Model, Picture
from tierblk.cli.top_upload import UploadMeter


def document(
    at_s: float, *, name: str = "a", pid: int = 1, counters: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A sample of a daemon with one device whose counters are all 0 but for these."""
    kinds = ("hit", "zero", "miss", "write", "flush", "discard")
    device = {
        "name": name,
        "path": f"/dev/{name}",
        "state": "ok",
        "attached": 5.0,
        "recovered": None,
        "tick_s": 1e-9,
        "latency_counts": {},
        **{f"{kind}_requests": 0 for kind in kinds},
        **{f"{kind}_bytes": 0 for kind in ("hit", "zero", "miss", "write", "fetched")},
        **(counters or {}),
    }
    return {
        "unix_s": 1e9 + at_s,
        "monotonic_s": at_s,
        "daemon": {"pid": pid, "started": pid, "cache_dir": "/c"},
        "cache": {"slots": 100, "free": 10, "dirty_slots": 20, "quarantined": 3, "bad": 0, "evicted": 0},
        "devices": [device],
        "remotes": [],
    }


class Rounds:
    """Rounds of a model whose only daemon, in "run", is asked every second."""

    def __init__(self) -> None:
        self.model = Model()
        self.now_s = 100.0

    def __call__(self, said: dict[str, Any] | None, error: str = "") -> Picture:
        self.now_s += 1
        answers = [Answer("run", "/c", 1, said, error)]
        return self.model.update(answers, now_s=self.now_s, unix_s=self.now_s)

    def nobody(self, orphans: list[dict[str, Any]] | None = None) -> Picture:
        """A round in which there is no socket."""
        self.now_s += 1
        return self.model.update([], orphans or [], now_s=self.now_s, unix_s=self.now_s)


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


def test_the_first_round_has_levels_and_no_rates(rounds: Rounds) -> None:
    shown = rounds(document(10, counters={"hit_requests": 5000, "waiting": 3, "oldest_wait_ms": 250}))
    (device,) = shown.devices
    assert (device.iops, device.read_bytes_per_s, device.hit_percent, device.latencies) == (
        None,
        None,
        None,
        {},
    )
    assert (device.waiting, device.oldest_wait_ms, device.interval_s) == (3, 250, None)
    assert device.history == ()
    (cache,) = shown.caches
    assert (cache.size_bytes, cache.free_bytes, cache.quarantined_bytes) == (6553600, 655360, 196608)


def test_rates_are_over_the_daemons_own_time(rounds: Rounds) -> None:
    rounds(document(10))
    counters = {
        "hit_requests": 30,
        "write_requests": 10,
        "hit_bytes": 900,
        "miss_bytes": 100,
        "write_bytes": 40,
    }
    (device,) = rounds(document(14, counters=counters)).devices
    assert device.interval_s == 4
    assert device.iops == 10
    assert device.requests_per_s["write"] == 2.5
    assert (device.read_bytes_per_s, device.write_bytes_per_s) == (250, 10)
    assert device.hit_percent == 90
    assert [moment.iops for moment in device.history] == [10]


def test_a_hit_ratio_never_rounds_up_to_100(rounds: Rounds) -> None:
    rounds(document(1))
    (device,) = rounds(document(2, counters={"hit_bytes": 10**9, "miss_bytes": 1})).devices
    assert device.hit_percent == 99.9


def test_percentiles_are_of_the_interval_alone(rounds: Rounds) -> None:
    """Slow once, quick now: a mean since the attachment would go on being slow."""
    slow, quick = [0] * 60 + [1000], [0] * 20 + [100]
    rounds(document(1, counters={"latency_counts": {"hit": slow}}))
    both = [*quick, *slow[len(quick) :]]
    (device,) = rounds(document(3, counters={"latency_counts": {"hit": both, "miss": []}})).devices
    assert set(device.latencies) == {"hit"}
    tier = device.latencies["hit"]
    assert tier.requests_per_s == 50
    assert tier.p50_us == tier.p999_us == round((5 << 5) / 1000, 1)  # the end of bucket 20, in ticks of 1 ns


def reborn(document: dict[str, Any]) -> None:
    document["daemon"] = {"pid": 2, "started": 2, "cache_dir": "/c"}


def back(document: dict[str, Any]) -> None:
    document["devices"][0]["hit_requests"] = 3


def attached_anew(document: dict[str, Any]) -> None:
    document["devices"][0]["attached"] = 77.0


def recovered(document: dict[str, Any]) -> None:
    document["devices"][0]["recovered"] = 77.0


def no_time(document: dict[str, Any]) -> None:
    document["monotonic_s"] = 10


@pytest.mark.parametrize("change", [reborn, back, attached_anew, recovered, no_time])
def test_no_rate_is_ever_negative(rounds: Rounds, change: Callable[[dict[str, Any]], None]) -> None:
    counts = {"latency_counts": {"hit": [9, 9]}}
    rounds(document(10, counters={"hit_requests": 500, **counts}))
    after = document(11, counters={"hit_requests": 600, **counts})
    change(after)
    (device,) = rounds(after).devices
    assert "hit" not in device.requests_per_s
    again = document(12, pid=after["daemon"]["pid"], counters={**after["devices"][0], "hit_requests": 700})
    (device,) = rounds(again).devices
    assert device.requests_per_s["hit"] > 0


def test_a_latency_count_that_went_back_has_no_percentile(rounds: Rounds) -> None:
    rounds(document(10, counters={"latency_counts": {"hit": [9, 9], "miss": [1]}}))
    (device,) = rounds(document(11, counters={"latency_counts": {"hit": [9, 8], "miss": [2]}})).devices
    assert set(device.latencies) == {"miss"}


def test_a_device_that_comes_has_rates_from_its_second_sample(rounds: Rounds) -> None:
    rounds(document(1))
    assert [d.name for d in rounds(document(2, name="b", counters={"hit_requests": 10**6})).devices] == ["b"]
    (device,) = rounds(document(3, name="b", counters={"hit_requests": 10**6 + 8})).devices
    assert device.iops == 8


def test_who_is_silent_keeps_the_last_numbers_marked_as_old(rounds: Rounds) -> None:
    rounds(document(1))
    rounds(document(2, counters={"hit_requests": 70}))
    for silent_s in (0, 1, 2):
        shown = rounds(None, "its daemon (pid 1) does not answer")
        (cache,), (device,) = shown.caches, shown.devices
        assert (cache.state, cache.silent_s, cache.error) == (
            "silent",
            silent_s,
            "its daemon (pid 1) does not answer",
        )
        assert (device.state, device.stale, device.iops) == ("silent", True, 70)
    shown = rounds(document(12, counters={"hit_requests": 170}))
    assert (shown.caches[0].state, shown.devices[0].stale) == ("ok", False)
    assert shown.devices[0].iops == 10  # over the ten seconds that passed
    assert len(shown.devices[0].history) == 2


def test_who_has_never_answered_is_shown_all_the_same(rounds: Rounds) -> None:
    shown = rounds(None, "its daemon does not answer")
    assert [cache.state for cache in shown.caches] == ["silent"]
    assert shown.devices == ()


def test_who_has_ended_is_shown_for_a_while(rounds: Rounds) -> None:
    rounds(document(1))
    shown = rounds.nobody()
    assert (shown.caches[0].state, shown.devices[0].state, shown.devices[0].stale) == ("ended", "ended", True)
    rounds.now_s += ENDED_KEEP_S
    assert rounds.nobody() == Picture(rounds.now_s)


def test_a_device_that_waits_for_a_daemon_is_shown_once(rounds: Rounds) -> None:
    rounds(document(1))
    orphan = {"name": "a", "path": "/dev/a", "state": "no daemon", "reason": "its daemon has ended"}
    shown = rounds.nobody([orphan])
    assert [(device.name, device.state, device.stale) for device in shown.devices] == [
        ("a", "no daemon", False)
    ]


def test_a_daemon_that_comes_back_begins_anew(rounds: Rounds) -> None:
    rounds(document(1, counters={"hit_requests": 10**6}))
    rounds.nobody()
    shown = rounds(document(3, pid=2, counters={"hit_requests": 4}))
    assert (shown.caches[0].state, shown.devices[0].iops) == ("ok", None)


def test_a_history_is_bounded_and_knows_where_it_begins(rounds: Rounds) -> None:
    for second in range(HISTORY_ROUNDS + 11):
        shown = rounds(document(second, counters={"hit_requests": second}))
    (device,) = shown.devices
    assert (len(device.history), device.history_first) == (HISTORY_ROUNDS, 10)


@pytest.mark.parametrize(
    "broken", [{"devices": [7, {}]}, {"devices": [{"name": 5, "waiting": "x"}]}, {"cache": 3}]
)
def test_an_answer_of_another_version_is_no_traceback(rounds: Rounds, broken: dict[str, Any]) -> None:
    for _ in range(2):
        shown = rounds({**document(1), **broken})
    assert json.dumps(shown.to_dict())


def test_state_of_a_cache(rounds: Rounds) -> None:
    said = document(1)
    said["cache"]["throttle"] = {"reason": "upload", "bytes_per_s": 1000}
    (cache,) = rounds(said).caches
    assert (cache.state, cache.throttle_reason, cache.throttle_bytes_per_s) == ("slowed", "upload", 1000)
    said["cache"]["commit_failure"] = {"reason": "no space", "since": 1e9 - 4, "final": False}
    (cache,) = rounds(said).caches
    assert (cache.state, cache.commit_failure, cache.commit_failed_s) == ("failing", "no space", 5.0)


def test_remotes_have_rates_and_ages(rounds: Rounds) -> None:
    remote = {"kind": "image", "url": "http://h/x", "devices": ["a"], "state": "degraded", "since": 1e9 - 9}
    remote |= {
        "next_try_s": 0.5,
        "fetched_bytes": 100,
        "requests": 1,
        "retries": 0,
        "errors": 0,
        "waiting": 2,
    }
    rounds(document(1) | {"remotes": [remote]})
    (shown,) = rounds(document(3) | {"remotes": [remote | {"fetched_bytes": 300, "requests": 5}]}).remotes
    assert (shown.bytes_per_s, shown.requests_per_s, shown.for_s, shown.waiting) == (100, 2, 12, 2)


def test_names_choose_devices_with_what_they_use() -> None:
    model = Model()
    answers = [Answer(str(n), f"/c{n}", n, sample(n, 1.0)) for n in (0, 1)]
    shown = model.update(answers, now_s=1.0, unix_s=1.0)
    only = shown.only(["web-*", "db-primary"])
    assert {device.name.split("-")[0] for device in only.devices} == {"web", "db"}
    assert [cache.cache_dir for cache in only.caches] == ["/c0"]
    assert {remote.kind for remote in only.remotes} == {"image", "store"}
    assert shown.only([]) is shown


def upload(meter: UploadMeter, at: tuple[float, int, bool], before: tuple[float, int, bool] | None) -> Any:
    def far(uploaded: int, uploading: bool) -> dict[str, Any]:
        return {
            "dirty_bytes": 1000,
            "sent_bytes": 200,
            "sealed_bytes": 900,
            "uploaded_bytes": uploaded,
            "uploading": uploading,
            "dirty_since": 40.0,
            "put_bytes": uploaded // 2,
        }

    now = far(at[1], at[2])
    if before is None:
        return meter.measure(Since(now, None, 0), 50.0)
    return meter.measure(Since(now, far(before[1], before[2]), at[0] - before[0]), 50.0)


def test_an_upload_is_measured_over_the_time_that_it_runs() -> None:
    """Objects arrive whole, and pauses between epochs are no slowness."""
    meter = UploadMeter()
    rounds = [(0.0, 0, True), (1.0, 0, True), (2.0, 0, True), (3.0, 300, True), (4.0, 400, False)]
    shown = upload(meter, rounds[0], None)
    assert (shown.state, shown.bytes_per_s, shown.drained_in_s, shown.dirty_s) == ("sending", None, None, 10)
    speeds = [upload(meter, now, before).bytes_per_s for before, now in pairwise(rounds)]
    assert speeds == [None, None, 100, 100]
    idle = upload(meter, (9.0, 400, False), (4.0, 400, False))
    assert (idle.state, idle.bytes_per_s, idle.drained_in_s) == ("waits", None, None)
    shown = upload(meter, (10.0, 500, True), (9.0, 400, True))
    assert (shown.bytes_per_s, shown.drained_in_s, shown.put_bytes_per_s) == (100, 8, 50)


def test_a_speed_forgets_what_was_long_ago() -> None:
    meter = UploadMeter()
    uploaded = 0
    for second in range(1, 101):
        before, uploaded = uploaded, uploaded + (1000 if second <= 50 else 10)
        shown = upload(meter, (float(second), uploaded, True), (second - 1.0, before, True))
    assert shown.bytes_per_s == 10


@pytest.mark.parametrize(
    ("far", "state"),
    [
        ({"fenced": "another host writes it"}, "fenced"),
        ({"trouble": "no answer", "uploading": True}, "stuck"),
        ({"uploading": True}, "sending"),
        ({"dirty_bytes": 1}, "waits"),
        ({}, "clean"),
    ],
)
def test_state_of_an_upload(far: dict[str, Any], state: str) -> None:
    shown = UploadMeter().measure(Since(far, None, 0), 0.0)
    assert shown.state == state
    assert shown.drained_in_s is None
