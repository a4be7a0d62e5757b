"""A device that is read through its daemon."""

from __future__ import annotations

import asyncio
import mmap
import threading
from typing import Any, cast

import pytest

from tierblk.cli.attached import AttachedReader
from tierblk.cli.client import DeadSocket
from tierblk.errors import DaemonError, RemoteUnavailable, TierblkError

LIMIT_S = 10.0
SIZE_BYTES = 8192


class Asked:
    """In the place of a daemon."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers = list(answers)
        self.begun = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def read(self, path: str, timeout_s: float) -> bytes:
        self.begun.set()
        self.may_answer.wait(LIMIT_S)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __str__(self) -> str:
        return "the daemon"


def reader(asked: Asked, trouble: list[TierblkError], patience_s: float = LIMIT_S) -> AttachedReader:
    parts = [(0, SIZE_BYTES)]
    return AttachedReader(
        cast(Any, asked), "dev", SIZE_BYTES, patience_s, trouble.append, lambda: iter(parts)
    )


async def read(asked: Asked, trouble: list[TierblkError], patience_s: float = LIMIT_S) -> bytes:
    with mmap.mmap(-1, SIZE_BYTES) as buffer:
        async with asyncio.timeout(LIMIT_S):
            await reader(asked, trouble, patience_s).read(0, SIZE_BYTES, buffer)
        return buffer[:]


async def test_what_the_daemon_says_is_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierblk.cli.attached._PAUSE_S", 0.0)
    away, trouble = RemoteUnavailable("away"), list[TierblkError]()
    data = bytes(range(256)) * (SIZE_BYTES // 256)
    assert await read(Asked(away, data), trouble) == data
    assert trouble == [away]
    for answer, kind in ((DeadSocket(), DaemonError), (b"short", DaemonError), (away, RemoteUnavailable)):
        with pytest.raises(kind):
            await read(Asked(answer), [], patience_s=0)


def test_nobody_waits_for_the_answer_behind_a_ctrl_c() -> None:
    asked = Asked(b"")
    asked.may_answer.clear()

    async def interrupted() -> None:
        reading = asyncio.create_task(read(asked, []))
        await asyncio.to_thread(asked.begun.wait, LIMIT_S)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    giving_up = threading.Timer(LIMIT_S / 2, asked.may_answer.set)
    giving_up.start()
    asyncio.run(interrupted())
    assert not asked.may_answer.is_set()
    giving_up.cancel()
    asked.may_answer.set()
