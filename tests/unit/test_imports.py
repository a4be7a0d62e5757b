"""The import contracts of pyproject.toml hold, and would notice if one were broken."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = [
    path for folder in ("tierblk", "cache", "remote") for path in sorted((ROOT / folder).rglob("*.py"))
]
PURE = ("address", "config", "errors", "extent", "partition", "rundir", "units")


def imported(path: Path) -> set[str]:
    """All modules that a file imports, in functions too; those for the type checker only are left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_the_folders_by_their_bare_names(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in ("cache", "remote")}


def users_of(module: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tierblk" / "cache")
        and not path.is_relative_to(ROOT / "tierblk" / "remote")
        if any(name == module or name.startswith(f"{module}.") for name in imported(path))
    }


def test_one_file_opens_lmdb() -> None:
    assert users_of("lmdb") == {"cache/index.py"}


def test_aiohttp_is_known_where_it_is_used() -> None:
    stores = ("az", "bucket", "exchange", "gs", "s3")
    client = {f"remote/{name}.py" for name in (*stores, "client", "direct", "http")}
    assert users_of("aiohttp") == {*client, "tierblk/calls.py", "tierblk/control.py", "tierblk/scrape.py"}


def test_one_file_knows_the_text_format_of_metrics() -> None:
    assert users_of("prometheus_client") == {"tierblk/metrics.py"}
    control = imported(ROOT / "tierblk" / "control.py")
    assert {name for name in control if name.startswith("aiohttp")} == {"aiohttp", "aiohttp.web"}  # no client


def test_the_pure_modules_import_without_a_loop_or_a_database() -> None:
    program = (
        f"import sys\nfor name in {PURE!r}: __import__('tierblk.' + name)\n"
        "print(sorted({'asyncio', 'aiohttp', 'lmdb', 'cffi', '_cffi_backend'} & sys.modules.keys()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert run.stdout == "[]\n"


def test_the_contracts_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    run = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


def test_one_file_knows_each_library_of_credentials() -> None:
    assert users_of("botocore") == {"remote/credentials.py"}
    assert users_of("google") == {"remote/google.py"}
    assert users_of("cryptography") == set()
