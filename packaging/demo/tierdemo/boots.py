"""One boot of the image in a VM, and what it reported."""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiervm import disks, payload, qemu
from tiervm.apt import quoted
from tiervm.kernels import Kernel
from tiervm.paths import temporary
from tiervm.say import Failed, Step, plain

from tierdemo import trace

BOOT_LIMIT_S = 900.0
MEM_MIB = 2048
HERE = Path(__file__).resolve().parent
GUEST = HERE.parent / "guest"


@dataclass
class Numbers:
    """What one boot showed: the device as `tierblk status --json` has it, how long things took, what the
    kernel asked of the device (None where it could not be recorded whole), what the server sent by its log,
    and what dpkg did.
    """

    device: dict[str, Any] = field(default_factory=dict)
    attach_s: float = 0.0
    boot_s: float = 0.0
    reads: list[trace.Request] | None = None
    served_bytes: int = 0
    packages: dict[str, Any] = field(default_factory=dict)


class _Listener:
    """Collects the keeper's notes; shows the console's newest line beside the elapsed time."""

    def __init__(self, step: Step) -> None:
        self.numbers: Numbers | None = None
        self.trouble = ""
        self._trace = ""
        self._trace_whole = False
        self._served_bytes = 0
        self._step = step

    def note(self, note: dict[str, Any]) -> None:
        """One report of the keeper."""
        if "device" in note:
            times_s = float(note["attach_s"]), float(note["boot_s"])
            packages = note.get("packages", {})
            self.numbers = Numbers(note["device"], *times_s, self._reads(), self._served_bytes, packages)
        elif note.get("stage") == "attached":
            self._step.hint = f"attached as {note['path']}, Debian starts"
        elif note.get("stage") == "committing":
            self._step.hint = "multi-user reached, the cache's index is being committed"
        elif note.get("stage") == "packages":
            self._step.hint = "multi-user reached, dpkg works"
        self._trace += str(note.get("trace", ""))
        self._trace_whole = bool(note.get("trace_whole", self._trace_whole))
        self._served_bytes = int(note.get("served_bytes", self._served_bytes))
        self.trouble = str(note.get("trouble", self.trouble))

    def _reads(self) -> list[trace.Request] | None:
        """The trace that came in pieces; None when it is not all there."""
        if not self._trace_whole:
            return None
        try:
            return trace.from_csv(zlib.decompress(base64.b64decode(self._trace)).decode())
        except (binascii.Error, zlib.error, ValueError):  # a serial line that lost letters
            return None

    def line(self, line: str) -> None:
        """One line of the console."""
        self._step.hint = plain(line) or self._step.hint


def boot_image(
    kernel: Kernel, root: Path, image: Path, cache: Path, settings: dict[str, str], title: str
) -> Numbers:
    """Boots the image in a VM with this cache disk. settings: of keeper.py. Raises Failed with the console's
    end when it does not get there.
    """
    with temporary("demo") as folder, Step(title) as step:
        environment = quoted([f"{name}={value}" for name, value in settings.items()])
        start = f"#!/bin/sh\nexport LANG=C.UTF-8 {environment}\nexec /opt/tierblk/demo/pid1\n"
        code = payload.make_payload(
            folder / "payload", {"pid1": start}, {"demo": GUEST, "demo/tierdemo": HERE}
        )
        attached = [
            qemu.Disk("root", root, "snapshot"),
            qemu.Disk("payload", code, "ro"),
            qemu.Disk("image", image, "ro"),
            qemu.Disk("cache", cache),
        ]
        listener = _Listener(step)
        machine = qemu.Machine(kernel, attached, mem_mib=MEM_MIB, timeout_s=BOOT_LIMIT_S)
        machine.arguments = "systemd.show_status=yes systemd.log_color=no"
        machine.on_line, machine.on_note = listener.line, listener.note
        outcome = qemu.boot(machine)
    if listener.numbers is None or outcome.status != 0:
        words = "\n    ".join(list(outcome.tail)[-30:])
        raise Failed(f"{title} failed: {listener.trouble or outcome.trouble}.\n    {words}")
    return listener.numbers


def new_cache(folder: Path) -> Path:
    """An empty disk for the cache directory."""
    return disks.scratch(folder / "cache", 6 * disks.GIB)
