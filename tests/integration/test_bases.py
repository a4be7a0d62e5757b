"""An attach reads what the kernel will read of a partition table: an error comes before there is a device,
and the kernel, whose wait nobody can end, finds all of it in the cache."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import ENOMEM
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.faults import FaultServer
from tests.faults.readpath import DEVICE, ReadPath, open_path, settings
from tierblk.bases import Bases
from tierblk.cache import Cache
from tierblk.errors import DeviceError, RemoteUnavailable
from tierblk.layer import Stack
from tierblk.partition import HEAD_BYTES
from tierblk.stacks import Stacks

IMAGE_BYTES = 16 << 20
SECTOR = 512
LIMIT_S = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[str], bytes]:
    """An image with noise in its partitions and the table of an sfdisk script."""

    def make(script: str) -> bytes:
        path = tmp_path / "disk.raw"
        path.write_bytes(
            bytes(1 << 20) + random.Random(3).randbytes(IMAGE_BYTES - (2 << 20)) + bytes(1 << 20)
        )
        command = ["/sbin/sfdisk", "--quiet", "--wipe=never", str(path)]
        subprocess.run(command, input=script, text=True, check=True, capture_output=True, timeout=30)
        return path.read_bytes()

    return make


async def warning_of(path: ReadPath) -> str | None:
    """What an attach of it does before it makes a device."""

    async def nothing(layer_id: int) -> None:
        """Nobody releases a base here."""

    with ThreadPoolExecutor(4) as executor:
        cache = cast(Cache, SimpleNamespace(engine=path.engine))
        async with asyncio.timeout(LIMIT_S):
            stack = Stack(path.base, None, path.base.image.size_bytes)
            stacks = Stacks(cache, Bases(cache, nothing), cast(Any, None), executor)
            return await stacks.partition_warning(stack)


@pytest.mark.parametrize(
    ("script", "places"),
    [
        ("label: gpt\nsize=8MiB\n", [(IMAGE_BYTES - 33 * SECTOR, 33 * SECTOR)]),
        (
            "label: dos\n2048,1MiB\n,1MiB\n,1MiB\n,8MiB,E\n,2MiB\n,2MiB\n",
            [(4 << 20, SECTOR), (7 << 20, SECTOR)],
        ),
    ],
)
async def test_what_the_kernel_reads_next_is_cached(
    tmp_path: Path, disk: Callable[[str], bytes], script: str, places: list[tuple[int, int]]
) -> None:
    image = disk(script)
    async with FaultServer(image) as server:
        path = await open_path(tmp_path, image, server.url(), remote=settings(readahead=False))
        assert await warning_of(path) is None
        await server.gone()
        path.set_patience(0)
        assert await path.check_all([(0, HEAD_BYTES), *places]) == [None] * (1 + len(places))
        await path.close()


async def test_a_machine_that_has_no_room_for_a_door_is_an_error(
    tmp_path: Path, disk: Callable[[str], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **keys: object) -> None:
        raise OSError(ENOMEM, os.strerror(ENOMEM))

    image = disk("label: gpt\nsize=8MiB\n")
    async with FaultServer(image) as server:
        path = await open_path(tmp_path, image, server.url(), remote=settings(readahead=False))
        monkeypatch.setattr("tierblk.stacks.LocalDoor", full)
        with pytest.raises(DeviceError, match="Cannot allocate memory"):
            await warning_of(path)
        await path.close()


async def test_a_server_that_is_gone_after_the_head_is_an_error_at_the_speed_of_retries(
    tmp_path: Path, disk: Callable[[str], bytes]
) -> None:
    """Also when another device of the image waits for ever."""
    image = disk("label: gpt\nsize=8MiB\n")
    async with FaultServer(image) as server:
        path = await open_path(tmp_path, image, server.url(), remote=settings(readahead=False, retries=1))
        assert await path.check((0, HEAD_BYTES)) is None
        path.base.patiences[f"another {DEVICE}"] = float("inf")
        server.set_faults("error")
        with pytest.raises(RemoteUnavailable, match="status 503"):
            await warning_of(path)
        await path.close()
