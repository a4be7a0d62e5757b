"""The device stays: its daemon is killed, replaced, frozen or out of memory, and who reads it only waits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO, ENODEV, ENXIO
from pathlib import Path

import pytest

from tests.vm.guest.device_rig import (
    IMPATIENT,
    MIB,
    RUN,
    DaemonProcess,
    WaitingReader,
    compare_whole,
    devices,
    extents,
    image_bytes,
    log_of,
    moody,
    read,
    wait_for_status,
)
from tests.vm.guest.helpers import Tierblk, WebServer, on_newest, on_oldest, wait_until

IMAGE_BYTES = 8 * MIB
BACK_S = 60.0
NODES = ["ublkb0", "ublkc0"]
# A server that does not answer is noticed soon, and waited for.
WAITING = IMPATIENT | {"device__on_outage": "wait"}


class Load:
    """Readers that compare without pause; `check` says what they met."""

    def __init__(self, device: Path, image: Path, threads: int = 3) -> None:
        self.reads = 0
        self._troubles: list[str] = []
        self._over = threading.Event()
        self._wanted = image_bytes(image)
        self._threads = [
            threading.Thread(target=self._run, args=(device, number), daemon=True)
            for number in range(threads)
        ]
        for each in self._threads:
            each.start()

    def _run(self, device: Path, seed: int) -> None:
        while not self._over.is_set():
            for offset, length in extents(len(self._wanted), 40, seed + self.reads, direct=bool(seed % 2)):
                try:
                    if (
                        read(device, offset, length, direct=bool(seed % 2))
                        != self._wanted[offset : offset + length]
                    ):
                        self._troubles.append(f"wrong bytes: {offset=} {length=}")
                except OSError as error:
                    self._troubles.append(f"{error} {offset=} {length=}")
                self.reads += 1
                if self._over.is_set() or self._troubles:
                    return

    def goes_on(self) -> None:
        """Returns when a few more reads have ended, or one of them badly."""
        before = self.reads
        wait_until(
            lambda: self.reads > before + 10 or self._troubles, BACK_S, "no read comes back from the device"
        )
        assert self._troubles == []

    def end(self) -> None:
        """No reader runs any more. AssertionError names an error or a wrong byte."""
        self._over.set()
        for each in self._threads:
            each.join(BACK_S)
            assert not each.is_alive(), "a reader waits for ever"
        assert self._troubles == []


@contextmanager
def load(device: Path, image: Path) -> Iterator[Load]:
    """Readers for the length of a block."""
    readers = Load(device, image)
    try:
        readers.goes_on()
        yield readers
    finally:
        readers.end()


def daemon_again(cache: Path, old_pid: int) -> DaemonProcess:
    """The daemon that the keeper started after the one of that process."""
    found: list[DaemonProcess] = []

    def there() -> bool:
        try:
            daemon = DaemonProcess(cache)
        except (AssertionError, OSError, ValueError):
            return False
        found.append(daemon)
        return daemon.pid != old_pid

    wait_until(there, BACK_S, lambda: f"no other daemon came:\n{log_of(cache)}")
    return found[-1]


def records() -> list[str]:
    """Of all devices."""
    return sorted(path.name for path in RUN.glob("*/devices/*"))


def test_kill_9_under_load_is_a_pause_and_nothing_is_fetched_twice(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """The keeper starts the next daemon; path, name and bytes are as before, and so is the cache."""
    image = make_image("kept.raw", IMAGE_BYTES, seed=51)
    cache = scratch / "cache"
    config = tierblk.config("kept", web.url_of(image), cache, "16MiB", cache__commit_interval="10m")
    device = tierblk.attach(config)
    compare_whole(device, image)
    wait_for_status(tierblk, "kept", lambda now: now["cached_bytes"] == IMAGE_BYTES)
    asked = len(web.requests("/kept.raw"))
    with load(device, image) as readers:
        for _ in range(3):
            daemon = DaemonProcess(cache)
            daemon.signal(signal.SIGKILL)
            daemon.ended(30)
            readers.goes_on()
            daemon_again(cache, daemon.pid)
    now = wait_for_status(tierblk, "kept", lambda now: now["state"] == "ok")
    assert now["path"] == str(device)
    assert now["recovered"] >= now["attached"]
    assert (now["errors"], now["fetched_bytes"]) == (0, 0)
    assert devices() == NODES
    assert len(web.requests("/kept.raw")) == asked
    assert "was ended by SIGKILL (9)" in log_of(cache)


@contextmanager
def small_run_directory() -> Iterator[None]:
    """RUN has a few MiB of its own."""
    RUN.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(RUN)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(RUN)], check=True)


@on_oldest
def test_a_run_directory_that_is_full_is_a_pause(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """The next daemon cannot tell where it is, so it ends, and leaves what it took over as it was."""
    image = make_image("full.raw", IMAGE_BYTES, seed=65)
    with small_run_directory(), image_bytes(image) as wanted:
        device = tierblk.attach(tierblk.config("full", web.url_of(image), scratch / "cache", "16MiB"))
        daemon = DaemonProcess(scratch / "cache")
        with suppress(OSError), open(RUN / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        daemon.signal(signal.SIGKILL)
        daemon.ended(30)
        reader = WaitingReader(device, MIB)
        words = "cannot make the control socket"
        wait_until(lambda: words in log_of(scratch / "cache"), BACK_S, lambda: log_of(scratch / "cache"))
        (RUN / "filler").unlink()
        assert reader.result(BACK_S) == wanted[MIB : MIB + 4096]
        assert tierblk.status("full")["path"] == str(device)
        tierblk.run("stop")


def test_readers_that_wait_for_the_remote_wait_on_when_the_daemon_is_killed(
    scratch: Path, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Their requests go to the next daemon, which asks the server again."""
    image = make_image("inflight.raw", IMAGE_BYTES, seed=52)
    cache = scratch / "cache"
    with moody(image.read_bytes()) as server, image_bytes(image) as wanted:
        device = tierblk.attach(tierblk.config("inflight", server.url, cache, "16MiB", **WAITING))
        server.mood = "half"
        offsets = [at * MIB + MIB // 2 + 61440 for at in (2, 3, 4)]
        readers = [WaitingReader(device, offset) for offset in offsets]
        wait_until(lambda: server.held >= 3, 30, "the fetches did not begin")
        DaemonProcess(cache).signal(signal.SIGKILL)
        server.mood = "right"
        assert [reader.result(BACK_S) for reader in readers] == [wanted[at : at + 4096] for at in offsets]


@pytest.mark.parametrize("queues", [1, 2])
def test_sigterm_hands_the_device_over_to_the_next_attach(
    queues: int, scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """As an upgrade does it: the daemon ends clean, its device waits, the next one goes on."""
    image = make_image("handed.raw", IMAGE_BYTES, seed=53)
    cache = scratch / "cache"
    config = tierblk.config("handed", web.url_of(image), cache, "16MiB", device__queues=queues)
    device = tierblk.attach(config)
    compare_whole(device, image, limit_bytes=IMAGE_BYTES // 2)
    with load(device, image) as readers:
        daemon = DaemonProcess(cache)
        daemon.signal(signal.SIGTERM)
        daemon.ended(30)
        assert devices() == NODES
        (listed,) = tierblk.json("list")["devices"]
        assert (listed["name"], listed["state"]) == ("handed", "no daemon")
        assert tierblk.attach(config) == device
        readers.goes_on()
    starts = [line for line in log_of(cache).splitlines() if " serving " in line]
    assert len(starts) == 2
    assert starts[-1].endswith("(clean start)")
    assert tierblk.status("handed")["errors"] == 0


@on_oldest
def test_a_keeper_told_so_replaces_the_daemon(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """SIGHUP to the keeper, as after an upgrade."""
    image = make_image("replaced.raw", IMAGE_BYTES, seed=54)
    cache = scratch / "cache"
    device = tierblk.attach(tierblk.config("replaced", web.url_of(image), cache, "16MiB"))
    with load(device, image) as readers:
        daemon = DaemonProcess(cache)
        os.kill(keeper_of(daemon.pid), signal.SIGHUP)
        daemon.ended(30)
        daemon_again(cache, daemon.pid)
        readers.goes_on()
    assert tierblk.status("replaced")["path"] == str(device)


def keeper_of(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_daemon_that_froze_and_is_killed_comes_back(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """SIGSTOP, then SIGKILL."""
    image = make_image("frozen.raw", IMAGE_BYTES, seed=55)
    cache = scratch / "cache"
    device = tierblk.attach(tierblk.config("frozen", web.url_of(image), cache, "16MiB"))
    with load(device, image) as readers:
        daemon = DaemonProcess(cache)
        daemon.signal(signal.SIGSTOP)
        stalled = WaitingReader(device, MIB + 512)
        daemon.signal(signal.SIGKILL)
        daemon.ended(30)
        assert len(stalled.result(BACK_S)) == 4096  # type: ignore[arg-type]
        readers.goes_on()


@on_newest
def test_a_daemon_that_ran_out_of_memory_comes_back(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """A control group with less memory than it has; the keeper is outside, as the system's OOM killer leaves
    it.
    """
    image = make_image("hungry.raw", IMAGE_BYTES, seed=56)
    cache = scratch / "cache"
    device = tierblk.attach(tierblk.config("hungry", web.url_of(image), cache, "16MiB"))
    root = Path("/sys/fs/cgroup")
    if not (root / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(root)], check=True)
    (root / "cgroup.subtree_control").write_text("+memory")
    group = root / "hungry"
    group.mkdir()
    with load(device, image) as readers:
        daemon = DaemonProcess(cache)
        (group / "cgroup.procs").write_text(str(daemon.pid))
        (group / "memory.oom.group").write_text("1")
        (group / "memory.max").write_text("64K")
        # Whatever it allocates next is too much; a question makes it do so.
        wait_until(
            lambda: tierblk.run("status", "--timeout", "1s", check=False) and is_dead(daemon.pid),
            BACK_S,
            lambda: (group / "memory.events").read_text(),
        )
        assert "oom_kill 0" not in (group / "memory.events").read_text()
        daemon_again(cache, daemon.pid)
        readers.goes_on()
    wait_until(lambda: not (group / "cgroup.procs").read_text(), 10, "somebody is still in the group")
    group.rmdir()


def is_dead(pid: int) -> bool:
    """Whether the process has ended."""
    return not Path(f"/proc/{pid}").exists()


def test_detach_force_ends_readers_that_wait_for_the_remote(
    scratch: Path, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """on_outage = "wait" is for ever, until somebody says so; status has said what waits and since when."""
    image = make_image("forced.raw", IMAGE_BYTES, seed=57)
    with moody(image.read_bytes()) as server:
        config = tierblk.config("forced", server.url, scratch / "cache", "16MiB", **WAITING)
        device = tierblk.attach(config)
        server.mood = "silent"
        reader = WaitingReader(device, 5 * MIB)
        now = wait_for_status(tierblk, "forced", lambda now: now["state"] == "degraded")
        assert now["waiting"] >= 1
        assert now["oldest_wait_ms"] > 0
        assert now["since"]
        assert reader.waits
        said = tierblk.run("status", "forced").stdout
        assert "because" in said
        assert "waiting" in said
        tierblk.run("detach", "--force", "forced", limit_s=30)
        assert reader.result(10) in (EIO, ENODEV, ENXIO)
        assert devices() == []
        assert records() == []


@on_newest
def test_a_read_waits_as_long_as_on_outage_says_and_one_that_waits_goes_on_by_itself(
    scratch: Path, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Two devices of one image: one gives up after its seconds, the other gets its bytes later."""
    image = make_image("outage.raw", IMAGE_BYTES, seed=64)
    cache = scratch / "cache"
    with moody(image.read_bytes()) as server, image_bytes(image) as wanted:
        some = tierblk.config(
            "some", server.url, cache, "16MiB", **WAITING | {"device__on_outage": "wait 2s"}
        )
        ever = tierblk.config("ever", server.url, cache, "16MiB", **WAITING)
        devices_of = {config.stem: tierblk.attach(config) for config in (some, ever)}
        server.mood = "silent"
        began_s = time.monotonic()
        readers = {name: WaitingReader(device, 5 * MIB) for name, device in devices_of.items()}
        assert readers["some"].result(30) == EIO
        assert time.monotonic() - began_s >= 2
        assert readers["ever"].waits
        server.mood = "right"
        assert readers["ever"].result(30) == wanted[5 * MIB : 5 * MIB + 4096]


def test_detach_force_needs_no_daemon(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Its readers wait in the kernel; the record is all that is left of the daemon."""
    image = make_image("alone.raw", IMAGE_BYTES, seed=58)
    cache = scratch / "cache"
    device = tierblk.attach(tierblk.config("alone", web.url_of(image), cache, "16MiB"))
    end_for_good(cache)
    reader = WaitingReader(device, 0)
    refused = tierblk.run("detach", "alone", check=False)
    assert refused.returncode == 7
    assert "waits for a daemon" in refused.stderr
    tierblk.run("detach", "--force", "alone", limit_s=30)
    assert reader.result(10) in (EIO, ENODEV, ENXIO)
    assert devices() == []


def end_for_good(cache: Path) -> None:
    """Keeper and daemon are killed."""
    daemon = DaemonProcess(cache)
    os.kill(keeper_of(daemon.pid), signal.SIGKILL)
    daemon.signal(signal.SIGKILL)
    daemon.ended(30)


@on_oldest
def test_reap_deletes_what_the_dead_left_and_nothing_of_the_living(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """One daemon is dead for good, another one lives."""
    image = make_image("reaped.raw", IMAGE_BYTES, seed=59)
    dead = tierblk.attach(tierblk.config("dead", web.url_of(image), scratch / "one", "16MiB"))
    alive = tierblk.attach(tierblk.config("alive", web.url_of(image), scratch / "two", "16MiB"))
    end_for_good(scratch / "one")
    dry = tierblk.run("reap", "--dry-run")
    assert f"would delete {dead}" in dry.stdout
    assert len(devices()) == 4
    done = tierblk.json("reap")
    assert [device["path"] for device in done["reaped"]] == [str(dead)]
    assert [device["path"] for device in done["left"]] == [str(alive)]
    assert devices() == [alive.name, alive.name.replace("ublkb", "ublkc")]
    assert len(read(alive, 0, 4096)) == 4096
    assert tierblk.json("reap")["reaped"] == []


@on_newest
def test_repin_shows_the_new_version_under_the_same_path(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """Refused while it is held, and without a server; then the new bytes, and the new size."""
    image = make_image("pinned.raw", IMAGE_BYTES, seed=60)
    device = tierblk.attach(
        tierblk.config("pinned", web.url_of(image), scratch / "cache", "16MiB", **IMPATIENT)
    )
    compare_whole(device, image)
    make_image("pinned.raw", 2 * IMAGE_BYTES, seed=61)
    held = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    assert tierblk.run("repin", "pinned", check=False).returncode == 7
    os.close(held)
    web.stop()
    assert tierblk.run("repin", "pinned", check=False).returncode == 4
    assert tierblk.status("pinned")["size_bytes"] == IMAGE_BYTES
    assert len(read(device, 0, 4096)) == 4096, "it goes on as before"
    web.start()
    assert tierblk.run("repin", "pinned").stdout.split() == [str(device)]
    compare_whole(device, image)
    assert tierblk.status("pinned")["size_bytes"] == 2 * IMAGE_BYTES


def test_a_device_without_recovery_goes_with_its_daemon(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """By SIGTERM in order; by SIGKILL its node is deleted by the next daemon."""
    image = make_image("gone.raw", IMAGE_BYTES, seed=62)
    cache = scratch / "cache"
    config = tierblk.config("gone", web.url_of(image), cache, "16MiB", device__recovery=False)
    tierblk.attach(config)
    assert records() == []
    daemon = DaemonProcess(cache)
    daemon.signal(signal.SIGTERM)
    daemon.ended(30)
    assert devices() == []
    device = tierblk.attach(config)
    daemon = DaemonProcess(cache)
    daemon.signal(signal.SIGKILL)
    daemon.ended(30)
    words = "left behind by a daemon that was killed"
    wait_until(lambda: words in log_of(cache), BACK_S, lambda: f"{devices()}\n{log_of(cache)}")
    assert devices() == []
    assert tierblk.attach(config) == device
    compare_whole(device, image)


@on_oldest
def test_a_server_that_is_silent_holds_up_neither_attach_nor_stop(
    scratch: Path, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    """An attach that waits for it ends when the daemon is stopped, and the daemon does not wait."""
    image = make_image("mute.raw", IMAGE_BYTES, seed=63)
    cache = scratch / "cache"
    with moody(image.read_bytes()) as server:
        good = tierblk.config("good", server.url, cache, "16MiB", **WAITING)
        tierblk.attach(good)
        server.mood = "silent"
        again = tierblk.config(
            "again", server.url, cache, "16MiB", **(WAITING | {"remote__read_timeout": "1h"})
        )
        waits = tierblk.begin("attach", again)
        wait_until(lambda: server.held, 30, "the server was not asked")
        daemon = DaemonProcess(cache)
        daemon.signal(signal.SIGINT)
        daemon.ended(10)
        assert waits.finish(60).returncode != 0
    assert devices() == []
