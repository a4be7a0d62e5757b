"""A host with an ext4 on a volume in object storage dies again and again, half the time with its cache: what
any host finds then is a filesystem, not older than the last epoch (DESIGN 8; LSVD's own test).

TIERBLK_HOSTS_LOST=N: so many rounds, TIERBLK_SEED: other ones.
TIERBLK_HOSTS_LOST_S3=1: the store is no folder but SeaweedFS in the guest, of whose Python it is part.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.device_rig import RUN
from tests.vm.guest.helpers import Tierblk, run
from tests.vm.guest.test_device_survives import end_for_good
from tests.vm.guest.test_write_back import config_of

WITH_S3 = bool(os.environ.get("TIERBLK_HOSTS_LOST_S3"))
SEED = int(os.environ.get("TIERBLK_SEED", "301"))
ROUNDS = int(os.environ.get("TIERBLK_HOSTS_LOST", "2"))
KEYS = {"volume__size": "128MiB", "volume__epoch_interval": "200ms", "cache_size": "64MiB"}


@pytest.fixture
def store(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The keys that say where the volume is."""
    if not WITH_S3:
        yield {}
        return
    from tests.integration.seaweed import CREDENTIALS, SeaweedServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CREDENTIALS.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS.secret_key)
    with SeaweedServer(scratch / "seaweed", volumes=200) as server:
        yield {"volume__url": server.url("lost"), "store__endpoint": server.settings.endpoint}


class Writer:
    """Makes files, syncs some; `safe` are those that an epoch has."""

    def __init__(self, folder: Path, tierblk: Tierblk, seed: int) -> None:
        self.safe: dict[str, str] = {}
        self._written: dict[str, str] = {}
        self._folder = folder
        self._tierblk = tierblk
        self._chance = random.Random(seed)
        self._seed = seed
        self.stopped = threading.Event()

    def work(self) -> None:
        """Until the device ends in errors."""
        number = 0
        try:
            while not self.stopped.is_set():
                data = self._chance.randbytes(self._chance.choice([100, 5000, 300_000]))
                path = self._folder / f"{self._seed}-{number % 40}"
                name = path.name
                self._written.pop(name, None)
                self.safe.pop(name, None)
                path.write_bytes(data)
                self._written[name] = hashlib.sha256(data).hexdigest()
                number += 1
                if number % 15 == 0:
                    os.sync()
                    there = dict(self._written)
                    self._tierblk.run("sync", "lost", "--wait")
                    self.safe |= {name: there[name] for name in there.keys() & self._written.keys()}
        except (OSError, AssertionError):
            return


def die(cache: Path, tierblk: Tierblk, folder: Path) -> None:
    """Nothing of the host's runs any more, and its device is gone."""
    end_for_good(cache)
    tierblk.run("detach", "--force", "lost")
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True, timeout=60)


def test_a_filesystem_outlives_its_hosts(scratch: Path, tierblk: Tierblk, store: dict[str, Any]) -> None:
    folder = scratch / "mounted"
    folder.mkdir()
    config = config_of(tierblk, "lost", scratch, "host", **KEYS, **store)
    device = tierblk.attach(config)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", device)
    chance = random.Random(SEED)
    safe: dict[str, str] = {}
    for number in range(ROUNDS):
        run("mount", device, folder)
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*-*")}
        assert {name: found.get(name) for name in safe} == safe, f"round {number}"
        writer = Writer(folder, tierblk, seed=SEED + number)
        thread = threading.Thread(target=writer.work)
        thread.start()
        threading.Event().wait(chance.uniform(1.0, 4.0))
        die(scratch / "host", tierblk, folder)
        writer.stopped.set()
        thread.join(timeout=120)
        assert not thread.is_alive()
        # A name that is written anew when it dies may be the old file, the new one, or half of it.
        safe |= writer.safe
        loses_cache = number % 2 == 0
        if loses_cache:
            shutil.rmtree(scratch / "host")
            for left in RUN.glob("*/daemon.json"):  # a host that is lost has no run directory either
                shutil.rmtree(left.parent)
        words: list[str | Path] = ["attach", config, *(["--take-over"] if loses_cache else [])]
        device = Path(tierblk.run(*words).stdout.split()[0])
        run("mount", device, folder)  # the journal is played back
        run("umount", folder)
        run("e2fsck", "-f", "-n", device)
        print(f"round {number}: {len(safe)} files are safe", flush=True)
    tierblk.run("detach", "lost")
