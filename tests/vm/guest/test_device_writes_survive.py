"""Daemons die under writers: no error reaches them, and no completed write is lost, flushed or not (R1)."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.device_rig import DaemonProcess, wait_for_status
from tests.vm.guest.helpers import Tierblk, mounted, run
from tests.vm.guest.test_device_planes import PLANES
from tests.vm.guest.test_device_survives import daemon_again

KILLS = int(os.environ.get("TIERBLK_KILLS", "3"))
"""Of each kind; 60 of them are two minutes."""
KILLS_FEW = KILLS < 10
PACE_S = 2.0
FIO_LIMIT_S = 200


class Files:
    """Writes files without pause, some of them synced; `check` knows what must be there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._sums: dict[str, str] = {}
        self._trouble: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        chance, number = random.Random(5), 0
        while not self._over.is_set():
            number += 1
            name, data = f"file-{number % 60}", chance.randbytes(chance.choice([3000, 40_000, 300_000]))
            try:
                with open(self._folder / name, "wb") as file:
                    file.write(data)
                    if number % 3 == 0:
                        file.flush()
                        os.fsync(file.fileno())
            except OSError as error:
                self._trouble.append(f"{name}: {error}")
                return
            self._sums[name] = hashlib.sha256(data).hexdigest()

    def end(self) -> dict[str, str]:
        """The sums of what was written."""
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a writer waits for ever"
        assert self._trouble == []
        return self._sums


# On the old kernel there is but one plane.
@pytest.mark.parametrize("plane", PLANES[-1:] if KILLS_FEW else PLANES)
def test_kill_9_under_writers_is_a_pause(plane: str, scratch: Path, tierblk: Tierblk) -> None:
    cache = scratch / "cache"
    keys: dict[str, Any] = {"device__plane": plane, "volume__mode": "local", "cache__commit_interval": "1s"}
    fio_device = tierblk.attach(
        tierblk.config("raw", None, cache, "256MiB", volume__size="64MiB", device__queues=2, **keys)
    )
    ext4_device = tierblk.attach(tierblk.config("ext4", None, cache, "256MiB", volume__size="128MiB", **keys))
    run("mkfs.ext4", "-q", "-F", ext4_device)
    folder = scratch / "mounted"
    job = [
        "fio", "--name=verify", f"--filename={fio_device}", "--rw=randrw", "--direct=1", "--ioengine=libaio",
        "--iodepth=8", "--bssplit=512/10:4k/60:64k/30", "--size=64m", "--verify=crc32c",
        "--verify_backlog=32", "--fsync=100", "--randseed=121", "--time_based",
        f"--runtime={int(KILLS * PACE_S * 1.5) + 10}",
    ]  # fmt: skip
    with mounted(ext4_device, folder):
        files = Files(folder)
        fio = subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=scratch)
        for _ in range(KILLS):
            before_s = time.monotonic()
            daemon = DaemonProcess(cache)
            daemon.signal(signal.SIGKILL)
            daemon.ended(30)
            daemon_again(cache, daemon.pid)
            while (left_s := PACE_S - (time.monotonic() - before_s)) > 0:
                assert fio.poll() is None, fio.communicate()[0]
                time.sleep(min(left_s, 0.2))  # the pace is what is asked for
        said, _ = fio.communicate(timeout=FIO_LIMIT_S)
        assert fio.returncode == 0, said
        written = files.end()
    run("e2fsck", "-f", "-n", ext4_device)
    with mounted(ext4_device, folder):
        found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in written}
        assert found == written
    for name in ("raw", "ext4"):
        now = wait_for_status(tierblk, name, lambda now: now["state"] == "ok")
        assert now["recovered"] >= now["attached"]
    tierblk.run("stop")
