"""One cache directory, one daemon, one copy of an image, however many devices and commands there are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.vm.guest.device_rig import (
    BLOCK_BYTES,
    MIB,
    DaemonProcess,
    compare_at_random,
    compare_whole,
    devices,
)
from tests.vm.guest.helpers import COMMAND_LIMIT_S, Tierblk, WebServer, on_newest, on_oldest

IMAGE_BYTES = 4 * MIB


@on_oldest
def test_ten_devices_on_one_base_fetch_and_store_each_block_once(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """All ten read everything at the same time; the web server and the cache each see one image (I7)."""
    image = make_image("ten.raw", IMAGE_BYTES, seed=21)
    names = [f"vm{number}" for number in range(10)]
    paths = [
        tierblk.attach(tierblk.config(name, web.url_of(image), scratch / "cache", "16MiB")) for name in names
    ]
    assert len(set(paths)) == 10
    with ThreadPoolExecutor(10) as pool:
        for done in [pool.submit(compare_whole, path, image) for path in paths]:
            done.result()
    sent = [entry.sent_bytes for entry in web.requests("/ten.raw") if entry.range_ != "bytes=0-0"]
    assert sum(sent) == IMAGE_BYTES
    everything = tierblk.json("status")
    cache = everything["daemons"][0]["cache"]
    assert [device["fetched_bytes"] for device in everything["devices"]] == [IMAGE_BYTES] * 10
    assert [layer["cached_bytes"] for layer in cache["layers"]] == [IMAGE_BYTES]
    assert cache["slots"] - cache["free"] - cache["quarantined"] == IMAGE_BYTES // BLOCK_BYTES
    tierblk.run("detach", "vm3")
    compare_whole(paths[4], image)
    assert web.requests("/ten.raw")[-1].range_ != "", "only ranges were asked for"


@on_oldest
def test_attaches_that_race_share_one_daemon_and_one_of_a_name_wins(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Three commands at once on a directory that is not there yet, two of them for the same device."""
    image = make_image("race.raw", IMAGE_BYTES, seed=22)
    one, other = (
        tierblk.config(name, web.url_of(image), scratch / "cache", "16MiB") for name in ("one", "other")
    )
    running = [tierblk.begin("attach", config) for config in (one, other, one)]
    first, second, third = (each.finish(COMMAND_LIMIT_S) for each in running)
    assert second.returncode == 0, second.stderr
    assert sorted((first.returncode, third.returncode)) == [0, 8], first.stderr + third.stderr
    assert "one is attached already" in first.stderr + third.stderr
    everything = tierblk.json("status")
    assert len(everything["daemons"]) == 1
    assert sorted(device["name"] for device in everything["devices"]) == ["one", "other"]
    for device in everything["devices"]:
        compare_at_random(Path(device["path"]), image, count=5, seed=23)


@on_newest
def test_a_device_that_comes_as_the_last_one_of_its_image_goes_can_read(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """The base that both share is closed under neither."""
    image = make_image("handover.raw", IMAGE_BYTES, seed=24)
    here, there = (
        tierblk.config(name, web.url_of(image), scratch / "cache", "16MiB") for name in ("here", "there")
    )
    tierblk.attach(here)
    for seed in range(4):
        going, coming = tierblk.begin("detach", here.stem), tierblk.begin("attach", there)
        came = coming.finish(COMMAND_LIMIT_S)
        went = going.finish(COMMAND_LIMIT_S)
        assert (went.returncode, came.returncode) == (0, 0), went.stderr + came.stderr
        compare_at_random(Path(came.stdout.strip()), image, count=5, seed=seed)
        here, there = there, here


@on_oldest
def test_a_second_daemon_and_a_config_that_disagrees_are_refused_by_name(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """The first daemon's lock (R8), size of the cache and names of devices hold; it goes on unharmed."""
    image = make_image("first.raw", IMAGE_BYTES, seed=24)
    cache = scratch / "cache"
    first = tierblk.config("first", web.url_of(image), cache, "16MiB")
    device = tierblk.attach(first)
    pid = str(DaemonProcess(cache).pid)
    second = tierblk.config("second", web.url_of(image), cache, "16MiB")

    foreground = tierblk.run("attach", "--foreground", second, check=False)
    assert (foreground.returncode, foreground.stdout) == (8, "")
    assert f"(pid {pid}) already runs" in foreground.stderr
    serve = tierblk.run("serve", "--config", second, check=False)
    assert serve.returncode == 6
    assert f"in use by another daemon (pid {pid})" in serve.stderr

    larger = tierblk.config("larger", web.url_of(image), cache, "32MiB")
    disagrees = tierblk.run("attach", larger, check=False)
    assert (disagrees.returncode, disagrees.stdout) == (8, "")
    assert str(first) in disagrees.stderr
    assert str(larger) in disagrees.stderr
    assert "16 MiB" in disagrees.stderr or "16MiB" in disagrees.stderr

    again = tierblk.run("attach", first, check=False)
    assert (again.returncode, again.stdout) == (8, "")
    assert f"first is attached already, as {device}" in again.stderr

    assert devices() == [device.name, device.name.replace("ublkb", "ublkc")]
    compare_whole(device, image)
