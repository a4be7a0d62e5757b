"""Images that qcow2.py writes, judged by qemu-img."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tierblk.qcow2 import CLUSTER_BYTES, Qcow2Writer

TIMEOUT_S = 60


def qemu_img(*words: str | Path) -> str:
    done = subprocess.run(
        ["qemu-img", *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(path: Path, size_bytes: int, content: dict[int, bytes]) -> None:
    """content: by number of the cluster."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        writer = Qcow2Writer(descriptor, size_bytes)
        for cluster, data in content.items():
            writer.write(cluster * CLUSTER_BYTES, data)
        writer.finish()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("size_bytes", "clusters"),
    [(512, 1), (CLUSTER_BYTES, 0), (3 * CLUSTER_BYTES + 1536, 4), (700 << 20, 300), (40 << 30, 200)],
)
def test_qemu_reads_what_was_written(size_bytes: int, clusters: int, tmp_path: Path) -> None:
    chance = random.Random(size_bytes)
    last = (size_bytes - 1) // CLUSTER_BYTES
    chosen = sorted({last, *(chance.randint(0, last) for _ in range(clusters - 1))} if clusters else set())
    content = {n: chance.randbytes(min(CLUSTER_BYTES, size_bytes - n * CLUSTER_BYTES)) for n in chosen}
    image = tmp_path / "image.qcow2"
    write(image, size_bytes, content)
    found = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", image))
    assert found.get("corruptions", 0) == found.get("leaks", 0) == found["check-errors"] == 0
    assert json.loads(qemu_img("info", "--output=json", "-f", "qcow2", image))["virtual-size"] == size_bytes
    raw = tmp_path / "image.raw"
    with raw.open("wb") as file:
        for n, data in content.items():
            file.seek(n * CLUSTER_BYTES)
            file.write(data)
        file.truncate(size_bytes)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", image, raw)
    assert image.stat().st_size < (len(content) + 20) * CLUSTER_BYTES + size_bytes // 8000


def test_an_image_that_was_not_finished_is_none(tmp_path: Path) -> None:
    path = tmp_path / "half"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    Qcow2Writer(descriptor, 1 << 20).write(0, b"x" * CLUSTER_BYTES)
    os.close(descriptor)
    done = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", path], capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode != 0
