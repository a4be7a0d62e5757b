"""A real Prometheus scrapes daemons; every query of the dashboard and of the alerts is run against it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from pydantic import BaseModel, ConfigDict

from tests.cache_rig import run_directory
from tests.conftest import ROOT
from tests.faults import FaultServer
from tests.integration.prometheus import LIMIT_S, Prometheus, promtool
from tests.monitoring_rig import Scripted
from tierblk import config as configs
from tierblk import metrics
from tierblk.core import LocalDoor, ublk
from tierblk.daemon import Daemon
from tierblk.device import Device
from tierblk.rundir import RUN_DIR_VARIABLE
from tierblk.scrape import MetricsServer, Scraper

MONITORING = ROOT / "packaging" / "monitoring"
RULES = MONITORING / "tierblk-alerts.yml"
DASHBOARD = json.loads((MONITORING / "tierblk-dashboard.json").read_text())
ALERTS = re.findall(r"- alert: (\w+)\n +expr: (?:'(.*)'|(.*))\n", RULES.read_text())
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$device": ".*"}

EMPTY_WHEN_WELL = {
    'tierblk_device_state{instance=~"$instance",device=~"$device",state!="ok"} == 1',
    'changes(process_start_time_seconds{instance=~"$instance"}[1m]) > 0',
}
"""Queries that say something of the ill only, or of what has just been started."""
SILENT = {"TierblkRestarts"}
"""Alerts for which a daemon would have to die again and again; promtool tests them."""


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def expressions() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return found + [each["expr"] for each in DASHBOARD["annotations"]["list"]]


def filled(expression: str) -> str:
    for name, text in VARIABLES.items():
        expression = expression.replace(name, text)
    assert "$" not in expression
    return expression


# -- what needs no server ---


@pytest.mark.parametrize("ill", [False, True])
async def test_promtool_finds_nothing_wrong_with_the_text(ill: bool) -> None:
    daemon = Scripted(ill=ill)
    text = metrics.exposition(await daemon.snapshot())
    assert promtool("check", "metrics", stdin=text) == ""
    merged = metrics.text_of(metrics.merged({"/a": text.decode(), "/b": text.decode()}))
    assert promtool("check", "metrics", stdin=merged.encode()) == ""


def test_the_rules_and_their_tests() -> None:
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", RULES)
    promtool("check", "config", MONITORING / "tierblk-scrape.yml")
    promtool("test", "rules", MONITORING / "tierblk-alerts.test.yml")


def test_every_alert_is_tested_and_says_which_command_to_run() -> None:
    tests = (MONITORING / "tierblk-alerts.test.yml").read_text()
    rules = RULES.read_text().split("- alert: ")[1:]
    assert len(ALERTS) == len(rules) >= 15
    verbs = "status|attach|list|detach|repin|sync|check|cache|doctor"
    for rule in rules:
        name = rule.split("\n")[0]
        assert f"- name: {name} fires\n" in tests
        assert f"- name: {name} is silent\n" in tests
        (runbook,) = re.findall(r"runbook: (.*)\n", rule)
        assert re.search(rf"`tierblk ({verbs})\b", runbook), name


def test_the_port_in_the_example_is_the_one_in_the_reference() -> None:
    (port,) = re.findall(r'targets: \["127.0.0.1:(\d+)"\]', (MONITORING / "tierblk-scrape.yml").read_text())
    assert f'metrics = "127.0.0.1:{port}"' in (ROOT / "configs" / "reference.toml").read_text()


# -- the dashboard's schema: of Grafana's model (schemaVersion 38), the fields that are used here ---


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Source(Strict):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]


class Grid(Strict):
    x: int
    y: int
    w: int
    h: int


class Target(Strict):
    refId: str  # noqa: N815  # Grafana's names, here and below
    datasource: Source
    expr: str
    legendFormat: str  # noqa: N815
    editorMode: Literal["code"]  # noqa: N815
    range: bool
    instant: bool
    format: Literal["table", "time_series"] = "time_series"


class Step(Strict):
    color: Literal["green", "orange", "red"]
    value: float | None


class Thresholds(Strict):
    mode: Literal["absolute", "percentage"]
    steps: list[Step]


class Color(Strict):
    mode: Literal["thresholds", "palette-classic"]


class Defaults(Strict):
    unit: Literal["none", "bytes", "Bps", "s", "percentunit", "iops", "ops", "reqps"]
    color: Color | None = None
    min: float | None = None
    thresholds: Thresholds | None = None
    custom: dict[str, Any] | None = None


class FieldConfig(Strict):
    defaults: Defaults
    overrides: list[dict[str, Any]]


class Transformation(Strict):
    id: Literal["organize"]
    options: dict[str, Any]


class Panel(Strict):
    id: int
    type: Literal["row", "stat", "timeseries", "table"]
    title: str
    gridPos: Grid  # noqa: N815
    description: str = ""
    datasource: Source | None = None
    targets: list[Target] = []
    fieldConfig: FieldConfig | None = None  # noqa: N815
    options: dict[str, Any] | None = None
    transformations: list[Transformation] = []
    collapsed: bool | None = None
    panels: list[Any] = []


class VariableQuery(Strict):
    query: str
    refId: str  # noqa: N815


class Variable(Strict):
    name: str
    label: str
    type: Literal["datasource", "query"]
    query: str | VariableQuery
    refresh: Literal[1, 2]
    includeAll: bool  # noqa: N815
    multi: bool
    hide: Literal[0, 1, 2]
    current: dict[str, Any]
    datasource: Source | None = None
    definition: str | None = None
    allValue: str | None = None  # noqa: N815
    sort: int = 0


class Templating(Strict):
    list: list[Variable]


class Annotation(Strict):
    name: str
    datasource: Source
    enable: bool
    iconColor: str  # noqa: N815
    expr: str
    titleFormat: str  # noqa: N815


class Annotations(Strict):
    list: list[Annotation]


class Dashboard(Strict):
    uid: str
    title: str
    description: str
    tags: list[str]
    schemaVersion: Literal[38]  # noqa: N815
    version: int
    editable: bool
    graphTooltip: Literal[0, 1, 2]  # noqa: N815
    refresh: str
    timezone: Literal["browser", "utc"]
    time: dict[Literal["from", "to"], str]
    templating: Templating
    annotations: Annotations
    links: list[Any]
    panels: list[Panel]


def test_the_dashboard_is_what_grafana_reads() -> None:
    dashboard = Dashboard.model_validate(DASHBOARD)
    panels = dashboard.panels
    assert len({panel.id for panel in panels}) == len(panels)
    assert len({panel.title for panel in panels if panel.type != "row"}) >= 30
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel.gridPos
        assert grid.x >= 0
        assert grid.x + grid.w <= 24
        cells = {(x, y) for x in range(grid.x, grid.x + grid.w) for y in range(grid.y, grid.y + grid.h)}
        assert not cells & taken, f"{panel.title} lies over another panel"
        taken |= cells
        if panel.type == "row":
            continue
        assert panel.targets, panel.title
        assert panel.datasource, panel.title
        assert panel.description.endswith("."), panel.title
        assert [target.refId for target in panel.targets] == list("ABCDEFGH")[: len(panel.targets)]
        assert all(target.instant != target.range for target in panel.targets)
    names = [variable.name for variable in dashboard.templating.list]
    assert names == ["datasource", "instance", "device"]


def test_every_metric_is_on_the_dashboard_or_told_of() -> None:
    """Whoever adds one decides where it is seen."""
    shown = set(re.findall(r"tierblk_[a-z_]+", json.dumps(DASHBOARD)))
    known = {family.name for family in metrics.families(asyncio.run(Scripted().snapshot()), 0.0)}
    suffixes = r"_(total|info|bucket|sum|count)$"
    shown = {re.sub(suffixes, "", name) if name not in known else name for name in shown}
    assert shown <= known
    assert known - shown == {
        "tierblk_cache_size_bytes",
        "tierblk_device_active_requests",
        "tierblk_device_attached_timestamp_seconds",
        "tierblk_device_flush_commits",
        "tierblk_device_flush_records",
        "tierblk_device_hot_memory_bytes",
        "tierblk_device_partial_writes",
        "tierblk_device_queue_depth",
        "tierblk_device_queues",
        "tierblk_device_requests",
        "tierblk_device_size_bytes",
        "tierblk_cache",
        "tierblk_layer_size_bytes",
        "tierblk_write_pace_bytes_per_second",
    }


# -- with a server ---


async def test_every_query_gives_data(tmp_path: Path) -> None:
    """With a daemon that is well, of which no alert fires, one that is ill in every way, and one that is
    down."""
    well, ill, down = (free_address() for _ in range(3))
    servers = [
        MetricsServer(Scraper(Scripted().snapshot), well, []),
        MetricsServer(Scraper(Scripted(ill=True).snapshot), ill, []),
    ]
    for server in servers:
        await server.start()
    try:
        async with Prometheus(tmp_path, [well, ill, down], RULES) as prometheus:
            await prometheus.until(
                "min(count_over_time(tierblk_build_info[1m])) > 2 and count(tierblk_build_info) == 2"
            )
            await prometheus.until("up == 0")
            empty = [each for each in expressions() if not await prometheus.query(filled(each))]
            assert set(empty) <= EMPTY_WHEN_WELL
            for name, quoted, bare in ALERTS:
                found = await prometheus.query(quoted or bare)
                wells = [each for each in found if each["metric"].get("instance") == well]
                # A busy machine may miss a scrape, and then `up` is 0.
                assert wells == [] or name == "TierblkDown", f"{name} fires of a daemon that is well"
                assert bool(found) == (name not in SILENT), name
            for name, variable in (("instance", 1), ("device", 2)):
                definition = DASHBOARD["templating"]["list"][variable]["definition"]
                (metric,) = re.findall(r"label_values\((.*), \w+\)", definition)
                series = await prometheus.ask("series", **{"match[]": filled(metric)})
                assert {each[name] for each in series} >= ({well, ill} if name == "instance" else {"web"})
            targets = (await prometheus.ask("targets"))["activeTargets"]
            errors = {each["labels"]["instance"]: each["lastError"] for each in targets}
            for address in (well, ill):
                assert errors[address] == "" or "deadline exceeded" in errors[address]
            await prometheus.until('ALERTS{alertname="TierblkFenced",alertstate="firing"}')
    finally:
        for server in servers:
            await server.close()


@pytest.fixture
def without_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], configs.Config]]:
    """Gives the config of a real daemon whose devices have a local door in the driver's place."""

    async def start(device: Device, on_end: Callable[[Device], None], *, dev_id: int | None = None) -> None:
        assert device.stack.base is not None
        device._door = LocalDoor(device._home.engine, device.stack.base.layer, queue_depth=16)  # type: ignore[assignment]
        device.state = "live"

    async def stop(device: Device, *, force: bool) -> None:
        assert device._door is not None
        device._door.drain()
        device._door.quit()
        await asyncio.to_thread(device._door.close)
        device.state = "stopped"

    def config(url: str) -> configs.Config:
        document = {
            "device": {"name": "disk"},
            "base": {"url": url},
            "cache": {"dir": str(tmp_path / "cache"), "size": "16MiB"},
        }
        return configs.parse(document, tmp_path / "disk.toml")

    monkeypatch.setattr(ublk, "features", lambda: 0)
    monkeypatch.setattr(Device, "start", start)
    monkeypatch.setattr(Device, "stop", stop)
    with run_directory(tmp_path) as run_dir:
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(run_dir))
        yield config


@pytest.fixture
async def image() -> AsyncIterator[FaultServer]:
    async with FaultServer(random.Random(3).randbytes(4 << 20)) as server:
        yield server


async def test_a_real_daemon_that_reads(
    tmp_path: Path, image: FaultServer, without_driver: Callable[[str], configs.Config]
) -> None:
    """From the core's counters to Prometheus: what was read is what it has."""
    config = without_driver(image.url())
    daemon, address = Daemon(config), free_address()
    await daemon.start()
    server = MetricsServer(Scraper(daemon.snapshot), address, daemon.warnings)
    await server.start()
    try:
        await daemon.attach(config)
        door = cast(LocalDoor, daemon._devices["disk"]._door)
        (tmp_path / "prometheus").mkdir()
        async with Prometheus(tmp_path / "prometheus", [address], RULES) as prometheus:
            # A block is a hit once its slot is written, which no answer waits for: so read until that is so.
            async with asyncio.timeout(LIMIT_S):
                while door.stats()["hit_bytes"] < 1 << 20:
                    await asyncio.to_thread(door.read, 0, 1 << 20)
            read_bytes = door.stats()["hit_bytes"]
            await prometheus.until(
                f'tierblk_device_read_bytes_total{{device="disk",tier="hit"}} == {read_bytes}'
            )
            (fetched,) = await prometheus.query("tierblk_remote_fetched_bytes_total")
            assert float(fetched["value"][1]) >= 1 << 20
            assert fetched["metric"]["remote"] == image.url()
            for tier in ("hit", "miss"):
                labels = f'device="disk",tier="{tier}"'
                (count,) = await prometheus.query(f"tierblk_device_latency_seconds_count{{{labels}}}")
                (total,) = await prometheus.query(f"tierblk_device_latency_seconds_sum{{{labels}}}")
                mean_s = float(total["value"][1]) / float(count["value"][1])
                assert float(count["value"][1]) == door.stats()[f"{tier}_requests"]
                assert 0 < mean_s < LIMIT_S
                (quantile,) = await prometheus.query(
                    f"histogram_quantile(1, tierblk_device_latency_seconds_bucket{{{labels}}})"
                )
                assert mean_s <= float(quantile["value"][1])
    finally:
        await server.close()
        await daemon.stop()
