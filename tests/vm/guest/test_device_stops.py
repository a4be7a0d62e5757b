"""Stopping while requests wait for servers that say nothing, stop half-way or are gone: orderly and soon."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from errno import EIO, ENODEV, ENXIO
from pathlib import Path

import pytest

from tests.vm.guest.device_rig import MIB, DaemonProcess, MoodyServer, WaitingReader, devices, moody, read
from tests.vm.guest.helpers import Tierblk, on_oldest, tierblk_processes, wait_until
from tierblk.cli.starting import command

IMAGE_BYTES = 2 * MIB
MOODS = ("silent", "half", "gone")
# Patient settings: left alone, a read would wait for hours. What ends it in a test is the stop.
PATIENT: dict[str, str | int] = {
    "remote__connect_timeout": "10m",
    "remote__read_timeout": "1h",
    "remote__retries": 100,
    "remote__retry_delay": "60s",
}
STOP_LIMIT_S = 60.0
# Where the missing block begins, and a page of it that a half answer does not hold.
COLD_BYTES = MIB + 61440


@pytest.fixture
def servers(make_image: Callable[..., Path]) -> Iterator[dict[str, MoodyServer]]:
    """A server a mood, all still in the right one."""
    content = make_image("stops.raw", IMAGE_BYTES, seed=41).read_bytes()
    with ExitStack() as stack:
        yield {mood: stack.enter_context(moody(content)) for mood in MOODS}


@pytest.fixture
def waiting(
    scratch: Path, tierblk: Tierblk, servers: dict[str, MoodyServer]
) -> dict[str, tuple[Path, WaitingReader]]:
    """A device a mood, all of one daemon, each with a reader that waits for its server in that mood."""
    found = {}
    for mood, server in servers.items():
        device = tierblk.attach(tierblk.config(mood, server.url, scratch / "cache", "16MiB", **PATIENT))
        server.mood = "silent" if mood == "gone" else mood
        found[mood] = device, WaitingReader(device, COLD_BYTES)
    for server in servers.values():
        wait_until(lambda server=server: server.held, 30, "a fetch did not begin")  # type: ignore[misc]
    servers["gone"].gone()
    assert all(reader.waits for _, reader in found.values())
    return found


def test_sigterm_while_requests_wait_leaves_them_to_the_next_daemon_which_may_never_come(
    scratch: Path, tierblk: Tierblk, waiting: dict[str, tuple[Path, WaitingReader]]
) -> None:
    """As a service manager replaces it. Whoever does not want to wait says so."""
    daemon = DaemonProcess(scratch / "cache")
    daemon.signal(signal.SIGTERM)
    daemon.ended(STOP_LIMIT_S)
    assert all(reader.waits for _, reader in waiting.values())
    assert {device["state"] for device in tierblk.json("list")["devices"]} == {"no daemon"}
    for mood in waiting:
        tierblk.run("detach", "--force", mood, limit_s=STOP_LIMIT_S)
    assert [reader.result(5) for _, reader in waiting.values()] == [EIO] * 3
    assert devices() == []


def test_sigint_while_requests_wait_ends_them_with_eio_and_leaves_no_device(
    scratch: Path, tierblk: Tierblk, waiting: dict[str, tuple[Path, WaitingReader]]
) -> None:
    """As Ctrl-C stops it."""
    daemon = DaemonProcess(scratch / "cache")
    daemon.signal(signal.SIGINT)
    daemon.ended(STOP_LIMIT_S)
    assert [reader.result(5) for _, reader in waiting.values()] == [EIO] * 3
    assert devices() == []


def test_stop_while_requests_wait_ends_them_with_eio_and_leaves_no_device(
    tierblk: Tierblk, waiting: dict[str, tuple[Path, WaitingReader]]
) -> None:
    """The command returns when all is gone."""
    tierblk.run("stop", limit_s=STOP_LIMIT_S)
    assert [reader.result(5) for _, reader in waiting.values()] == [EIO] * 3
    assert devices() == []


def test_detach_while_requests_wait_is_done_or_refused_soon(
    tierblk: Tierblk, waiting: dict[str, tuple[Path, WaitingReader]]
) -> None:
    """Kernels from 7.0 on can say that the device is open, and then it is left alone; before, only what holds
    it exclusively (a mount) protects it, and its readers get EIO.
    """
    for mood, (device, reader) in waiting.items():
        done = tierblk.run("detach", mood, check=False, limit_s=STOP_LIMIT_S)
        if done.returncode:
            assert done.returncode == 7
            assert f"{mood} ({device}) is in use" in done.stderr
            assert reader.waits
            assert device.exists()
        else:
            assert reader.result(5) in (EIO, ENODEV, ENXIO)
            assert not device.exists()
    tierblk.run("stop", limit_s=STOP_LIMIT_S)
    assert EIO in [reader.result(5) for _, reader in waiting.values()]
    assert devices() == []


def test_detach_when_the_reader_was_killed_and_its_read_ahead_still_waits(
    scratch: Path, tierblk: Tierblk, servers: dict[str, MoodyServer]
) -> None:
    """Nobody wants these bytes any more: detach ends the requests, and the killed process with them."""
    server = servers["silent"]
    device = tierblk.attach(tierblk.config("ahead", server.url, scratch / "cache", "16MiB", **PATIENT))
    server.mood = "silent"
    reader = subprocess.Popen(["cat", str(device)], stdout=subprocess.DEVNULL)
    wait_until(lambda: server.held, 30, "the read-ahead did not begin")
    reader.kill()
    tierblk.run("detach", "ahead", limit_s=STOP_LIMIT_S)
    reader.wait(STOP_LIMIT_S)
    assert devices() == []


@on_oldest
def test_an_attach_that_is_interrupted_leaves_nothing_behind(
    scratch: Path, tierblk: Tierblk, servers: dict[str, MoodyServer]
) -> None:
    """Ctrl-C while its server is silent: no device comes when the server is back, and no daemon that was
    started for it stays."""
    server, cache = servers["silent"], scratch / "cache"
    tierblk.attach(tierblk.config("other", servers["half"].url, cache, "16MiB", **PATIENT))
    before = DaemonProcess(cache).fds()
    nodes = devices()
    server.mood = "silent"
    for name, where in (("same", cache), ("own", scratch / "fresh")):
        config, held = tierblk.config(name, server.url, where, "16MiB", **PATIENT), server.held
        attach = subprocess.Popen(command("attach", str(config)))
        wait_until(lambda held=held: server.held > held, 30, "the server was not asked")  # type: ignore[misc]
        attach.send_signal(signal.SIGINT)
        assert attach.wait(STOP_LIMIT_S) == 130
        wait_until(lambda: len(tierblk_processes()) == 2, 30, lambda: f"left: {tierblk_processes()}")
    assert not (scratch / "fresh").exists()
    wait_until(lambda: DaemonProcess(cache).fds() == before, 30, lambda: f"{DaemonProcess(cache).fds()}")
    server.mood = "right"
    assert devices() == nodes
    assert [device["name"] for device in tierblk.json("list")["devices"]] == ["other"]
    tierblk.attach(tierblk.config("same", server.url, cache, "16MiB", **PATIENT))
    tierblk.run("stop", limit_s=STOP_LIMIT_S)


def test_stop_while_a_process_keeps_the_device_open_does_not_wait_for_it(
    scratch: Path, tierblk: Tierblk, servers: dict[str, MoodyServer]
) -> None:
    """Who holds an old file of it gets errors; the nodes are gone, and the name is free again at once."""
    config = tierblk.config("held", servers["silent"].url, scratch / "cache", "16MiB", **PATIENT)
    device = tierblk.attach(config)
    with open(device, "rb", buffering=0) as held:
        assert len(held.read(4096)) == 4096
        tierblk.run("stop", limit_s=STOP_LIMIT_S)
        assert devices() == []
        with suppress(OSError):
            assert os.preadv(held.fileno(), [bytearray(4096)], MIB) == 0, "a dead disk has no bytes"
        again = tierblk.attach(config)
        assert len(read(again, 0, 4096)) == 4096
    tierblk.run("detach", "held", limit_s=STOP_LIMIT_S)
    assert devices() == []
