"""Every command that looks into a cache directory, on every directory that is not well: one clear error, the
exit code that is documented, and nothing changed. A new command is one more line in COMMANDS."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.cache_rig import changed_index, mounted, run_directory
from tests.look_rig import TIMEOUT_S
from tests.property.host import Host
from tests.property.volume_daemon import NAME, VolumeDaemon
from tierblk.cache import superblock as superblocks
from tierblk.cache.superblock import COPIES, COPY_BYTES
from tierblk.cli.entry import main
from tierblk.core import BLOCK_BYTES
from tierblk.errors import CacheError, DaemonError
from tierblk.rundir import RUN_DIR_VARIABLE

IMAGE = os.urandom(20 * BLOCK_BYTES)
SLOTS = 64
NOBODY = 65534
DIRECTORY = "DIRECTORY"  # where TARGET belongs

COMMANDS = {
    "stat": ["stat", DIRECTORY],
    "stat --json": ["stat", DIRECTORY, "--json"],
    "ls": ["ls", DIRECTORY],
    "ls --json": ["ls", DIRECTORY, "--json"],
    "map": ["map", DIRECTORY],
    "map --json": ["map", DIRECTORY, "--json"],
    "blocks": ["blocks", DIRECTORY, "all"],
    "blocks --sums": ["blocks", DIRECTORY, "all", "--sums"],
    "blocks --json": ["blocks", DIRECTORY, "all", "--json"],
    "dump": ["dump", DIRECTORY, "0+200KiB"],
    "dump --raw": ["dump", DIRECTORY, "0+200KiB", "--raw"],
    "verify": ["verify", DIRECTORY],
    "verify --json": ["verify", DIRECTORY, "--json"],
}
EXAMINES = ("verify",)  # these go on where others refuse, and name what is wrong among their results


@dataclass(frozen=True)
class World:
    """A directory that ended in order, one whose daemon was killed, and where the latter's maps are."""

    ended: Path
    killed: Path
    run_dir: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with run_directory(folder) as memory:
        host = Host(folder, memory)
        daemon = VolumeDaemon(host, SLOTS, IMAGE, 30 * BLOCK_BYTES)
        assert daemon.door.read(0, len(IMAGE)) == IMAGE
        daemon.door.write(BLOCK_BYTES, b"w" * (2 * BLOCK_BYTES))
        daemon.quiet(cycle_held=False)
        ended = host.crash(kill=True)
        daemon.stop(clean=True)
        yield World(ended, host.directory, host.run_dir)


@pytest.fixture
def directory(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    return Path(shutil.copytree(world.ended, tmp_path / "cache"))


def everything(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time and content of all files below; what LMDB notes of its readers is no content."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted([folder, *folder.rglob("*")])
        if path.name != "lock.mdb"
    }


def arguments(command: str, target: Path | str) -> list[str]:
    return ["cache", *(str(target) if word == DIRECTORY else word for word in COMMANDS[command])]


def assert_one_error(code: int, words: str, said: str, errors: str) -> None:
    """In errors, and nothing of a traceback anywhere."""
    assert code == CacheError.exit_code, (said, errors)
    lines = [line for line in errors.splitlines() if line.startswith("tierblk: ")]
    assert len(lines) == 1, errors
    assert words in lines[0]
    assert "Traceback" not in said + errors
    assert "unexpected" not in errors


def _cut_index(directory: Path) -> None:
    os.truncate(directory / "index" / "data.mdb", 3 * 4096)


def _foreign(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "slots").write_bytes(b"not ours" * 4096)
    (directory / "letter.txt").write_text("dear reader")


def _only_foreign(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "letter.txt").write_text("dear reader")


def _newer(directory: Path) -> None:
    with (directory / "slots").open("r+b") as slots:
        for at in range(COPIES):
            slots.seek(at * COPY_BYTES)
            copy = superblocks.unpack(slots.read(COPY_BYTES))
            assert copy is not None
            slots.seek(at * COPY_BYTES)
            slots.write(superblocks.pack(replace(copy, version=superblocks.FORMAT_VERSION + 1)))


def _newer_index(directory: Path) -> None:
    with changed_index(directory) as index, index.changing(rows=0) as txn:
        txn.put(b"format", (superblocks.FORMAT_VERSION + 1).to_bytes(4, "little"), db=index.meta_db)


def _unknown_kind(directory: Path) -> None:
    with changed_index(directory) as index:
        index.put_layer(replace(index.layers()[0], layer_id=9, kind="mirror"))


def _no_superblock(directory: Path) -> None:
    with (directory / "slots").open("r+b") as slots:
        for at in range(COPIES):
            slots.seek(at * COPY_BYTES + 40)
            slots.write(b"\xff" * 8)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "index truncated": (_cut_index, "is damaged"),
    "index missing": (lambda path: shutil.rmtree(path / "index"), "the cache's index is missing"),
    "index of a newer version": (_newer_index, "was made by a newer tierblk"),
    "slots missing": (lambda path: (path / "slots").unlink(), "it has no slots"),
    "sums missing": (lambda path: (path / "sums").unlink(), "No such file or directory"),
    "superblocks damaged": (_no_superblock, "both superblocks"),
    "newer version": (_newer, "was made by a newer tierblk"),
    "layer of an unknown kind": (_unknown_kind, "holds a mirror, which this version cannot serve"),
    "foreign slots": (_foreign, "is not a slots file of tierblk"),
    "foreign files": (_only_foreign, "it has no slots"),
    "nothing": (shutil.rmtree, "there is no cache directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_directory(
    command: str, damage: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = DAMAGES[damage]
    change(directory)
    before = everything(directory.parent)
    code = main(arguments(command, directory))
    said = capsys.readouterr()
    assert_one_error(code, words, said.out, said.err)
    if command.endswith("--json"):
        assert json.loads(said.out)["error"]["exit_code"] == code
    assert everything(directory.parent) == before


@pytest.mark.parametrize("name", ["slots", "sums"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_too_short(
    command: str, name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(directory / name, (directory / name).stat().st_size // 4)
    before = everything(directory)
    code = main(arguments(command, directory))
    said = capsys.readouterr()
    if command.split()[0] in EXAMINES:
        assert code == CacheError.exit_code
        assert f"{name} has" in said.out
        assert "Traceback" not in said.err
    else:
        assert_one_error(code, f"{name} is damaged: it has", said.out, said.err)
    assert everything(directory) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_that_is_well(
    command: str, directory: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    before = everything(directory)
    assert main(arguments(command, directory)) == 0
    said = capsysbinary.readouterr()
    assert said.out
    assert b"tierblk:" not in said.err
    assert everything(directory) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_filesystem(
    command: str, world: World, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Looking needs no writing."""
    with mounted("tmpfs", tmp_path / "disk", "size=64m") as disk:
        directory = Path(shutil.copytree(world.ended, disk / "cache"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        before = everything(directory)
        code = main(arguments(command, directory))
        said = capfdbinary.readouterr()
        assert (code, b"tierblk:" in said.err) == (0, False), said.err
        assert everything(directory) == before


def as_nobody(argv: list[str], folder: Path) -> tuple[int, str, str]:
    """main() in a process without rights; what it needs is imported by now. (exit code, stdout, stderr)"""
    import tierblk.cache.census
    import tierblk.cache.reading
    import tierblk.cache.verify  # noqa: F401

    outputs = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("out", "err")]
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        code = 99
        try:
            for fd, to in zip(outputs, (1, 2), strict=True):
                os.dup2(fd, to)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            code = main(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    said = [os.pread(fd, 1 << 20, 0).decode() for fd in outputs]
    for fd in outputs:
        os.close(fd)
    return os.waitstatus_to_exitcode(status), said[0], said[1]


@pytest.mark.parametrize("what", ["the files", "the directory", "its parent"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_permission(
    command: str, what: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path / "run"))
    with tempfile.TemporaryDirectory(prefix="tierblk-test-") as name:
        parent = Path(name)
        directory = Path(shutil.copytree(world.ended, parent / "cache"))
        os.chmod(parent, 0o700 if what == "its parent" else 0o755)
        os.chmod(directory, 0o700 if what == "the directory" else 0o755)
        before = everything(directory)
        code, out, err = as_nobody(arguments(command, directory), tmp_path)
        assert_one_error(code, "Permission denied", out, err)
        assert "hint: run the command as root" in err
        assert everything(directory) == before


HANGING = """
import fcntl, json, os, signal, socket, sys
directory, run_dir = sys.argv[1:]
slots = os.open(os.path.join(directory, "slots"), os.O_RDWR)
fcntl.flock(slots, fcntl.LOCK_EX | fcntl.LOCK_NB)
listener = socket.socket(socket.AF_UNIX)
os.chdir(run_dir)
listener.bind("control.sock")
listener.listen(16)
with open("daemon.json", "w") as file:
    json.dump({"pid": os.getpid(), "cache_dir": directory}, file)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture(scope="module")
def hanging(world: World) -> Iterator[World]:
    """A daemon that is stopped: it has the lock, and its socket takes connections and never answers."""
    uuid = superblocks.unpack((world.killed / "slots").read_bytes()[:COPY_BYTES])
    assert uuid is not None
    command = [sys.executable, "-c", HANGING, str(world.killed), str(world.run_dir / str(uuid.uuid))]
    process = subprocess.Popen(command)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        yield world
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_S)


def run_beside(world: World, argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tierblk", *argv],
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        env={**os.environ, RUN_DIR_VARIABLE: str(world.run_dir)},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_daemon_that_hangs(command: str, hanging: World) -> None:
    """The files are looked at beside it; what only it knows is missing, and a line says so."""
    before = everything(hanging.killed)
    done = run_beside(hanging, arguments(command, hanging.killed))
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if command in ("stat", "ls"):
        assert "has not answered for" in done.stderr
    elif command in ("stat --json", "ls --json"):
        assert "has not answered for" in json.loads(done.stdout)["daemon_trouble"]
    assert everything(hanging.killed) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_while_a_daemon_hangs(command: str, hanging: World) -> None:
    """It may be its device's."""
    before = everything(hanging.killed)
    done = run_beside(hanging, [*arguments(command, NAME), "--timeout", "200ms"])
    assert done.returncode == DaemonError.exit_code
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("tierblk: "))
    assert "has not answered for 0.2 s" in line
    assert everything(hanging.killed) == before
