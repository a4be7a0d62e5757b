"""A signed address is a secret: whoever knows its query can read the image. It stays in the config, the
index and the device's record, which are their owner's; what people, logs and the socket get has it cut."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cache_rig import run_directory
from tests.faults import FaultServer
from tests.unit.test_records import RECORD
from tierblk import config as configs
from tierblk import metrics, records, takeover
from tierblk.config import Config
from tierblk.core import ublk
from tierblk.daemon import Daemon
from tierblk.device import Device
from tierblk.errors import DeviceError, RemoteRefused, TierblkError
from tierblk.records import DeviceRecord
from tierblk.remote import open_source
from tierblk.rundir import RUN_DIR_VARIABLE

SECRET = "X-Signature=s3cr3t"
IMAGE = random.Random(1).randbytes(1 << 20)
LIMIT_S = 20.0


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Config]]:
    """Gives the config of a daemon whose devices live without a driver."""

    async def start(device: Device, on_end: Callable[[Device], None], *, dev_id: int | None = None) -> None:
        device.state = "live"

    def config(url: str) -> Config:
        document = {
            "device": {"name": "disk"},
            "base": {"url": url},
            "cache": {"dir": str(tmp_path / "cache"), "size": "16MiB"},
            "remote": {"retries": 0, "read_timeout": "200ms", "connect_timeout": "200ms"},
        }
        return configs.parse(document, tmp_path / "disk.toml")

    monkeypatch.setattr(ublk, "features", lambda: 0)
    monkeypatch.setattr(Device, "start", start)
    with run_directory(tmp_path) as run_dir:
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(run_dir))
        yield config


async def test_status_list_info_errors_and_log_of_a_daemon(
    daemon: Callable[[str], Config], caplog: pytest.LogCaptureFixture
) -> None:
    """With a server that answers, one that is silent, one that answers again and one that refuses."""
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    async with FaultServer(IMAGE) as server, asyncio.timeout(LIMIT_S):
        url = f"{server.url()}?{SECRET}"
        served = Daemon(daemon(url))
        await served.start()

        async def tell() -> None:
            told.append(json.dumps([served.devices(), served.device("disk"), served.info()]))
            text = metrics.exposition(await served.snapshot()).decode()
            assert 'tierblk_device_state{device="disk"' in text
            assert "?…" in text
            told.append(text)

        told.append(json.dumps(await served.attach(daemon(url))))
        assert served._stacks is not None
        (base,) = served._stacks.bases.by_layer.values()
        assert base.image.identity.url == url, "the whole address is the key"
        await tell()
        for faults in ("stall-head", "", "whole"):
            server.set_faults(faults)
            try:
                await base.fetcher.fetch(1 << 19, memoryview(bytearray(4096)), lambda count: None)
            except TierblkError as error:
                told += [str(error), str(error.hint)]
                base.failed(error)
            else:
                base.worked()
            await tell()
        base.fetcher._outage.join(Silent())
        told.append(str(base.health()["reason"]))
        assert told[-1].endswith("is silent")
        server.release()
        await served.stop()
    for text in (*told, caplog.text):
        assert SECRET not in text
    assert "?…" in caplog.text
    assert "?\\u2026" in told[0]


class Silent:
    """A read to which nothing comes."""

    def probe(self) -> None:
        pass

    def answered(self) -> None:
        pass


async def test_a_device_that_waits_for_a_daemon(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    record = DeviceRecord(**{**vars(RECORD), "url": f"https://h/x?{SECRET}"})

    async def serve(record: DeviceRecord) -> Device:
        return Device.__new__(Device)

    waiting = takeover.TakeOver(record, serve)
    await waiting.begin()
    assert "https://h/x?…" in caplog.text
    for shown in (waiting.to_dict(), records.waiting_device(record, "no daemon", None)):
        assert shown["url"] == "https://h/x?…"
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url", [f"gopher://h/x?{SECRET}", f"https:///x?{SECRET}", f"http://me:pw@/?{SECRET}"]
)
async def test_an_address_that_cannot_be_used(daemon: Callable[[str], Config], url: str) -> None:
    for told in (await refusal(url), config_error(daemon, url)):
        assert SECRET not in told
        assert "pw" not in told


async def refusal(url: str) -> str:
    with pytest.raises(RemoteRefused) as caught:
        await open_source(url, configs.RemoteSettings())
    return str(caught.value)


def config_error(daemon: Callable[[str], Config], url: str) -> str:
    with pytest.raises(TierblkError) as caught:
        daemon(url)
    assert not isinstance(caught.value, DeviceError)
    return str(caught.value)
