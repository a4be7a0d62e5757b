"""What TARGET and --device of `tierblk cache` mean."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cli_harness import Cli, cli
from tests.unit.test_cli_orphans import Machine, machine
from tierblk.cache.layers import LayerRecord
from tierblk.cli.target import CachedDevice, Target, Wanted, add_target, choose, looking, resolve
from tierblk.errors import CacheError, ConfigError, DeviceError

__all__ = ["cli", "machine"]  # fixtures

URL = "https://images.example/debian.raw?signature=1"
SHOWN = "https://images.example/debian.raw?…"
OLD = LayerRecord(1, "base", URL, 4096, "v1", 10)
NEW = LayerRecord(2, "base", URL, 8192, "v2", 20)
WEB = LayerRecord(3, "local", URL, 9000, "v1", 30, "web", 4096)
BARE = LayerRecord(4, "write-back", "", 7000, "", 40, "bare")
LOST = LayerRecord(5, "scratch", "http://gone/x", 100, "v", 50, "lost", 100)
HERE = Target(Path("/cache"))


def test_a_path_is_a_directory_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERBLK_RUN_DIR", str(tmp_path / "no" / "run"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian" / "slots").touch()
    for text in ("/var/cache/tierblk", "./debian", "debian", ".", "..", "Cache", "a/b"):
        assert resolve(text) == Target(Path(text))


def test_a_config_says_directory_and_device(tmp_path: Path) -> None:
    text = f'[device]\nname = "web"\n[cache]\ndir = "{tmp_path}/c"\nsize = "16MiB"\n'
    for name, more, wanted in (
        ("a.toml", f'[base]\nurl = "{URL}"\n', Wanted("web", False, URL)),
        ("b.toml", '[volume]\nmode = "local"\nsize = "1GiB"\n', Wanted("web", True, "")),
        ("config", f'[base]\nurl = "{URL}"\n[volume]\nmode = "local"\n', Wanted("web", True, URL)),
    ):
        (tmp_path / name).write_text(text + more)
        assert resolve(str(tmp_path / name)) == Target(tmp_path / "c", wanted)


def test_a_config_that_is_wrong_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[device]\n")
    for name in ("bad.toml", "none.toml"):
        with pytest.raises(ConfigError, match=name):
            resolve(str(tmp_path / name))


def test_a_name_is_a_device_of_a_daemon(cli: Cli) -> None:
    assert cli("attach", cli.config("debian")).code == 0
    wanted = Wanted("debian", False, "http://images.example/a.raw")
    assert resolve("debian") == Target(cli.folder / "cache", wanted)
    with pytest.raises(DeviceError, match='no device called "other"') as caught:
        resolve("other")
    assert caught.value.hint == "attached are: debian; TARGET may also be a config file or a cache directory"


def test_a_name_is_a_device_that_waits_for_a_daemon(machine: Machine) -> None:
    machine.orphan(0, "lost")
    wanted = Wanted("lost", False, "http://h/x", 'etag:"1"')
    assert resolve("lost") == Target(machine.folder / "cache0", wanted)


def test_a_directory_with_one_device_needs_no_name() -> None:
    assert choose([OLD], HERE) == CachedDevice(SHOWN, None, OLD)
    assert choose([BARE], HERE) == CachedDevice("bare", BARE, None)
    assert choose([WEB, OLD], HERE) == CachedDevice("web", WEB, OLD)
    lost = choose([LOST], HERE)  # its base was dropped
    assert (lost.base, lost.layers, lost.size_bytes) == (None, [LOST], 100)


def test_a_directory_with_several_lists_them() -> None:
    with pytest.raises(DeviceError, match="has 3 devices: say which one with --device") as caught:
        choose([OLD, NEW, WEB, BARE], HERE)
    assert caught.value.hint == (
        "there are: web (local volume), bare (write-back volume), "
        f"{SHOWN} (base, layer 1), {SHOWN} (base, layer 2)"
    )
    with pytest.raises(DeviceError, match="nothing of any device"):
        choose([], HERE)
    many = [replace(BARE, layer_id=n, name=f"v{n}") for n in range(1, 100)]
    with pytest.raises(DeviceError) as caught:
        choose(many, HERE)
    assert str(caught.value.hint).endswith("v16 (write-back volume), and 83 more")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("web", [WEB, OLD]),
        ("bare", [BARE]),
        (SHOWN, [NEW]),  # of two versions the one used last
        (URL, [NEW]),
        ("1", [OLD]),
        ("3", [WEB, OLD]),
    ],
)
def test_a_device_of_a_directory(name: str, layers: list[LayerRecord]) -> None:
    of_config = Target(Path("/cache"), Wanted("lost", True, ""))
    for target in (HERE, of_config):
        assert choose([OLD, NEW, WEB, BARE, LOST], target, name).layers == layers


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match='nothing in /cache is called "webb"') as caught:
        choose([BARE], HERE, "webb")
    assert caught.value.hint == "there are: bare (write-back volume)"


@pytest.mark.parametrize(
    ("wanted", "device"),
    [
        (Wanted("web", True, URL), CachedDevice("web", WEB, OLD)),
        (Wanted("debian", False, URL), CachedDevice("debian", None, NEW)),
        (Wanted("debian", False, SHOWN, "v1"), CachedDevice("debian", None, OLD)),
    ],
)
def test_the_device_of_a_config_or_daemon(wanted: Wanted, device: CachedDevice) -> None:
    assert choose([OLD, NEW, WEB, BARE], Target(Path("/cache"), wanted)) == device


def test_a_device_of_which_nothing_is_here_yet() -> None:
    for wanted in (
        Wanted("new", True, ""),
        Wanted("web", False, "http://else"),
        Wanted("x", False, URL, "v9"),
    ):
        with pytest.raises(DeviceError, match=f"/cache has nothing of the device {wanted.name} yet"):
            choose([OLD, WEB], Target(Path("/cache"), wanted))


def test_a_directory_that_is_none_is_an_error_of_the_cache(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_target(parser)
    args = parser.parse_args([str(tmp_path / "none")])
    with pytest.raises(CacheError, match="there is no cache directory"), looking(args):
        pass
