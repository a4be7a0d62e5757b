"""What the command line says and does about volumes in object storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli_harness import Cli, cli
from tierblk.remote import Birth, begin
from tierblk.remote.directory import DirectoryStore

__all__ = ["cli"]  # a fixture


@pytest.fixture
def config(cli: Cli) -> Path:
    path = cli.folder / "far.toml"
    path.write_text(
        '[device]\nname = "far"\n[volume]\nmode = "write-back"\nsize = "1GiB"\n'
        f'url = "file://{cli.folder}/store"\n[cache]\ndir = "{cli.folder}/cache"\nsize = "16MiB"\n'
    )
    return path


def test_check_tries_the_store(cli: Cli, config: Path) -> None:
    done = cli("check", "--connect", config)
    assert (done.code, done.err) == (0, "")
    assert "of racing creations one wins" in done.out
    assert "has no volume yet" in done.out
    assert list((cli.folder / "store" / "proof").iterdir()) == []
    assert cli("check", "--connect", "--json", config).json["store"]["epoch"] is None


async def test_check_says_what_volume_is_there(cli: Cli, config: Path) -> None:
    from uuid import uuid4

    store = DirectoryStore(f"file://{cli.folder}/store")
    await begin(store, Birth(uuid4(), 1 << 30, None, None, 1))
    await store.aclose()
    done = cli("check", "--connect", config)
    assert "has a volume of 1 GiB at epoch 0, released" in done.out, done


def test_check_says_what_is_wrong_with_the_store(cli: Cli, config: Path) -> None:
    (cli.folder / "store").mkdir()
    (cli.folder / "store" / "volume.json").write_text("{}")
    done = cli("check", "--connect", config)
    assert done.code == 5
    assert "volume.json" in done.err


def test_status_shows_what_would_be_lost_and_sync_uploads_it(cli: Cli, config: Path) -> None:
    assert cli("attach", config).code == 0
    shown = cli("status", "far").out
    assert f"file://{cli.folder}/store, epoch 7" in shown
    assert " in 70 requests, hits" in shown  # the reads, of the 130 that there were
    assert "4 KiB are only here, since" in shown
    assert cli("sync", "far").code == 0
    done = cli("sync", "far", "--wait", "--json")
    assert (done.code, done.json["write_back"]["dirty_bytes"]) == (0, 0)
    assert cli("detach", "far").code == 0


def test_sync_is_for_volumes_in_object_storage(cli: Cli) -> None:
    assert cli("attach", cli.config("image")).code == 0
    done = cli("sync", "image", "--wait")
    assert done.code == 1
    assert "image has no volume in object storage" in done.err
    assert "hint: volume.mode" in done.err


@pytest.mark.parametrize("wish", ["--take-over", "--discard-local", "--clone-local"])
def test_wishes_reach_the_daemon(cli: Cli, config: Path, wish: str) -> None:
    assert cli("attach", config, wish).code == 0
    assert cli("status", "far", "--json").json["write_back"]["dirty_bytes"] == 0
