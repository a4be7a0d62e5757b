"""`tierblk cache export` of real devices: attached and written to, waiting for a daemon, or taken over by
another host."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.vm.guest.device_rig import MIB
from tests.vm.guest.helpers import Tierblk, WebServer
from tests.vm.guest.test_device_survives import end_for_good
from tests.vm.guest.test_device_writes import BASE_BYTES, VOLUME_BYTES, change_at_random
from tests.vm.guest.test_write_back import config_of


def test_a_device_that_is_used_waits_or_is_fenced(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("export.raw", BASE_BYTES, seed=401)
    keys = {"volume__size": f"{VOLUME_BYTES}B"}
    a = config_of(tierblk, "exp", scratch, "a", web.url_of(image), **keys)
    device = tierblk.attach(a)
    model = bytearray(image.read_bytes().ljust(VOLUME_BYTES, b"\0"))
    change_at_random(device, model, seed=402, steps=30)
    tierblk.run("sync", "exp", "--wait")
    change_at_random(device, model, seed=403, steps=20)
    out = scratch / "out.raw"
    for target in ("exp", str(a)):  # by its name and by its config
        tierblk.run("cache", "export", target, str(out), "--replace")
        assert out.read_bytes() == bytes(model)
    end_for_good(scratch / "a")  # its map files are there, and the device waits
    tierblk.run("cache", "export", "exp", str(out), "--replace")
    assert out.read_bytes() == bytes(model)
    b = config_of(tierblk, "exp-b", scratch, "b", web.url_of(image), **keys)
    other = Path(tierblk.run("attach", b, "--take-over").stdout.split()[0])
    change_at_random(other, bytearray(model), seed=404, steps=5)
    tierblk.run("sync", "exp-b", "--wait")
    tierblk.run("cache", "export", str(a), str(out), "--replace")
    assert out.read_bytes() == bytes(model)
    tierblk.run("detach", "exp-b")
    tierblk.run("detach", "--force", "exp")


def test_a_daemon_that_hangs_is_not_needed_for_what_is_cached(scratch: Path, tierblk: Tierblk) -> None:
    config = tierblk.config("exp-h", None, scratch / "h", "32MiB", volume__mode="local", volume__size="8MiB")
    device = tierblk.attach(config)
    model = bytearray(8 * MIB)
    change_at_random(device, model, seed=405, steps=20)
    pid = tierblk.json("status")["daemons"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        out = scratch / "hung.raw"
        tierblk.run("cache", "export", str(config), str(out), "--offline", "--timeout", "1s")
        found = out.read_bytes()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found == bytes(model)
    tierblk.run("detach", "exp-h")
