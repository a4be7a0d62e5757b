"""Volumes in object storage behind real devices: two caches on one machine are two hosts, a folder is the
store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.device_rig import MIB
from tests.vm.guest.helpers import Tierblk, WebServer, mounted, on_newest, on_oldest, run, wait_until
from tests.vm.guest.test_device_filesystems import FIO_LIMIT_S, fill, sums
from tests.vm.guest.test_device_planes import HAS_ZERO_COPY
from tests.vm.guest.test_device_writes import BASE_BYTES, VOLUME_BYTES, Direct, change_at_random


def config_of(
    tierblk: Tierblk, name: str, scratch: Path, host: str, url: str | None = None, **keys: Any
) -> Path:
    """A volume in scratch/store, cached in the folder of a host."""
    wanted: dict[str, Any] = {"volume__mode": "write-back", "volume__url": f"file://{scratch}/store", **keys}
    return tierblk.config(name, url, scratch / host, wanted.pop("cache_size", "32MiB"), **wanted)


@pytest.mark.parametrize("plane", ["zero-copy"] if HAS_ZERO_COPY else ["copy"])
def test_what_is_written_here_is_read_there(
    plane: str, scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("far.raw", BASE_BYTES, seed=201)
    keys = {"device__plane": plane, "volume__size": f"{VOLUME_BYTES}B", "volume__compression": "zstd"}
    a = config_of(tierblk, "far-a", scratch, "a", web.url_of(image), **keys)
    device = tierblk.attach(a)
    model = bytearray(image.read_bytes().ljust(VOLUME_BYTES, b"\0"))
    change_at_random(device, model, seed=202, steps=30)
    tierblk.run("sync", "far-a", "--wait")
    change_at_random(device, model, seed=203, steps=30)
    status = tierblk.status("far-a")
    assert (status["volume"], status["errors"], status["write_back"]["fenced"]) == ("write-back", 0, None)
    assert status["write_back"]["epoch"] >= 2
    tierblk.run("detach", "far-a")
    b = config_of(tierblk, "far-b", scratch, "b", web.url_of(image), **keys)
    device = tierblk.attach(b)
    direct = Direct(device)
    assert direct.read(0, VOLUME_BYTES) == bytes(model)
    direct.close()
    change_at_random(device, model, seed=204, steps=30)
    tierblk.run("detach", "far-b")
    device = tierblk.attach(a)
    direct = Direct(device)
    assert direct.read(0, VOLUME_BYTES) == bytes(model)
    direct.close()
    tierblk.run("detach", "far-a")


@on_newest
def test_a_filesystem_outlives_the_cache_and_a_killed_daemon(scratch: Path, tierblk: Tierblk) -> None:
    """The cache is half of what is written; the daemon is killed while it uploads."""
    keys = {"volume__size": "256MiB", "volume__epoch_interval": "500ms", "cache_size": "48MiB"}
    a = config_of(tierblk, "fs-a", scratch, "a", **keys)
    device, folder = tierblk.attach(a), scratch / "mounted"
    run("mkfs.ext4", "-q", "-F", device)
    with mounted(device, folder):
        written = fill(folder, seed=211, files=40)
        pid = tierblk.json("status")["daemons"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        more = folder / "more"
        more.mkdir()
        (more / "file-x").write_bytes(os.urandom(20 * MIB))
        os.sync()
        written |= sums(folder)
        assert sums(folder) == written
        run("fstrim", folder)
    wait_until(lambda: tierblk.status("fs-a")["state"] == "ok", 60, lambda: str(tierblk.status("fs-a")))
    run("e2fsck", "-f", "-n", device)
    tierblk.run("detach", "fs-a")
    shutil.rmtree(scratch / "a")
    b = config_of(tierblk, "fs-b", scratch, "b", **keys)
    device = tierblk.attach(b)
    run("e2fsck", "-f", "-n", device)
    with mounted(device, folder):
        assert sums(folder) == written
    tierblk.run("detach", "fs-b")


@on_newest
def test_fio_verifies_through_a_cache_that_is_smaller(scratch: Path, tierblk: Tierblk) -> None:
    keys = {"volume__size": "40MiB", "volume__epoch_interval": "1s", "cache_size": "16MiB"}
    device = tierblk.attach(config_of(tierblk, "fio", scratch, "a", **keys))
    job = ["--name=v", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--iodepth=16"]
    job += ["--rw=randwrite", "--bsrange=4k-64k", "--bs_unaligned=0", "--size=40M", "--verify=crc32c"]
    job += ["--verify_fatal=1", "--do_verify=1", "--randseed=221", "--fsync=256"]
    done = subprocess.run(["fio", *job], capture_output=True, text=True, timeout=FIO_LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    status = tierblk.status("fio")
    assert status["errors"] == 0
    assert status["remote_requests"] > 0, "what was evicted came back from the store"
    tierblk.run("detach", "fio")


@on_oldest
def test_a_second_host_is_refused_and_then_takes_over(scratch: Path, tierblk: Tierblk) -> None:
    keys = {"volume__size": "16MiB", "volume__epoch_interval": "300ms"}
    device = tierblk.attach(config_of(tierblk, "one", scratch, "a", **keys))
    direct = Direct(device)
    direct.write(0, b"1" * 4096)
    tierblk.run("sync", "one", "--wait")
    b = config_of(tierblk, "two", scratch, "b", **keys)
    refused = tierblk.run("attach", b, check=False)
    assert refused.returncode == 5, refused
    assert "is held by" in refused.stderr
    assert "--take-over" in refused.stderr
    other = Path(tierblk.run("attach", b, "--take-over").stdout.split()[0])
    second = Direct(other)
    assert second.read(0, 4096) == b"1" * 4096
    direct.write(4096, b"x" * 4096)
    wait_until(lambda: tierblk.status("one")["state"] == "fenced", 60, lambda: str(tierblk.status("one")))
    assert "another host has taken it over" in tierblk.status("one")["reason"]
    with pytest.raises(OSError, match="Input/output error"):
        direct.write(8192, b"y" * 4096)
    assert direct.read(0, 4096) == b"1" * 4096
    direct.close()
    second.close()
    tierblk.run("detach", "two")
    assert "stay in the cache directory" in tierblk.run("detach", "one").stderr
    refused = tierblk.run("attach", config_of(tierblk, "one", scratch, "a", **keys), check=False)
    assert refused.returncode == 6, refused
    assert "--discard-local" in refused.stderr
    again = Path(tierblk.run("attach", tierblk._folder / "one.toml", "--discard-local").stdout.split()[0])
    direct = Direct(again)
    assert direct.read(0, 8192) == b"1" * 4096 + bytes(4096)
    direct.close()
    tierblk.run("detach", "one")
