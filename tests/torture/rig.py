"""What the runs share: an image, the server that fails as told, the command line, and progress to follow."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.process import FaultProcess, fault_process
from tests.torture.image import write_image
from tests.vm.guest.helpers import Tierblk
from tierblk.cache.superblock import COPIES, COPY_BYTES, choose
from tierblk.cli.starting import log_path
from tierblk.rundir import run_root

MIB = 1 << 20
SAY_EACH_S = 10.0
NAME = "torture"
# A fault that ends nothing by itself should not cost half a minute each time. And all that a device can have
# takes part.
BRISK: dict[str, str | int | float] = {
    "remote__connect_timeout": "3s",
    "device__queues": 2,
    "device__hot_memory": "1MiB",
    "remote__read_timeout": "5s",
    "remote__retry_delay": "20ms",
}


@dataclass
class Rig:
    """A folder of this run, an image that a server in a process of its own shows, and the command line."""

    folder: Path
    image: Path
    server: FaultProcess
    tierblk: Tierblk

    @property
    def cache_dir(self) -> Path:
        """The cache directory of the run."""
        return self.folder / "cache"

    @property
    def maps_dir(self) -> Path:
        """Where the block maps of this cache are, once a daemon has begun."""
        with (self.cache_dir / "slots").open("rb") as slots:
            copies = [slots.read(COPY_BYTES) for _ in range(COPIES)]
        found, _ = choose(copies, str(self.cache_dir))
        return run_root() / str(found.uuid) / "maps"

    def attach(self, cache_bytes: int, **settings: str | int | float) -> Path:
        """The device, with a cache of that size; settings as in Tierblk.config."""
        config = self.tierblk.config(
            NAME, self.server.url, self.cache_dir, f"{cache_bytes // MIB}MiB", **{**BRISK, **settings}
        )
        return self.tierblk.attach(config)

    def attach_again(self) -> Path:
        """The device, by the same config."""
        return self.tierblk.attach(self.folder / "configs" / f"{NAME}.toml")

    def status(self) -> dict[str, Any]:
        """All that `status` tells: of the device, and of the daemon."""
        told = self.tierblk.json("status")
        return {"device": told["devices"][0], "daemon": told["daemons"][0]}

    def log(self) -> str:
        """What the daemons of this cache logged."""
        path = log_path(self.cache_dir)
        return path.read_text(errors="replace") if path.exists() else ""


@contextmanager
def rig(folder: Path, images: Path, size_bytes: int, seed: int, *server_options: str) -> Iterator[Rig]:
    """Everything that a run needs, stopped and removed afterwards. folder: on a real filesystem."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    image = images / f"torture-{seed}.raw"
    write_image(image, size_bytes, seed)
    tierblk = Tierblk(folder / "configs")
    try:
        with fault_process(image, "--seed", str(seed), *server_options) as server:
            try:
                yield Rig(folder, image, server, tierblk)
            finally:
                tierblk.stop_all()
    finally:
        image.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    """A line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def put_summary(summary: dict[str, Any], path: Path | None) -> None:
    """Prints the summary, and writes it to a file if there is one."""
    text = json.dumps(summary, indent=1)
    print(text, flush=True)
    if path is not None:
        path.write_text(text + "\n")
