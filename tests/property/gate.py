"""A commit cycle that a test holds at its points, or lets fail, and of which it sees what becomes durable."""

from __future__ import annotations

import os
import threading
import time
from errno import EIO
from typing import Any

from tests.property.host import Host
from tierblk.cache import Cache
from tierblk.cache.index import NO_VOLUMES
from tierblk.errors import CacheError

POINTS = ("rows taken", "slots synced", "sums synced", "rows written")
FAILURES = ("slots", "sums", "rows")
TIMEOUT_S = 20.0


class Gate:
    """Sits in the committer's thread, between the steps of a cycle."""

    def __init__(self, host: Host, cache: Cache) -> None:
        self._host = host
        self.hold: str | None = None  # the point where the next cycle waits
        self.failing: str | None = None  # the step of the next cycle that fails
        self.held = threading.Event()
        self.open = False  # nothing is held any more: the session ends
        self._go = threading.Event()
        committer, index = cache.committer, cache._index
        write_rows = index.write_rows

        def sync(name: str, point: str) -> Any:
            def sync_file(descriptor: int) -> None:
                if name == "slots":
                    self._reach("rows taken")
                if self.open:
                    return
                assert os.path.samestat(os.fstat(descriptor), os.stat(host.directory / name))
                self._fail(name, OSError(EIO, "Input/output error"))
                host.durable[name] = host.content(name)  # what lands while the sync runs is not covered
                self._reach(point)

            return sync_file

        def write(rows: Any, journaled: int | None = None, volumes: Any = NO_VOLUMES) -> tuple[int, int]:
            self._fail("rows", CacheError("the index is full"))
            result = write_rows(rows, journaled, volumes)
            for layer_id, copies in rows.items():
                kept = host.rows.setdefault(layer_id, {})
                kept.update(copies)
                for row in [row for row, packed in kept.items() if not packed]:
                    del kept[row]
            self._reach("rows written")
            return result

        committer.sync_slots, committer.sync_sums = sync("slots", "slots synced"), sync("sums", "sums synced")
        index.write_rows = write  # type: ignore[method-assign]

    def let_go(self, failing: str | None = None) -> None:
        """The held cycle goes on, to its end."""
        self.failing = failing
        self.held.clear()
        self._go.set()

    def _reach(self, point: str) -> None:
        if self.hold != point or self.open:
            return
        self.hold = None
        self._go.clear()
        self.held.set()
        deadline = time.monotonic() + TIMEOUT_S
        while not (self._go.wait(0.05) or self.open):
            assert time.monotonic() < deadline, f"nobody let the commit go on from {point!r}"

    def _fail(self, step: str, error: Exception) -> None:
        if self.failing == step:
            self.failing = None
            raise error
