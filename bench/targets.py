"""What is measured side by side: a device under test each, as a context manager that takes it away again."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fio import BenchError
from bench.process import output, running, wait_until

MIB = 1 << 20
PAGE_BYTES = 4096
READ_BYTES = 1 * MIB

NGINX_CONF = """\
daemon off;
user root;
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/nginx.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {home}/tmp; proxy_temp_path {home}/tmp; fastcgi_temp_path {home}/tmp;
    uwsgi_temp_path {home}/tmp; scgi_temp_path {home}/tmp;
    sendfile on;
    keepalive_requests 1000000;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@dataclass(frozen=True)
class Target:
    """A block device that requests can be sent to, and the process that serves it, if one does."""

    name: str
    path: str
    pid: int | None = None


def make_image(path: Path, size_bytes: int) -> None:
    """The same bytes every time: no page is like another, none is zero, none compresses."""
    with open(path, "wb") as file:
        for piece in _pieces(size_bytes):
            file.write(piece)


def _pieces(size_bytes: int) -> Iterator[bytearray]:
    """Such bytes, a MiB at a time; a piece lasts until the next is asked for."""
    piece = bytearray(random.Random(size_bytes).randbytes(MIB))
    for start in range(0, size_bytes, MIB):
        for page in range(0, MIB, PAGE_BYTES):
            piece[page : page + 8] = (start + page + 1).to_bytes(8, "little")
        yield piece


def write_all(path: str, size_bytes: int) -> str:
    """Writes the bytes of such an image over a device, past the page cache, and flushes it; their
    SHA-256."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, MIB) as buffer:
            for i, piece in enumerate(_pieces(size_bytes)):
                digest.update(piece)
                buffer[:] = piece
                if os.pwritev(fd, [buffer], i * MIB) != MIB:
                    raise BenchError(f"{path} took only a part of a write")
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def read_all(path: str) -> str:
    """Reads a device from end to end past the page cache; the SHA-256 of its bytes."""
    return read_start(path, None)


def read_start(path: str, size_bytes: int | None) -> str:
    """The same of its first bytes; None: all of them. size_bytes: a multiple of READ_BYTES."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, READ_BYTES) as buffer:
            offset = 0
            while offset != size_bytes and (count := os.preadv(fd, [buffer], offset)):
                digest.update(memoryview(buffer)[:count])
                offset += count
    finally:
        os.close(fd)
    return digest.hexdigest()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def nginx(home: Path, root: Path) -> Iterator[str]:
    """The address under which the files of `root` are served on loopback."""
    port = _free_port()
    home.mkdir(parents=True, exist_ok=True)
    conf = home / "nginx.conf"
    conf.write_text(NGINX_CONF.format(home=home, root=root, port=port))

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with running(["nginx", "-p", home, "-c", conf, "-e", home / "nginx.log"], home / "nginx.out") as process:
        wait_until(lambda: process.poll() is not None or answers(), "nginx listens")
        if process.poll() is not None:
            raise BenchError(f"nginx ended: {(home / 'nginx.out').read_text()[-500:]}")
        yield f"http://127.0.0.1:{port}"


class Tierblk:
    """A device of a daemon of its own, driven by the command line as a user would."""

    def __init__(
        self,
        home: Path,
        cache_dir: Path,
        url: str | None,
        cache_mib: int,
        *,
        name: str = "tierblk",
        device_name: str = "bench",
        volume: str = "",
        **device: str | int,
    ) -> None:
        """url: of its base, if it has one; volume: size of its local volume, if it has one. name: in the
        report; device: keys of its [device]. Devices of one daemon have one cache_dir, other homes and other
        device names."""
        self.name = name
        self.device_name = device_name
        self.home = home
        self.cache_dir = cache_dir
        self.slots = cache_dir / "slots"
        self._config = home / "tierblk.toml"
        home.mkdir(parents=True, exist_ok=True)
        self._config.write_text(
            f'[device]\nname = "{device_name}"\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in device.items())
            + (f'[base]\nurl = "{url}"\n' if url else "")
            + (f'[volume]\nmode = "local"\nsize = "{volume}"\n' if volume else "")
            + f'[cache]\ndir = "{cache_dir}"\nsize = "{cache_mib}MiB"\n'
        )

    def _tierblk(self, *words: str) -> str:
        return output([sys.executable, "-m", "tierblk", *words])

    def attach(self) -> Target:
        """Raises BenchError."""
        path = self._tierblk("attach", str(self._config)).strip()
        status = self.status()
        return Target(self.name, path, int(status["daemon"]["pid"]))

    def status(self) -> dict[str, Any]:
        """The device as `tierblk status --json` shows it, with its daemon under `daemon`."""
        words = ("status", "--json", "--cache-dir", str(self.cache_dir))
        document = json.loads(self._tierblk(*words))
        (device,) = (each for each in document["devices"] if each["name"] == self.device_name)
        return {**device, "daemon": document["daemons"][0]}

    def wait_cached(self, size_bytes: int) -> None:
        """Until that much is in the cache and nothing is on its way there."""

        def cached() -> bool:
            status = self.status()
            return int(status["cached_bytes"]) >= size_bytes and int(status["daemon"]["fills"]) == 0

        wait_until(cached, "everything is in the cache", 60)

    def stop(self) -> None:
        self._tierblk("stop", "--cache-dir", str(self.cache_dir))


@contextmanager
def attached(tierblk: Tierblk) -> Iterator[Target]:
    """The device, for the length of the block."""
    with all_attached([tierblk]) as (target,):
        yield target


@contextmanager
def all_attached(devices: Sequence[Tierblk]) -> Iterator[list[Target]]:
    """Devices of one daemon (one cache_dir), for the length of the block. Raises BenchError."""
    targets = [devices[0].attach()]
    try:
        targets += [device.attach() for device in devices[1:]]
        yield targets
    finally:
        devices[0].stop()


@contextmanager
def loop(file: Path, *, writable: bool = False) -> Iterator[Target]:
    """The kernel's loop driver with direct I/O. Raises BenchError when the file's filesystem does not do
    it."""
    allowed = [] if writable else ["--read-only"]
    path = output(["losetup", "--find", "--show", *allowed, "--direct-io=on", file]).strip()
    try:
        if Path(f"/sys/block/{Path(path).name}/loop/dio").read_text().strip() != "1":
            raise BenchError(f"loop does no direct I/O on {file}, so it is no peer")
        yield Target("loop", path)
    finally:
        output(["losetup", "--detach", path])


@contextmanager
def nbdkit(home: Path, file: Path) -> Iterator[Target]:
    """nbdkit's file plugin behind a Unix socket, and the kernel's nbd client. Raises BenchError."""
    address = home / "nbdkit.sock"
    with _nbd("nbdkit", ["nbdkit", "-f", "-r", "-U", address, "file", file], address) as target:
        yield target


@contextmanager
def qemu_nbd(home: Path, file: Path) -> Iterator[Target]:
    """QEMU's server over the file, behind a Unix socket, and the kernel's nbd client. Raises BenchError."""
    address = home / "qemu.sock"
    with _nbd("qemu", ["qemu-nbd", "-r", "-t", "-k", address, "-f", "raw", file], address) as target:
        yield target


@contextmanager
def _nbd(name: str, command: Sequence[str | Path], address: Path) -> Iterator[Target]:
    """A server that listens at a Unix socket, as a device of the kernel's nbd client."""
    free = [node for node in Path("/sys/block").glob("nbd*") if not (node / "pid").exists()]
    if not free:
        raise BenchError("there is no free /dev/nbdN; modprobe nbd")
    path = f"/dev/{min(free, key=lambda node: int(node.name[3:])).name}"
    words = address.with_suffix(".out")
    with running(command, words) as process:
        wait_until(lambda: process.poll() is not None or address.exists(), f"{name} listens")
        if process.poll() is not None:
            raise BenchError(f"{name} ended: {words.read_text()[-300:]}")
        output(["nbd-client", "-unix", address, path, "-b", "512"])
        try:
            yield Target(name, path, process.pid)
        finally:
            output(["nbd-client", "-d", path])


@contextmanager
def nbd_over_http(kind: str, home: Path, url: str) -> Iterator[str]:
    """The NBD address of a peer that reads an image over HTTP without a cache directory of its own: nbdkit's
    curl plugin, the same behind its cache filter, or QEMU's http driver. Raises BenchError."""
    address = home / "peer.sock"
    address.unlink(missing_ok=True)
    plugin = ["curl", f"url={url}"]
    words: dict[str, list[str | Path]] = {
        "nbdkit": ["nbdkit", "-f", "-r", "-U", address, *plugin],
        "nbdkit+cache": [
            "nbdkit", "-f", "-r", "-U", address, "--filter=cache", *plugin, "cache-on-read=true",
        ],
        "qemu": ["qemu-nbd", "-r", "-t", "-e", "4", "-k", address, "-f", "raw", url],
    }  # fmt: skip
    with running(words[kind], home / "peer.out") as process:
        wait_until(lambda: process.poll() is not None or address.exists(), f"{kind} listens")
        if process.poll() is not None:
            raise BenchError(f"{kind} ended: {(home / 'peer.out').read_text()[-300:]}")
        yield f"nbd+unix:///?socket={address}"


def null_blk() -> Target | None:
    """The kernel's own device that does nothing, where there is one: what the block layer and fio cost."""
    if not Path("/dev/nullb0").exists():
        try:
            output(["modprobe", "null_blk", "nr_devices=1"])
        except BenchError:
            return None
    return Target("null_blk", "/dev/nullb0") if Path("/dev/nullb0").exists() else None
