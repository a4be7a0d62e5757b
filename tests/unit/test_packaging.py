"""The house: what is packaged is what is there, and nothing grows beyond its limits."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import tierblk.cache
import tierblk.remote
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    if name
]
FILES = [path for path in TRACKED if path.is_file() and not path.is_symlink()]
LINES_MAX = {".py": 500, ".c": 400}


def test_the_list_of_packages_is_the_folders() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"}
    shipped = {folder for folder in folders if folder.parts[0] not in ("tests", "packaging", "bench")}
    real = {"tierblk.cache": "cache", "tierblk.remote": "remote"}
    assert {real.get(name, name.replace(".", "/")) for name in packages} == set(map(str, shipped))


@pytest.mark.parametrize("name", ["cache", "remote"])
def test_the_links_lead_to_the_real_folders(name: str) -> None:
    link = ROOT / "tierblk" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def test_a_class_exists_once() -> None:
    for package, name in ((tierblk.cache, "cache"), (tierblk.remote, "remote")):
        assert package.__file__ is not None
        assert Path(package.__file__).resolve() == ROOT / name / "__init__.py"


@pytest.mark.parametrize("suffix", LINES_MAX)
def test_files_stay_small(suffix: str) -> None:
    sizes = {path: len(path.read_bytes().splitlines()) for path in FILES if path.suffix == suffix}
    assert {str(path): size for path, size in sizes.items() if size > LINES_MAX[suffix]} == {}


def test_no_file_knows_one_machine() -> None:
    """Nothing in the project depends on where it was written, nor on where its packages came from."""
    own = re.compile(
        rb"/(?:work|home/[a-z]+|Users/[A-Za-z]+)/|extra-index-url|index-url\s*=|https?://[a-z.]*mirror", re.I
    )
    found = {}
    for path in FILES:
        if path == Path(__file__).resolve() or path.suffix in (".png", ".svg"):
            continue
        hit = own.search(path.read_bytes())
        if hit:
            found[str(path.relative_to(ROOT))] = hit[0]
    assert found == {}


def test_every_dependency_is_pinned_for_a_fresh_machine() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=]", requirement)[0] for requirement in wanted}
    assert names <= pins.keys()
    assert f"aiohttp=={pins['aiohttp']}" in PROJECT["project"]["dependencies"]


def test_ci_runs_what_a_developer_runs() -> None:
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    assert run.read_text().rstrip().endswith("exec make test")
