"""Where the blocks of a file lie on a device, as debugfs of e2fsprogs tells it of ext2, ext3 and ext4."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tierblk.errors import DeviceError
from tierblk.extent import Extent

TIMEOUT_S = 120.0
_EXTENT = re.compile(r"^\s*\d+/\s*\d+\s+\d+/\s*\d+\s+\d+\s*-\s*\d+\s+(\d+)\s*-\s*(\d+)\s+\d+", re.MULTILINE)
_BLOCK_SIZE = re.compile(r"^Block size:\s+(\d+)$", re.MULTILINE)


def extents_of_file(node: Path, path: str) -> list[Extent]:
    """Bytes of the device, ascending, of all blocks of a regular file. DeviceError: debugfs is not there,
    does not know the filesystem, or finds no such file."""
    if not path.startswith("/") or re.search(r'["\n\\]', path):
        raise DeviceError(f"{path!r:.200} is no path from the filesystem's root that can be asked for")
    found = _BLOCK_SIZE.search(_debugfs(node, "show_super_stats -h"))
    if found is None:
        raise DeviceError(f"{node} has no ext2, ext3 or ext4", "--partition N says which partition is meant")
    block_bytes = int(found[1])
    what = _debugfs(node, f'stat "{path}"')
    if "Type: regular" not in what:
        raise DeviceError(f"{node} has no regular file {path}", "links are not followed")
    if "extent block maps" in (said := _debugfs(node, f'dump_extents -l "{path}"')):
        numbers = sorted(int(word) for word in _debugfs(node, f'blocks "{path}"').split() if word.isdecimal())
        runs = [(number, number) for number in numbers if number]
    else:
        runs = sorted((int(first), int(last)) for first, last in _EXTENT.findall(said))
    joined: list[Extent] = []
    for first, last in runs:
        extent = Extent(first * block_bytes, (last - first + 1) * block_bytes)
        if joined and joined[-1].end == extent.offset:
            extent = Extent(joined[-1].offset, joined.pop().length + extent.length)
        joined.append(extent)
    return joined


def _debugfs(node: Path, request: str) -> str:
    """What it says, errors too: its exit code is 0 whatever happens."""
    try:
        done = subprocess.run(
            ["debugfs", "-R", request, str(node)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
            text=True,
            errors="replace",
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBUGFS_PAGER": "cat",
                "PAGER": "cat",
                "LC_ALL": "C",
            },
        )
    except FileNotFoundError:
        raise DeviceError("debugfs is not there", "apt-get install e2fsprogs") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{node} does not give its filesystem's blocks within {TIMEOUT_S:g} s") from None
    return done.stdout
