"""What changes from run to run, on a small disk of its own: the project, its Python packages, its tests, the
job.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tiervm.disks import MIB, ext4_of
from tiervm.paths import GUEST_FILES, REPO, alone, build_dir, key_of, making, prune
from tiervm.say import Failed, Step, output

# Tools of development, large and of no use inside: everything else of the environment travels.
LEFT_OUT = (
    "ruff",
    "mypy",
    "mypyc",
    "pip",
    "setuptools",
    "pkg_resources",
    "wheel",
    "_distutils_hack",
    "__pycache__",
    # matplotlib, and what it brings
    "matplotlib",
    "mpl_toolkits",
    "numpy",
    "numpy.libs",
    "PIL",
    "pillow.libs",
    "contourpy",
    "fontTools",
    "kiwisolver",
    "pyparsing",
    "dateutil",
    "tzdata",
    # botocore: no test on a real kernel has an S3 store so far
    "botocore",
    "jmespath",
    "urllib3",
    # google-auth, and what it brings: as botocore
    "google",
    "cryptography",
    "pyasn1",
    "pyasn1_modules",
)
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.c", "*.o", "*.h", "*.pth", "__editable__*", ".*")
FREE_BYTES = 16 * MIB


def venv() -> Path:
    """The virtual environment that the project is installed in: `$TIERBLK_VENV`, else `.venv` of this
    checkout.
    """
    return Path(os.environ.get("TIERBLK_VENV", REPO / ".venv"))


def site_packages() -> Path:
    """Its packages. Raises Failed when there is none, or one of a Python whose extensions the guest cannot
    load.
    """
    found = sorted(venv().glob("lib/python3*/site-packages"))
    if not found:
        raise Failed(f"there is no Python environment at {venv()}; `make setup` makes it.")
    if found[0].parent.name != "python3.11":
        raise Failed(
            f"{venv()} is of {found[0].parent.name}; the VM's Python is 3.11, so make it with python3.11."
        )
    return found[0]


def _python_tree() -> Path:
    """A folder with the environment's packages, compiled; made again when a package comes, goes or changes
    version.
    """
    source = site_packages()
    # Our own package is rebuilt often and comes from the checkout anyway.
    records = sorted(
        path for path in source.glob("*.dist-info/RECORD") if not path.parent.name.startswith("tierblk-")
    )
    key = key_of("1", *(f"{path.parent.name} {path.stat().st_mtime_ns}" for path in records), *LEFT_OUT)
    target = build_dir() / "python" / key
    with alone("python"):
        if target.is_dir():
            return target
        with Step("python packages for the VM"), making(target) as folder:
            shutil.copytree(
                source, folder, ignore=shutil.ignore_patterns(*LEFT_OUT, "*.pth", "__editable__*", "a.out")
            )
            _compile(folder)
        prune(target.parent, kept=2)
    return target


def _compile(folder: Path) -> None:
    """Byte code beside the sources: compiling in an emulator takes many times as long as here."""
    python = venv() / "bin/python"
    output([python, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", folder])


def make_payload(target: Path, job: dict[str, str], extra: dict[str, Path] | None = None) -> Path:
    """Writes the payload disk. `job`: file name -> script text, put in job/; `extra`: path inside -> folder
    to copy.
    """
    with making(target.with_suffix(".tree")) as tree:
        tree.mkdir()
        _project(tree)
        shutil.copytree(GUEST_FILES, tree / "vm")
        for inside, folder in (extra or {}).items():
            shutil.copytree(folder, tree / inside, ignore=NOT_CODE, dirs_exist_ok=True)
        (tree / "job").mkdir()
        for name, text in job.items():
            (tree / "job" / name).write_text(text)
            (tree / "job" / name).chmod(0o755)
        used_bytes = sum(4096 + path.lstat().st_size for path in tree.rglob("*"))
        target.unlink(missing_ok=True)
        ext4_of(tree, target, (used_bytes * 5 // 4 + FREE_BYTES) // MIB * MIB, label="payload")
    shutil.rmtree(target.with_suffix(".tree"))
    return target


def _project(tree: Path) -> None:
    """Packages and project in lib/ (folders behind links become real ones), tests, examples, the pytest
    settings.
    """
    if venv().exists():
        output(["cp", "-a", "--reflink=auto", _python_tree(), tree / "lib"])
    else:
        (tree / "lib").mkdir()
    if (REPO / "tierblk").is_dir():
        shutil.copytree(REPO / "tierblk", tree / "lib/tierblk", ignore=NOT_CODE, dirs_exist_ok=True)
        if venv().exists():
            _compile(tree / "lib/tierblk")
    for name in ("tests", "configs"):
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, tree / name, ignore=NOT_CODE)
    if (REPO / "pyproject.toml").exists():
        shutil.copy(REPO / "pyproject.toml", tree)
