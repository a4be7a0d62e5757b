"""Two hosts that want one volume at the same moments: an epoch has one author, who lost hears
of it, and every epoch is one image.

TIERBLK_RACES=200 for a long run, TIERBLK_SEED for other ones, TIERBLK_RACES_S3=1 with an S3 server instead of
a folder."""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from errno import EROFS
from pathlib import Path
from typing import Any

import pytest

from tests.cache_rig import run_directory
from tests.far_rig import TIMEOUT_S, Host, config_of
from tests.integration.seaweed import SeaweedServer
from tierblk import claim
from tierblk.claim import Wishes
from tierblk.core import PAGE_BYTES, crc32c
from tierblk.errors import CacheError, Fenced, RemoteRefused
from tierblk.far import FarVolume
from tierblk.remote import (
    RECORD_BYTES_MAX,
    EpochName,
    ExtentMap,
    Lineage,
    Record,
    Store,
    StoredPages,
    decode_record,
    load,
    open_lineage,
)
from tierblk.remote.directory import DirectoryStore
from tierblk.standing import shown_writer
from tierblk.units import MIB

ROUNDS = int(os.environ.get("TIERBLK_RACES", "20"))
SEED = int(os.environ.get("TIERBLK_SEED", "1"))
WITH_S3 = bool(os.environ.get("TIERBLK_RACES_S3"))
STEPS = 12
SIZE = 1 * MIB
_AUTHOR = re.compile(
    r"epoch (\d+) was made by (.*): another host|is held by (.*), which made its epoch (\d+)"
)


Open = Callable[[str], Awaitable[Store]]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[tuple[str, Open]]:
    """An address, and what opens one below it."""

    async def of_folder(url: str) -> Store:
        return DirectoryStore(url)

    if not WITH_S3:
        yield f"file://{tmp_path}/store", of_folder
        return
    with SeaweedServer(tmp_path / "seaweed", volumes=100) as server:
        yield server.url("race"), server.store


class Racer:
    """A host that does at random moments what a host may do. made: the epochs that it believes its own.
    images: what it saw at an epoch that it made, when nothing was written meanwhile."""

    def __init__(self, host: Host, chance: random.Random) -> None:
        self.host = host
        self.chance = chance
        self.made: dict[int, bytes] = {}
        self.images: dict[int, bytes] = {}
        self.heard: list[tuple[int, str]] = []
        self.did: Counter[str] = Counter()

    async def run(self) -> None:
        for _ in range(STEPS):
            for _ in range(self.chance.randrange(40)):
                await asyncio.sleep(0)  # the other one goes on
            if self.host.stack is None:
                await self._attach()
            elif self.host.far.standing.fenced:
                await self._is_fenced()
            else:
                await self._use()

    async def _attach(self) -> None:
        wishes = Wishes(take_over=self.chance.random() < 0.7, discard_local=self.chance.random() < 0.5)
        try:
            await self.host.attach(wishes)
        except RemoteRefused as error:
            self._hear(str(error))
        except CacheError as error:  # what is here is of another history
            self._expect("another host took" in str(error), error)
            self.did["divergent"] += 1
        else:
            self.did["attached"] += 1

    async def _use(self) -> None:
        kind = self.chance.choices(["write", "sync", "detach"], [5, 4, 1])[0]
        self.did[kind] += 1
        try:
            if kind == "write":
                page = self.chance.randrange(SIZE // PAGE_BYTES)
                await self.host.write(page * PAGE_BYTES, self.chance.randbytes(PAGE_BYTES))
            elif kind == "sync":
                await self.host.sync()
                content = await self.host.content()
                if not self.host.far.layer.dirty_pages() and not self.host.far.standing.fenced:
                    self.images[self.host.far.extents.head.epoch] = content
            elif warning := await self.host.detach():
                self._hear(warning)
        except Fenced as error:
            self._hear(str(error))
        except OSError as error:
            self._expect(error.errno == EROFS and bool(self.host.far.standing.fenced), error)

    async def _is_fenced(self) -> None:
        """It knows: nothing that is written is acknowledged."""
        with pytest.raises(OSError, match="Read-only"):
            await self.host.write(0, bytes(PAGE_BYTES))
        with pytest.raises(Fenced) as error:
            await self.host.sync()
        self._hear(str(error.value))
        self.did["fenced"] += 1
        await self.host.detach()

    def _expect(self, is_right: bool, error: Exception) -> None:
        if not is_right:
            raise error

    def _hear(self, text: str) -> None:
        match = _AUTHOR.search(text)
        if match is None:
            assert "written to faster" in text or "begun by another host" in text, text
            return
        self.heard.append((int(match[1] or match[4]), match[2] or match[3]))
        self.did["heard"] += 1


@pytest.mark.timeout(60 + (60 if WITH_S3 else 12) * ROUNDS)
async def test_two_hosts_that_want_a_volume_at_once(
    shop: tuple[str, Open], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, open_one = shop
    owners: dict[str, Racer] = {}
    apply = FarVolume.apply

    async def watched(far: FarVolume, record: Record, record_hash: bytes, *, learn: bool) -> None:
        if far.standing.is_ours(record.epoch, record.attempt):
            owners[far.name].made[record.epoch] = record.attempt
        await apply(far, record, record_hash, learn=learn)

    async def open_store(url: str, *_: object) -> Any:
        return await open_one(url)

    monkeypatch.setattr(FarVolume, "apply", watched)
    monkeypatch.setattr(claim, "open_store", open_store)
    did: Counter[str] = Counter()
    with run_directory(tmp_path) as run:
        for number in range(ROUNDS):
            owners.clear()
            racers = []
            for name in "ab":
                folder = tmp_path / f"{number}{name}"
                folder.mkdir()
                config = config_of(folder, f"{address}/{number}", name=name, size=SIZE)
                host = await Host.start(config, run)
                racers.append(Racer(host, random.Random(f"{SEED} {number} {name}")))
                owners[config.device.name] = racers[-1]
            try:
                async with asyncio.timeout(3 * TIMEOUT_S):
                    await asyncio.gather(*(racer.run() for racer in racers))
                await _judge(open_one, f"{address}/{number}", racers)
            except BaseException as error:
                error.add_note(f"round {number} of seed {SEED}")
                raise
            finally:
                for racer in racers:
                    await racer.host.kill()
                    did += racer.did
            print(number, dict(did), flush=True)  # with -s, for long runs
    assert min(did[kind] for kind in ("attached", "write", "sync", "heard", "fenced")) > 0, did
    print(dict(did))


async def _judge(open_one: Open, url: str, racers: list[Racer]) -> None:
    lineages = []
    for _ in racers:
        lineages.append(await open_lineage(await open_one(url), open_one))
    store = lineages[0].store
    try:
        head = (await load(lineages[0])).head.epoch
        assert head
        assert await store.read(str(EpochName(head + 1)), RECORD_BYTES_MAX) is None
        for epoch in range(1, head + 1):
            data = await store.read(str(EpochName(epoch)), RECORD_BYTES_MAX)
            assert data is not None
            record = decode_record(data, name=str(epoch))
            believers = [racer for racer in racers if epoch in racer.made]
            assert len(believers) == 1, "an epoch has one author"
            assert believers[0].made[epoch] == record.attempt
            for racer in racers:
                for heard, who in racer.heard:
                    assert heard != epoch or who == shown_writer(record.writer), "who lost hears who won"
            images = [await _image(lineage, await load(lineage, epoch)) for lineage in lineages]
            assert images[0] == images[1]
            for racer in racers:
                assert racer.images.get(epoch, images[0]) == images[0]
    finally:
        for lineage in lineages:
            await lineage.aclose()


async def _image(lineage: Lineage, extents: ExtentMap) -> bytes:
    image = bytearray(SIZE)
    await StoredPages(lineage, extents, crc32c).read_into(0, memoryview(image), lambda count: None)
    return bytes(image)
