"""One boot of the image in a VM, and what it reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiervm import disks, payload, qemu
from tiervm.apt import quoted
from tiervm.kernels import Kernel
from tiervm.paths import temporary
from tiervm.say import Failed, Step, plain

BOOT_LIMIT_S = 900.0
MEM_MIB = 2048
GUEST = Path(__file__).resolve().parents[1] / "guest"


@dataclass
class Numbers:
    """What one boot showed: the device as `tierblk status --json` has it, and how long things took."""

    device: dict[str, Any] = field(default_factory=dict)
    attach_s: float = 0.0
    boot_s: float = 0.0


class _Listener:
    """Collects the keeper's notes; shows the console's newest line beside the elapsed time."""

    def __init__(self, step: Step) -> None:
        self.numbers: Numbers | None = None
        self.trouble = ""
        self._step = step

    def note(self, note: dict[str, Any]) -> None:
        """One report of the keeper."""
        if "device" in note:
            self.numbers = Numbers(note["device"], float(note["attach_s"]), float(note["boot_s"]))
        elif note.get("stage") == "attached":
            self._step.hint = f"attached as {note['path']}, Debian starts"
        elif note.get("stage") == "committing":
            self._step.hint = "multi-user reached, the cache's index is being committed"
        self.trouble = str(note.get("trouble", self.trouble))

    def line(self, line: str) -> None:
        """One line of the console."""
        self._step.hint = plain(line) or self._step.hint


def boot_image(
    kernel: Kernel, root: Path, image: Path, cache: Path, link: dict[str, str], title: str
) -> Numbers:
    """Boots the image in a VM with this cache disk. Raises Failed with the console's end when it does not get
    there.
    """
    with temporary("demo") as folder, Step(title) as step:
        environment = quoted([f"{name}={value}" for name, value in link.items()])
        start = f"#!/bin/sh\nexport LANG=C.UTF-8 {environment}\nexec /opt/tierblk/demo/pid1\n"
        code = payload.make_payload(folder / "payload", {"pid1": start}, {"demo": GUEST})
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
