"""What can be seen of a real device while it is used: top, metrics, the heat map, and the looks into its
cache, which agree with each other and with the device."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vm.guest.device_rig import MIB
from tests.vm.guest.helpers import Tierblk, WebServer
from tests.vm.guest.test_device_writes import Direct
from tests.vm.guest.test_write_back import config_of

SIZE_BYTES = 48 * MIB


def sample(text: str, name: str, *labels: str) -> float:
    """The value of the one sample of that name with these labels."""
    found = [
        line
        for line in text.splitlines()
        if line.startswith(f"{name}{{") and all(label in line for label in labels)
    ]
    assert len(found) == 1, found
    return float(found[0].rsplit(" ", 1)[1])


def said(tierblk: Tierblk, *words: str) -> Any:
    return json.loads(tierblk.run("cache", *words, "--json").stdout)


def test_all_that_looks_agrees(
    scratch: Path, web: WebServer, tierblk: Tierblk, make_image: Callable[..., Path]
) -> None:
    image = make_image("seen.raw", SIZE_BYTES, seed=601)
    script = "label: gpt\nsize=16MiB, type=linux, name=first\ntype=linux, name=second\n"
    subprocess.run(["sfdisk", "-q", image], input=script.encode(), check=True, timeout=60)
    config = config_of(
        tierblk, "seen", scratch, "h", web.url_of(image), cache_size="64MiB", volume__epoch_interval="1h"
    )
    device = tierblk.attach(config)
    direct = Direct(device)
    direct.read(2 * MIB, 4 * MIB)
    direct.write(8 * MIB, os.urandom(MIB))
    direct.sync()
    tierblk.run("sync", "seen", "--wait")
    direct.write(9 * MIB, os.urandom(2 * MIB))
    direct.sync()

    status = tierblk.status("seen")
    assert status["write_back"]["dirty_bytes"] == 2 * MIB
    top = json.loads(tierblk.run("top", "--once", "--json", "--interval", "200ms").stdout)
    (shown,) = top["devices"]
    assert (shown["name"], shown["state"]) == ("seen", "ok")
    text = tierblk.run("metrics").stdout
    assert sample(text, "tierblk_volume_dirty_bytes", 'device="seen"') == 2 * MIB
    assert sample(text, "tierblk_device_written_bytes_total", 'device="seen"') == 3 * MIB
    assert "Traceback" not in tierblk.run("top", "--once").stdout

    drawn = said(tierblk, "map", "seen")
    assert drawn["total"]["dirty_bytes"] == 2 * MIB
    assert drawn["total"]["volume_bytes"] + drawn["total"]["stored_bytes"] == MIB
    assert [part["number"] for part in drawn["partitions"]] == [1, 2]
    picture = scratch / "seen.svg"
    tierblk.run("cache", "map", "seen", "--svg", str(picture))
    assert picture.read_text().startswith("<")
    stat = said(tierblk, "stat", "seen")
    assert stat["state"] == "served"
    layers = said(tierblk, "ls", "seen")["layers"]
    assert {layer["kind"] for layer in layers} == {"base", "write-back"}
    assert said(tierblk, "verify", "seen")["ok"]
    dumped = scratch / "dumped"
    with dumped.open("wb") as file:
        words = [sys.executable, "-m", "tierblk", "cache", "dump", "seen", "8MiB+3MiB", "--raw"]
        subprocess.run(words, stdout=file, check=True, timeout=60)
    want = hashlib.sha256(direct.read(8 * MIB, 3 * MIB)).hexdigest()
    assert hashlib.sha256(dumped.read_bytes()).hexdigest() == want
    direct.close()
    tierblk.run("detach", "seen")
    assert said(tierblk, "stat", str(scratch / "h"))["state"] in ("ended", "served")
