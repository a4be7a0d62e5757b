"""What monitoring gets: the text that Prometheus reads, and who may ask for it."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.engine_rig import Rig
from tests.monitoring_rig import IMAGE, VOLUME, Scripted
from tests.unit.cli_harness import Cli, cli
from tierblk import config as configs
from tierblk import metrics
from tierblk.cli import client
from tierblk.core import BLOCK_BYTES
from tierblk.errors import ConfigError, DaemonError
from tierblk.latency import Latencies, bounds_s, by_tier
from tierblk.scrape import CONNECTIONS_MAX, MetricsServer, Scraper
from tierblk.snapshot import Snapshot

__all__ = ["cli"]  # a fixture

LIMIT_S = 20.0
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: bytes | str) -> list[Metric]:
    return list(text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text))


def samples(text: bytes | str) -> Samples:
    found: Samples = {}
    for family in parsed(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@pytest.fixture(params=[False, True], ids=["well", "ill"])
def daemon(request: pytest.FixtureRequest) -> Scripted:
    return Scripted(ill=request.param)


class TestText:
    async def test_every_name_has_one_meaning_and_a_unit(self, daemon: Scripted) -> None:
        families = parsed(metrics.exposition(await daemon.snapshot()))
        names = [family.name for family in families]
        assert len(set(names)) == len(names) > 50
        for family in families:
            assert family.documentation.endswith("."), family.name
            assert re.fullmatch(r"(tierblk|process)_[a-z_]+", family.name)
            assert family.samples, family.name
            # Base units, written out.
            assert not re.search(r"_(ms|us|ns|kib|mib|milliseconds|percent)\b", family.name)
            counts = all(sample.name.endswith("_total") for sample in family.samples)
            assert (family.type == "counter") == counts, family.name

    async def test_what_there_is(self) -> None:
        found = samples(metrics.exposition(await Scripted().snapshot()))
        assert value(found, "tierblk_cache_size_bytes") == 1000 * BLOCK_BYTES
        assert value(found, "tierblk_device_read_bytes_total", device="debian", tier="miss") == 10
        assert value(found, "tierblk_device_state", device="web", state="ok") == 1
        assert value(found, "tierblk_volume_dirty_bytes", device="web", remote=VOLUME) == 1 << 20
        assert value(found, "tierblk_volume_claim_held", device="web", remote=VOLUME) == 1
        assert 3 <= value(found, "tierblk_volume_dirty_age_seconds", device="web", remote=VOLUME) < LIMIT_S
        assert value(found, "tierblk_remote_requests_total", layer="1", remote=IMAGE) == 100
        assert value(found, "tierblk_device_oldest_wait_seconds", device="debian") == 0.012
        assert value(found, "tierblk_write_pace_bytes_per_second") == float("inf")
        assert value(found, "process_resident_memory_bytes") > 1 << 20
        kept = {"kind": "write-back", "layer": "2", "remote": VOLUME, "volume": "web"}
        assert value(found, "tierblk_layer_cached_bytes", **kept) == 1 << 20
        assert not [key for key in found if ("layer", "3") in key[1]], "closed, and nothing of it is cached"

    async def test_a_state_is_one_of_several(self, daemon: Scripted) -> None:
        found = samples(metrics.exposition(await daemon.snapshot()))
        for name, by in (("tierblk_device_state", "device"), ("tierblk_remote_state", "layer")):
            sums: dict[str, float] = {}
            for (each, labels), number in found.items():
                if each == name:
                    key = dict(labels)[by]
                    sums[key] = sums.get(key, 0) + number
            assert len(sums) >= 2
            assert set(sums.values()) == {1.0}, name

    async def test_a_device_that_nobody_serves_has_a_state_and_no_counters(self) -> None:
        found = samples(metrics.exposition(await Scripted(ill=True).snapshot()))
        assert {key[0] for key in found if ("device", "lost") in key[1]} == {
            "tierblk_device_info",
            "tierblk_device_state",
        }
        assert value(found, "tierblk_device_state", device="lost", state="failed") == 1

    async def test_counters_only_grow(self, daemon: Scripted) -> None:
        before, after = [samples(metrics.exposition(await daemon.snapshot())) for _ in range(2)]
        grown = 0
        assert before.keys() == after.keys()
        for key, number in before.items():
            if key[0].endswith(("_total", "_count", "_sum", "_bucket")):
                assert after[key] >= number, key
                grown += after[key] > number
        assert grown > 50

    async def test_histograms_are_cumulative(self) -> None:
        (family,) = [
            family
            for family in parsed(metrics.exposition(await Scripted().snapshot()))
            if family.type == "histogram"
        ]
        by_labels: dict[tuple[str, str], list[Any]] = {}
        for sample in family.samples:
            by_labels.setdefault((sample.labels["device"], sample.labels["tier"]), []).append(sample)
        assert len(by_labels) == 2 * 6
        for found in by_labels.values():
            buckets = [sample for sample in found if sample.name.endswith("_bucket")]
            bounds = [float(sample.labels["le"]) for sample in buckets]
            counts = [sample.value for sample in buckets]
            assert bounds == [*bounds_s(), float("inf")]
            assert counts == sorted(counts)
            rest = {sample.name.rpartition("_")[2]: sample.value for sample in found[len(buckets) :]}
            assert rest == {"count": 100, "sum": pytest.approx(0.04)}
            assert counts[-1] == 100
            # 131 us is above 100 us and below 200 us; 134 ms below 200 ms.
            assert [counts[bounds.index(le)] for le in (1e-4, 2e-4, 0.1, 0.2)] == [0, 99, 99, 100]

    async def test_an_empty_daemon(self) -> None:
        found = samples(metrics.exposition(Snapshot({}, [], {})))
        assert value(found, "tierblk_cache_commit_failing") == 0
        assert not [key for key in found if key[0].startswith("tierblk_device")]

    async def test_no_message_is_in_it(self) -> None:
        text = metrics.exposition(await Scripted(ill=True).snapshot()).decode()
        for message in ("no space", "HOST has it", "403", "Input/output"):
            assert message not in text


def test_no_bucket_falls_while_requests_are_counted(tmp_path: Path) -> None:
    """Of the real core: cumulative counts, their number and their sum."""
    rig = Rig(tmp_path, bytes(range(1, 256)) * 4096, 64)
    try:
        tick_s, last = rig.engine.tick_s(), [0] * (len(bounds_s()) + 1)
        last_sum_s = 0.0
        for n in range(12):
            rig.finish(rig.read(n % 4 * BLOCK_BYTES, BLOCK_BYTES))
            tiers = by_tier(rig.door.latencies(), tick_s)
            now = [sum(column) for column in zip(*(_row(each) for each in tiers.values()), strict=True)]
            assert all(old <= new for old, new in zip(last, now, strict=True))
            assert now == sorted(now)
            sum_s = sum(each.sum_s for each in tiers.values())
            assert sum_s > last_sum_s
            last, last_sum_s = now, sum_s
        assert last[-1] == rig.door.stats()["requests"] > 0
    finally:
        rig.close()


def _row(latencies: Latencies) -> list[int]:
    return [*latencies.cumulative(), latencies.total]


def test_a_bucket_counts_where_it_lies_whole() -> None:
    """With ticks of a microsecond the core's bucket of 4 ends at 5, and that of 5 at 6 us."""
    found = Latencies([1, 1, 0, 0], 1e-6).cumulative()
    assert dict(zip(bounds_s(), found, strict=True)) == {
        le: 0 if le < 5e-6 else 1 if le < 1e-5 else 2 for le in bounds_s()
    }


# -- where it is asked for ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def server() -> AsyncIterator[MetricsServer]:
    server = MetricsServer(Scraper(Scripted().snapshot), f"127.0.0.1:{free_port()}", [])
    await server.start()
    yield server
    await server.close()


async def get(server: MetricsServer, path: str = "/metrics", method: str = "GET") -> tuple[int, str, str]:
    async with (
        asyncio.timeout(LIMIT_S),
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{server.address}{path}") as answer,
    ):
        return answer.status, answer.headers["Content-Type"], await answer.text()


async def connected(server: MetricsServer, count: int) -> None:
    """Until so many are."""
    assert server._runner.server is not None
    async with asyncio.timeout(LIMIT_S):
        while len(server._runner.server.connections) != count:  # noqa: ASYNC110
            await asyncio.sleep(0)  # the kernel tells the loop


class TestPort:
    async def test_it_answers_to_one_question_only(self, server: MetricsServer) -> None:
        status, kind, text = await get(server)
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert value(samples(text), "tierblk_cache_slots") == 1000
        for path in ("/", "/v1/daemon", "/v1/devices", "/metrics/x"):
            assert (await get(server, path))[0] == 404
        for method in ("POST", "DELETE"):
            assert (await get(server, method=method))[0] == 405

    async def test_ipv6(self) -> None:
        server = MetricsServer(Scraper(Scripted().snapshot), f"[::1]:{free_port()}", [])
        await server.start()
        assert (await get(server))[0] == 200
        await server.close()

    async def test_a_port_that_is_taken_is_said_and_tried_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        warnings: list[str] = []
        holder = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        server = MetricsServer(Scraper(Scripted().snapshot), address, warnings)
        server._again_s = 0.01
        await server.start()
        (warning,) = warnings
        reason = "address already in use; it is tried again"
        assert warning == f"no metrics at daemon.metrics = {address}: {reason}"
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        holder.close()
        assert server._trying is not None
        await asyncio.wait_for(server._trying, LIMIT_S)
        assert (await get(server))[0] == 200
        assert warnings == []
        await server.close()
        await server.close()

    async def test_a_crowd_gets_one_snapshot(self) -> None:
        daemon, held = Scripted(), asyncio.Event()

        async def slow() -> Snapshot:
            await held.wait()
            return await daemon.snapshot()

        server = MetricsServer(Scraper(slow), f"127.0.0.1:{free_port()}", [])
        await server.start()
        asking = [asyncio.create_task(get(server)) for _ in range(8)]
        await connected(server, 8)
        held.set()
        answers = await asyncio.wait_for(asyncio.gather(*asking), LIMIT_S)
        assert {status for status, _, _ in answers} == {200}
        assert daemon.asked == 1
        await server.close()

    async def test_too_many_connections_are_refused_and_the_others_live(self, server: MetricsServer) -> None:
        host, _, port = server.address.partition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS_MAX)]
        await connected(server, CONNECTIONS_MAX)
        with pytest.raises(aiohttp.ClientError):
            await get(server)
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        await connected(server, 0)
        assert (await get(server))[0] == 200

    async def test_a_bug_is_one_answer(self, caplog: pytest.LogCaptureFixture) -> None:
        async def broken() -> Snapshot:
            raise KeyError("a bug")

        server = MetricsServer(Scraper(broken), f"127.0.0.1:{free_port()}", [])
        await server.start()
        assert (await get(server))[0] == 500
        assert (await get(server))[0] == 500
        assert "a bug" in caplog.text
        await server.close()

    async def test_who_hangs_up_spoils_it_for_nobody(self) -> None:
        held = asyncio.Event()

        async def slow() -> Snapshot:
            await held.wait()
            return await Scripted().snapshot()

        scraper = Scraper(slow)
        first = asyncio.create_task(scraper.answer(None))  # type: ignore[arg-type]
        second = asyncio.create_task(scraper.answer(None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        first.cancel()
        held.set()
        assert (await asyncio.wait_for(second, LIMIT_S)).status == 200


@pytest.mark.parametrize("address", ["127.0.0.1:9464", "127.8.0.1:1", "[::1]:65535"])
def test_loopback_addresses(address: str, tmp_path: Path) -> None:
    config = configs.parse(document(tmp_path, address), tmp_path / "a.toml")
    assert config.daemon.metrics == address
    assert configs.parse(config.to_document(), tmp_path / "a.toml") == config


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("0.0.0.0:9464", "must be a loopback address .*neither a password nor TLS"),
        ("192.168.1.2:9464", "must be a loopback address .*neither a password nor TLS"),
        ("[::]:9464", "must be a loopback address .*neither a password nor TLS"),
        ("localhost:9464", 'such as "127.0.0.1:9464"'),
        ("127.0.0.1", "and a port"),
        ("127.0.0.1:0", "and a port"),
        ("127.0.0.1:65536", "and a port"),
        ("127.0.0.1.2:80", "and a port"),
        ("::1:9464", "and a port"),
        (":9464", "and a port"),
        (9464, "must be a string"),
        ("127.0.0.1:9464\n", "and a port"),
    ],
)
def test_other_addresses_are_refused(address: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"daemon.metrics: .*{message}"):
        configs.parse(document(tmp_path, address), tmp_path / "a.toml")


def document(tmp_path: Path, address: object) -> dict[str, Any]:
    return {
        "device": {"name": "a"},
        "base": {"url": "http://h/x"},
        "cache": {"dir": str(tmp_path / "cache"), "size": "16MiB"},
        "daemon": {"metrics": address},
    }


# -- the command ---


class TestCommand:
    def test_of_all_daemons_and_of_one(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        cli("attach", cli.config("b", cache="other"))
        done = cli("metrics")
        assert (done.code, done.err) == (0, "")
        found = samples(done.out)
        for name, cache in (("a", "cache"), ("b", "other")):
            directory = str(cli.folder / cache)
            assert value(found, "tierblk_device_requests_total", cache_dir=directory, device=name) == 70
        helps = [line.split()[2] for line in done.out.splitlines() if line.startswith("# HELP")]
        assert len(helps) == len(set(helps)), "of a name there is one family, or a reader refuses it"
        one = samples(cli("metrics", "--cache-dir", cli.folder / "other").out)
        assert one.keys() < found.keys()
        assert {dict(labels)["cache_dir"] for _, labels in one} == {str(cli.folder / "other")}

    def test_json(self, cli: Cli) -> None:
        assert cli("metrics", "--json").json == {"metrics": []}
        cli("attach", cli.config("a"))
        document = cli("metrics", "--json").json
        by_name = {family["name"]: family for family in document["metrics"]}
        assert by_name["tierblk_device_requests"]["samples"][0]["value"] == 70
        assert by_name["tierblk_write_pace_bytes_per_second"]["samples"][0]["value"] is None

    def test_nobody_there(self, cli: Cli) -> None:
        done = cli("metrics")
        assert (done.code, done.out, done.err) == (0, "", "no daemon is running\n")
        done = cli("metrics", "--cache-dir", cli.folder / "cache")
        assert done.code == DaemonError.exit_code
        assert done.out == ""
        assert done.err.startswith(f"tierblk: no daemon serves {cli.folder}/cache\nhint: ")

    def test_a_daemon_that_hangs(self, cli: Cli) -> None:
        cli("attach", cli.config("a"))
        folder = cli.folder / "run" / "silent"
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(folder / "control.sock"))
            silent.listen()
            done = cli("metrics", "--timeout", "200ms")
        assert done.code == DaemonError.exit_code
        assert "has not answered for 0.2 s" in done.err
        assert samples(done.out)


def test_a_daemon_that_is_never_asked_imports_no_library_for_it() -> None:
    code = "import sys, tierblk.service; sys.exit('prometheus_client' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=LIMIT_S)


async def test_on_the_control_socket(cli: Cli) -> None:
    await asyncio.to_thread(cli, "attach", cli.config("a"))
    (folder,) = (path.parent for path in (cli.folder / "run").glob("*/control.sock"))
    text = await asyncio.to_thread(client.Daemon(folder, {}).text, "/metrics")
    assert value(samples(text), "tierblk_device_requests_total", device="a") == 70
    with pytest.raises(DaemonError, match="not found"):
        await asyncio.to_thread(client.Daemon(folder, {}).text, "/metrics/x")
