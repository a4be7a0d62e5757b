"""The demo on a machine whose own kernel has ublk: no VM; the image's systemd boots as a container on the
device.

Nothing of the machine is changed for good: the web server lives in a network namespace of its own (so that
shaping never touches the machine's links), the cache and the daemon's runtime folder in a temporary one, and
all of it goes away with the demo, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiervm.payload import venv
from tiervm.say import Failed, Step, output, plain

from tierdemo import trace
from tierdemo.boots import GUEST, Numbers
from tierdemo.image import image_file

TRACEFS = Path("/sys/kernel/tracing")
CONTROL = Path("/dev/ublk-control")
NAMESPACE = "tierblk-demo"
# Addresses set aside for examples: no real network has them.
OUR_ADDRESS, SERVER_ADDRESS = "192.0.2.1", "192.0.2.2"
REACHED = "var/multi-user-reached"
BOOT_LIMIT_S = 300.0
END_LIMIT_S = 60.0
POLL_S = 0.1
CONFIG = """\
[device]
name = "debian"
[base]
url = "http://{server}/debian.raw"
[cache]
dir = "{cache}"
size = "4GiB"
"""
NGINX = """\
worker_processes 1;
daemon off;
user root;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections 512; }}
http {{
  log_format bytes $body_bytes_sent;
  access_log {folder}/served bytes;
  sendfile on;
  keepalive_requests 1000000;
  server {{ listen {server}:80; root {content}; }}
}}
"""


def can_run() -> bool:
    """Whether this machine has the driver (loads its module where it can), and systemd for containers."""
    if not Path("/run/systemd/system").exists():
        return False
    if not CONTROL.exists():
        subprocess.run(["modprobe", "-q", "ublk_drv"], capture_output=True, check=False)
    return CONTROL.exists()


@contextlib.contextmanager
def server(folder: Path, link: dict[str, str]) -> Iterator[None]:
    """nginx with the image in a network namespace, behind a link of the given shape."""
    output(["ip", "netns", "add", NAMESPACE])
    try:
        output(
            ["ip", "link", "add", "tierblk0", "type", "veth", "peer", "name", "tierblk1", "netns", NAMESPACE]
        )
        _address(["ip"], "tierblk0", OUR_ADDRESS, link)
        inside = ["ip", "netns", "exec", NAMESPACE]
        _address([*inside, "ip"], "tierblk1", SERVER_ADDRESS, link)
        config = folder / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, server=SERVER_ADDRESS, content=image_file().parent))
        process = subprocess.Popen(
            [*inside, "nginx", "-c", str(config), "-e", str(folder / "nginx-error.log")]
        )
        try:
            _wait(lambda: _answers(process), 10, "nginx does not answer")
            yield
        finally:
            process.terminate()
            process.wait()
    finally:
        output(["ip", "netns", "del", NAMESPACE])


def _address(ip: list[str], name: str, address: str, link: dict[str, str]) -> None:
    output([*ip, "address", "add", f"{address}/30", "dev", name])
    output([*ip, "link", "set", name, "up"])
    if link:
        words = ["delay", f"{float(link['RTT_MS']) / 2}ms"] if "RTT_MS" in link else []
        words += ["rate", f"{link['MBIT']}mbit"] if "MBIT" in link else []
        output([*ip[:-1], "tc", "qdisc", "add", "dev", name, "root", "netem", "limit", "100000", *words])


def _answers(process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise Failed(f"nginx ended with status {process.returncode}.")
    probe = [sys.executable, "-c", f"import socket; socket.create_connection(('{SERVER_ADDRESS}', 80), 1)"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def boot_image(folder: Path, title: str) -> Numbers:
    """Attaches the image with the cache in `folder`, boots it as a container, detaches. Failed, with a
    sentence.
    """
    config = folder / "debian.toml"
    config.write_text(CONFIG.format(server=SERVER_ADDRESS, cache=folder / "cache"))
    with Step(title) as step, contextlib.ExitStack() as leaving:
        served_before_bytes = _served_bytes(folder)
        recording = leaving.enter_context(_recording())
        began_s = time.monotonic()
        path = _tierblk(folder, "attach", str(config)).strip()
        attached_s = time.monotonic()
        device_number = Path(f"/sys/block/{Path(path).name}/dev").read_text().strip()
        if recording is not None:
            recording.only(device_number)
        leaving.callback(_tierblk, folder, "stop")
        leaving.callback(_tierblk, folder, "detach", "debian")
        root = _overlay(leaving, folder, Path(f"{path}p1"))
        step.hint = f"attached as {path}, Debian starts"
        container = leaving.enter_context(_container(root, step))
        _wait(lambda: _has_booted(root, container, step), BOOT_LIMIT_S, "multi-user.target was not reached")
        boot_s = time.monotonic() - attached_s
        status = json.loads(_tierblk(folder, "status", "debian", "--json"))
        step.hint = "multi-user reached, Debian shuts down"
        device = status["devices"][0] if "devices" in status else status
        numbers = Numbers(
            device, attached_s - began_s, boot_s, None, _served_bytes(folder) - served_before_bytes
        )
        if recording is not None:
            lines, whole = recording.stop()
            numbers.reads = trace.requests(lines, device_number) if whole else None
    return numbers


def _served_bytes(folder: Path) -> int:
    """What nginx has sent so far, by its log."""
    log = folder / "served"
    return sum(map(int, log.read_text().split())) if log.exists() else 0


@contextlib.contextmanager
def _recording() -> Iterator[trace.Recorder | None]:
    """The kernel's record of block requests; None where it keeps none."""
    try:
        recording = trace.Recorder(TRACEFS)
    except OSError:
        yield None
        return
    try:
        yield recording
    finally:
        recording.close()


def _tierblk(folder: Path, *words: str) -> str:
    environment = {**os.environ, "TIERBLK_RUN_DIR": str(folder / "run")}
    return output([venv() / "bin/tierblk", *words], env=environment)


def _overlay(leaving: contextlib.ExitStack, folder: Path, partition: Path) -> Path:
    """The image's first partition, read-only, below a writable layer in memory; unmounted on the way out."""
    image, memory, root = (folder / name for name in ("image", "memory", "root"))
    for path in (image, memory, root):
        path.mkdir(exist_ok=True)

    def mount(*words: str | Path) -> None:
        output(["mount", *words])
        leaving.callback(output, ["umount", words[-1]])

    mount("-t", "ext4", "-o", "ro", partition, image)
    mount("-t", "tmpfs", "tierblk-demo", memory)
    upper, work = memory / "upper", memory / "work"
    upper.mkdir()
    work.mkdir()
    mount("-t", "overlay", "-o", f"lowerdir={image},upperdir={upper},workdir={work}", "overlay", root)
    (root / "etc/fstab").write_text("")
    units = root / "etc/systemd/system"
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "reached.service").write_bytes((GUEST / "reached.service").read_bytes())
    (units / "multi-user.target.wants/reached.service").symlink_to("../reached.service")
    return root


@contextlib.contextmanager
def _container(root: Path, step: Step) -> Iterator[subprocess.Popen[bytes]]:
    """The image's systemd, running; shut down in order on the way out."""
    command = [
        "systemd-nspawn", "--quiet", "--boot", f"--directory={root}", "--machine=tierblk-demo",
        "--register=no", "--private-network", "--link-journal=no", "--resolv-conf=off", "--timezone=off",
        "--console=read-only",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    listener = threading.Thread(target=_listen, args=(process, step), daemon=True)
    listener.start()
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join()


def _has_booted(root: Path, container: subprocess.Popen[bytes], step: Step) -> bool:
    if container.poll() is not None:
        raise Failed(f"systemd-nspawn ended with status {container.returncode}: {step.hint}")
    return (root / REACHED).exists()


def _listen(process: subprocess.Popen[bytes], step: Step) -> None:
    assert process.stdout is not None
    with process.stdout:
        for raw in process.stdout:
            step.hint = plain(raw.decode(errors="replace")) or step.hint


def _wait(holds: Callable[[], bool], limit_s: float, complaint: str) -> None:
    deadline_s = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise Failed(f"{complaint} within {limit_s:.0f} s.")
        time.sleep(POLL_S)
