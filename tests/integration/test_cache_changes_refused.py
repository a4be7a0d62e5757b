"""The commands that change what is in a cache, on directories that are not well: one clear error, the exit
code that is documented, and nothing changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.cache_rig import mounted
from tests.integration.test_cache_commands import (
    DAMAGES,
    World,
    as_nobody,
    assert_one_error,
    directory,
    everything,
    hanging,
    run_beside,
    world,
)
from tests.property.volume_daemon import NAME, URL
from tierblk.cli.entry import main
from tierblk.errors import CacheError, DaemonError
from tierblk.rundir import RUN_DIR_VARIABLE

__all__ = ["directory", "hanging", "world"]

COMMANDS = {
    "evict": ["evict", "DIRECTORY", "all"],
    "pin": ["pin", "DIRECTORY", "block:1"],
    "gc": ["gc", "DIRECTORY", "--older", "1ms"],
    "resize": ["resize", "DIRECTORY", "32MiB"],
    "warm": ["warm", "DIRECTORY", "block:1"],
    "diff": ["diff", "DIRECTORY"],
    "verify --repair": ["verify", "DIRECTORY", "--repair"],
    "export": ["export", "CONFIG", "OUT"],
}
CHANGES = ("evict", "pin", "gc", "resize")


def arguments(command: str, directory: Path, folder: Path) -> list[str]:
    """folder: for what is not in the directory."""
    config = folder / "vol.toml"
    if not config.exists():
        config.write_text(
            f'[device]\nname = "{NAME}"\non_outage = "fail"\n[base]\nurl = "{URL}"\n'
            f'[volume]\nmode = "local"\n[cache]\ndir = "{directory}"\nsize = "16MiB"\n'
        )
    named = {"DIRECTORY": str(directory), "CONFIG": str(config), "OUT": str(folder / "out.raw")}
    return ["cache", *(named.get(word, word) for word in COMMANDS[command])]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_directory(
    command: str, damage: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = DAMAGES[damage]
    change(directory)
    argv = arguments(command, directory, tmp_path)
    before = everything(directory) if directory.exists() else {}
    code = main(argv)
    said = capsys.readouterr()
    assert_one_error(code, words, said.out, said.err)
    assert (everything(directory) if directory.exists() else {}) == before
    assert not list(tmp_path.glob("*out.raw*"))


@pytest.mark.parametrize("command", CHANGES)
def test_a_read_only_filesystem(
    command: str,
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    with mounted("tmpfs", tmp_path / "disk", "size=64m") as disk:
        directory = Path(shutil.copytree(world.ended, disk / "cache"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        before = everything(directory)
        code = main(arguments(command, directory, tmp_path))
        said = capfd.readouterr()
        assert_one_error(code, "Read-only file system", said.out, said.err)
        assert everything(directory) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_no_permission(command: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tierblk.cli.repairing
    import tierblk.config
    import tierblk.exporting
    import tierblk.workshop  # noqa: F401

    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    with tempfile.TemporaryDirectory(prefix="tierblk-test-") as name:
        parent = Path(name)
        parent.chmod(0o777)
        directory = Path(shutil.copytree(world.ended, parent / "cache"))
        directory.chmod(0o700)
        argv = arguments(command, directory, parent)
        before = everything(directory)
        code, out, err = as_nobody(argv, tmp_path)
        if command == "export":  # which looks for the daemon first
            assert (code, "no permission" in err) == (DaemonError.exit_code, True)
        else:
            assert_one_error(code, "Permission denied", out, err)
        assert everything(directory) == before
        assert not (parent / "out.raw").exists()


@pytest.mark.parametrize("command", CHANGES)
def test_a_directory_whose_daemon_was_killed(
    command: str,
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its devices may wait for the next one, with what its maps say."""
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(world.run_dir))
    before = everything(world.killed)
    code = main(arguments(command, world.killed, tmp_path))
    said = capfd.readouterr()
    assert_one_error(code, "was killed", said.out, said.err)
    assert everything(world.killed) == before


@pytest.mark.parametrize("command", [*CHANGES, "warm", "export"])
def test_a_daemon_that_hangs(command: str, hanging: World, tmp_path: Path) -> None:
    before = everything(hanging.killed)
    argv = [*arguments(command, hanging.killed, tmp_path), "--timeout", "500ms"]
    done = run_beside(hanging, argv)
    served = command == "resize"  # which asks nobody
    assert done.returncode == (CacheError if served else DaemonError).exit_code, done.stderr
    assert ("a daemon serves" if served else "has not answered for") in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(hanging.killed) == before


def test_nothing_of_an_image_is_left_where_it_cannot_be_had(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "evict", str(directory), "block:7"]) == 0
    capsys.readouterr()
    before = everything(directory)
    argv = arguments("export", directory, tmp_path)
    assert main([*argv, "--offline", "--json"]) == CacheError.exit_code
    assert "are not in the cache" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert everything(directory) == before
    assert not list(tmp_path.glob("*out*"))
