"""A cache directory that nobody serves, opened to change something in it: as a daemon opens it, but without
devices, and without a fetch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tierblk.cache import Cache, State, look
from tierblk.config import CacheSettings
from tierblk.core import BLOCK_BYTES, Engine
from tierblk.errors import CacheError
from tierblk.rundir import run_root

_STAGING_BLOCKS = 16


@asynccontextmanager
async def workshop(path: Path, size_bytes: int | None = None) -> AsyncIterator[Cache]:
    """Open, and closed in order behind it; everything that was changed is durable then. size_bytes: how large
    it is to be from now on; None: as it is. CacheError: it is served, waits for a daemon, cannot be opened,
    or has no room to grow."""
    kept_bytes = await asyncio.to_thread(size_of, path)
    size_bytes = size_bytes or kept_bytes
    cache = await asyncio.to_thread(_opened, path, size_bytes)
    try:
        yield cache
    except BaseException:
        await cache.close()
        raise
    await cache.close()


def _opened(path: Path, size_bytes: int) -> Cache:
    # Not validated: a directory that is there may be smaller than one that is to be made.
    settings = CacheSettings.model_construct(dir=Path(os.path.abspath(path)), size=size_bytes)
    return Cache.open(settings, run_root(), partial(Engine, staging_bytes=_STAGING_BLOCKS * BLOCK_BYTES))


def size_of(path: Path) -> int:
    """Bytes of its slots file as cache.size counts them."""
    with look(path, run_root()) as view:
        if view.state is State.SERVED:
            raise CacheError(f"a daemon serves {path}", f"`tierblk stop --cache-dir {path}`")
        if view.state is State.KILLED:
            raise CacheError(
                f"the daemon of {path} was killed, and its devices may wait for the next one",
                "attach one of them again; `tierblk reap` takes them away",
            )
        if view.state is State.STRANGE:
            raise CacheError(
                f"the index of {path} is not of the same time as its slots: nothing in it can be trusted",
                "put the whole directory back as it was at one time",
            )
        return view.superblock.slot_count * view.superblock.slot_bytes
