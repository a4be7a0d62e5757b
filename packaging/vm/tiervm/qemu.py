"""Starts QEMU, listens to it, and always comes back: with the job's exit status, or with what went wrong."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiervm.kernels import Kernel
from tiervm.paths import build_dir, key_of, temporary
from tiervm.say import Step, output, say

PROBE_LIMIT_S = 12.0
# After the job's exit status has arrived, a guest that does not power off (a hung device) is ended.
FAREWELL_S = 15.0
ROOT_IS_UP = "tierblk-vm: root is up"
CONSOLE_TAIL_LINES = 60
# Emulation: without -erms,-fsrm the emulator runs `rep movsb` byte by byte; trixie's kernel panics with cx16.
EMULATED_CPU = {"new": "max,-erms,-fsrm", "old": "max,-erms,-fsrm,-cx16"}
# Where instructions are counted, the kernel is to choose as it does on processors of these years, though the
# emulated one does not offer it: copies by one instruction, calls through pointers without a detour.
COUNTED_ARGUMENTS = "setcpuid=fsrm spectre_v2=off"


@dataclass(frozen=True)
class Disk:
    """A disk of a VM: the guest finds it as /run/disks/NAME. `mode`: "rw", "ro", or "snapshot" (changes are
    lost).
    """

    name: str
    file: Path
    mode: str = "rw"

    def options(self) -> list[str]:
        """QEMU's words for it. Host caching is unsafe on purpose: these disks do not outlive a power cut of
        the host.
        """
        flags = {"rw": "", "ro": ",readonly=on", "snapshot": ",snapshot=on"}[self.mode]
        file = str(self.file).replace(",", ",,")
        drive = f"file={file},format=raw,if=none,id={self.name},cache=unsafe,discard=unmap{flags}"
        return ["-drive", drive, "-device", f"virtio-blk-pci,drive={self.name},serial={self.name}"]


@dataclass
class Machine:
    """A VM to boot. `on_line` gets the console line by line, `on_note` each JSON object that the guest
    reports. `plugin`: a plugin of the emulator with its arguments, as QEMU's -plugin takes it; such a VM is
    always emulated, with one processor whose every instruction takes a nanosecond of the guest's time.
    """

    kernel: Kernel
    disks: list[Disk]
    mem_mib: int = 2048
    cpus: int = 2
    timeout_s: float = 600.0
    arguments: str = ""
    plugin: str = ""
    on_line: Callable[[str], None] = lambda line: None
    on_note: Callable[[dict[str, Any]], None] = lambda note: None


@dataclass
class Outcome:
    """How a VM ended. `status` is the job's, None when it never said; `trouble` then is a sentence that says
    why.
    """

    status: int | None = None
    trouble: str = ""
    root_was_up: bool = False
    seconds: float = 0.0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=CONSOLE_TAIL_LINES))


def accelerator(kernel: Kernel) -> str:
    """ "kvm" when a stock kernel really boots with it here, else "tcg"; found out once per boot of the
    machine.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    version = output(["qemu-system-x86_64", "--version"])
    memo = build_dir() / f"kvm-{key_of(boot_id, version, kernel.release)}"
    if not memo.exists():
        with Step("does a stock kernel boot with KVM here"):
            machine = Machine(
                kernel, [], mem_mib=512, cpus=1, timeout_s=PROBE_LIMIT_S, arguments="tierblk.probe"
            )
            outcome = _Run(machine, "kvm", stop_at="tierblk-vm: probe is up").run()
        memo.write_text("kvm" if outcome.root_was_up else "tcg")
        say(f"  {'KVM works' if outcome.root_was_up else 'KVM does not boot it: emulation'}")
    return memo.read_text()


def boot(machine: Machine) -> Outcome:
    """Runs a VM to its end. One that dies before its root is up is started once more: emulated text patching
    races.

    Never takes longer than the time limit (for each of the two starts). Ctrl-C ends QEMU on the way out.
    """
    accel = "tcg" if machine.plugin else accelerator(machine.kernel)
    outcome = _Run(machine, accel).run()
    if outcome.status is None and not outcome.root_was_up:
        say(f"  the VM died early ({outcome.trouble}); once more")
        outcome = _Run(machine, accel).run()
    return outcome


class _Run:
    """One life of a QEMU process."""

    def __init__(self, machine: Machine, accel: str, stop_at: str = ROOT_IS_UP) -> None:
        self._machine = machine
        self._accel = accel
        self._up_line = stop_at
        self._probe = stop_at != ROOT_IS_UP
        self._outcome = Outcome()
        self._console = b""
        self._notes = b""

    def _command(self, notes: int) -> list[str]:
        machine = self._machine
        emulated = ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU[machine.kernel.kind]]
        if machine.plugin:
            cpu = EMULATED_CPU[machine.kernel.kind].replace(",-erms,-fsrm", "")
            # By the host's clock a slow emulation would have many more interrupts of the timer in it.
            emulated = ["-accel", "tcg,thread=single", "-icount", "shift=0", "-cpu", cpu]
            emulated += ["-plugin", machine.plugin]
        how = ["-accel", "kvm", "-cpu", "host"] if self._accel == "kvm" else emulated
        # panic=-1: a dead kernel reboots at once, which -no-reboot turns into QEMU's exit.
        line = f"console=ttyS0 quiet panic=-1 oops=panic {machine.arguments}"
        if machine.plugin:
            line += f" {COUNTED_ARGUMENTS}"
        return [
            # Whatever becomes of us, kill -9 included, no QEMU stays behind.
            "setpriv", "--pdeathsig", "KILL", "--",
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "pc", *how,
            "-smp", str(machine.cpus), "-m", str(machine.mem_mib), "-display", "none", "-nic", "none",
            "-no-reboot",
            "-kernel", str(machine.kernel.image), "-initrd", str(machine.kernel.initramfs), "-append", line,
            "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-chardev", f"socket,id=notes,fd={notes}", "-serial", "chardev:notes",
            *(word for disk in machine.disks for word in disk.options()),
        ]  # fmt: skip

    def run(self) -> Outcome:
        """Starts, listens until the end, cleans up."""
        began_s = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours, temporary("qemu") as folder:
            with theirs:
                process = subprocess.Popen(
                    self._command(theirs.fileno()), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, pass_fds=[theirs.fileno()], start_new_session=True,
                    env={**os.environ, "TMPDIR": str(folder)},
                )  # fmt: skip
            try:
                self._listen(process, ours.fileno(), began_s + self._machine.timeout_s)
            finally:
                _end(process)
        self._outcome.seconds = time.monotonic() - began_s
        return self._outcome

    def _listen(self, process: subprocess.Popen[bytes], notes_fd: int, deadline_s: float) -> None:
        """Reads console and notes until QEMU is gone, the job has ended and the farewell is over, or time is
        up.
        """
        assert process.stdout is not None
        outcome = self._outcome
        limit_s = self._machine.timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, self._hear_console)
            selector.register(notes_fd, selectors.EVENT_READ, self._hear_note)
            while selector.get_map():
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    if outcome.status is None:
                        outcome.trouble = f"no end within {limit_s:.0f} s"
                    return
                for key, _ in selector.select(min(left_s, 1.0)):
                    data = os.read(key.fd, 65536)
                    if data:
                        key.data(data)
                    else:
                        selector.unregister(key.fileobj)
                if self._probe and (outcome.root_was_up or outcome.trouble):
                    return
                if outcome.status is not None:
                    deadline_s = min(deadline_s, time.monotonic() + FAREWELL_S)
        if outcome.status is None and not outcome.trouble:
            outcome.trouble = "QEMU ended before the job did"

    def _hear_console(self, data: bytes) -> None:
        *lines, self._console = (self._console + data).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace").rstrip("\r")
            self._outcome.tail.append(line)
            if self._up_line in line:
                self._outcome.root_was_up = True
            if "KVM internal error" in line or "failed to initialize kvm" in line.lower():
                self._outcome.trouble = line
            # The kernel's words while it powers off belong to nobody.
            if self._outcome.status is None or not line.startswith("["):
                self._machine.on_line(line)

    def _hear_note(self, data: bytes) -> None:
        *lines, self._notes = (self._notes + data).split(b"\n")
        for raw in lines:
            try:
                note = json.loads(raw.strip() or b"{}")
            except ValueError:
                note = {"garbled": raw.decode(errors="replace")}
            if isinstance(note, dict) and note:
                if "exit" in note:
                    self._outcome.status = int(note["exit"])
                self._machine.on_note(note)


def _end(process: subprocess.Popen[bytes]) -> None:
    """QEMU does not outlive us, whatever it was doing."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
