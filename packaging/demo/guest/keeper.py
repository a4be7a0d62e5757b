"""Inside the demo's VM, beside the Debian that boots: serves the image, attaches it, watches, reports,
switches off.

Usage: keeper.py FIFO. Writes the device's path to FIFO, and one JSON object a line to the second serial line.
Environment: RTT_MS, MBIT shape the loopback that the image comes over. ROOT=volume: the device can be written
to, and is the root itself. PACKAGES=install, check: those beside the image are installed there, or looked at.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from tierdemo import trace

DEMO = Path("/opt/tierblk/demo")
HOST = Path("/dev/ttyS1")
CONFIG = Path("/etc/tierblk/debian.toml")
CACHE_DIR = Path("/var/cache/tierblk")
# In the image's world; ours is another one.
REACHED = Path("/proc/1/root/var/multi-user-reached")
POLL_S = 0.2
# The daemon commits its index every five seconds (cache.commit_interval): after this the cache is on the
# disk.
COMMITTED_AFTER_S = 8.0
TRACEFS = Path("/run/demo/tracefs")
SERVER_LOG = Path("/run/demo/served")
NOTE_BYTES = 2048


def tell(**note: Any) -> None:
    """One JSON line for the host."""
    with open(HOST, "w") as line:
        line.write(json.dumps(note) + "\n")


def uptime_s() -> float:
    """Seconds since the kernel started."""
    return float(Path("/proc/uptime").read_text().split()[0])


def run(*words: str | Path) -> str:
    """A command's standard output; what it says on the other stream is for the console."""
    return subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True).stdout


def tierblk(*words: str) -> str:
    """The command line, as a user runs it."""
    return run(sys.executable, "-m", "tierblk", *words)


def prepare() -> None:
    """What a user has before he attaches: a server with an image, a config, room for the cache."""
    Path("/image").mkdir()
    run("mount", "-t", "ext4", "-o", "ro", "/run/disks/image", "/image")
    with open("/etc/hosts", "a") as hosts:
        hosts.write("127.0.0.1 images.example\n")
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    volume = '[volume]\nmode = "local"\n' if os.environ.get("ROOT") == "volume" else ""
    CONFIG.write_text((DEMO / "debian.toml").read_text() + volume)
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    Path("/cache/tierblk").mkdir(exist_ok=True)
    run("mount", "--bind", "/cache/tierblk", CACHE_DIR)
    shape(float(os.environ.get("RTT_MS") or 0), float(os.environ.get("MBIT") or 0))
    run("nginx", "-c", DEMO / "nginx.conf")
    run("modprobe", "ublk_drv")


def recorder() -> trace.Recorder | None:
    """Notes every request from now on; None on a kernel that cannot."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        TRACEFS.mkdir()
        run("mount", "-t", "tracefs", "tracefs", TRACEFS)
        return trace.Recorder(TRACEFS)
    return None


def tell_trace(recording: trace.Recorder, path: str) -> None:
    """What the device was asked for, in pieces that fit a serial line."""
    lines, whole = recording.stop()
    device = Path(f"/sys/block/{Path(path).name}/dev").read_text().strip()
    text = trace.to_csv(trace.requests(lines, device))
    packed = base64.b64encode(zlib.compress(text.encode())).decode()
    for start in range(0, len(packed), NOTE_BYTES):
        tell(trace=packed[start : start + NOTE_BYTES])
    tell(trace_whole=whole)


def device_status() -> dict[str, Any]:
    """The device as `tierblk status --json` has it."""
    status = json.loads(tierblk("status", "debian", "--json"))
    return dict(status["devices"][0] if "devices" in status else status)


def shape(rtt_ms: float, rate_mbit: float) -> None:
    """Makes the loopback a slower link: each direction gets half of the round trip, and the rate."""
    if rtt_ms or rate_mbit:
        run("modprobe", "sch_netem")
        words = ["delay", f"{rtt_ms / 2}ms"] if rtt_ms else []
        words += ["rate", f"{rate_mbit}mbit"] if rate_mbit else []
        run("tc", "qdisc", "add", "dev", "lo", "root", "netem", "limit", "100000", *words)


def watch(began_s: float, attached_s: float, path: str, recording: trace.Recorder | None) -> None:
    """Waits for multi-user.target, then reports the device's numbers."""
    while not REACHED.exists():
        time.sleep(POLL_S)
    reached_s = float(REACHED.read_text().split()[0])
    device = device_status()
    packages = {}
    if do := os.environ.get("PACKAGES"):
        tell(stage="packages")
        packages = install() if do == "install" else check()
        device = device_status()
    if recording is not None:
        tell_trace(recording, path)
    tell(served_bytes=sum(map(int, SERVER_LOG.read_text().split())))
    tell(device=device, packages=packages, attach_s=attached_s - began_s, boot_s=reached_s - attached_s)


def in_debian(*words: str | Path) -> str:
    """A command's output in the image's world."""
    return run("nsenter", "--target", "1", "--mount", "--root", "--wd=/", *words)


def install() -> dict[str, Any]:
    """dpkg installs what lies beside the image, on the device that Debian runs from."""
    folder = Path("/proc/1/root/var/tmp/later")
    shutil.copytree("/image/later", folder)
    began_s = uptime_s()
    in_debian("sh", "-c", "DEBIAN_FRONTEND=noninteractive dpkg --install /var/tmp/later/*.deb >/dev/console")
    return {"count": len(list(folder.iterdir())), "seconds": uptime_s() - began_s}


def check() -> dict[str, Any]:
    """What was installed is there and works, and neither dpkg nor the filesystem has anything to say."""
    names = [
        in_debian("dpkg-deb", "--field", f"/var/tmp/later/{path.name}", "Package").strip()
        for path in Path("/image/later").iterdir()
    ]
    states = in_debian("dpkg-query", "--show", "--showformat", "${db:Status-Status} ", *names).split()
    errors = [path.read_text().strip() for path in Path("/sys/fs/ext4").glob("ublkb*/errors_count")]
    said = {
        "audit": in_debian("dpkg", "--audit"),
        "verify": in_debian("dpkg", "--verify", *names),
        "not installed": " ".join(state for state in states if state != "installed"),
        "errors of ext4": " ".join(count for count in errors if count != "0"),
        "hello": "" if in_debian("hello") == "Hello, world!\n" else "says something else",
    }
    return {"count": len(names), "wrong": {name: words for name, words in said.items() if words}}


def main() -> None:
    """From the server to switching off; whatever fails is a sentence for the host."""
    fifo: Path | None = Path(sys.argv[1])
    assert fifo is not None
    try:
        prepare()
        recording = recorder() if os.environ.get("ROOT") != "volume" else None
        began_s = uptime_s()
        path = tierblk("attach", str(CONFIG)).strip()
        attached_s = uptime_s()
        tell(stage="attached", path=path)
        fifo.write_text(path + "\n")
        fifo = None  # process 1 has read it, and would let nobody else open it
        watch(began_s, attached_s, path, recording)
        if os.environ.get("ROOT") != "volume":
            tell(stage="committing")
            time.sleep(COMMITTED_AFTER_S)
            os.sync()
        tell(exit=0)
    except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
        tell(trouble=f"{type(error).__name__}: {error}")
        if fifo is not None:
            fifo.write_text("\n")
    finally:
        # Hard, as a power cut: what was flushed must stand it, and a cache of clean blocks all the more.
        Path("/proc/sysrq-trigger").write_text("o")


if __name__ == "__main__":
    main()
